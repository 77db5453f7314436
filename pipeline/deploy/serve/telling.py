"""From what is known to what clients are told."""

from __future__ import annotations

from pipeline.deploy.serve.learners import Kept
from pipeline.deploy.serve.messages import (
    ClassOf,
    LearnerTold,
    Neighbour,
    Options,
    Prediction,
    Predictions,
    Probability,
)
from pipeline.deploy.serve.model import Answers, Ready, Version

_NUM_NEIGHBOURS = 3


def told(kept: Kept) -> LearnerTold:
    """A learner as clients see it."""
    labels = list(kept.labels)
    return LearnerTold(
        id=kept.id,
        name=kept.name,
        created=kept.created,  # type: ignore[arg-type]
        parent=kept.parent,
        classes=[ClassOf(label=label, shots=labels.count(label)) for label in kept.classes],
        examples=len(labels),
        options=Options(model=kept.policy),
        model=kept.model,
        unknown_below=kept.unknown_below,
    )


def predictions_of(kept: Kept, version: Version, ready: Ready, answers: Answers) -> Predictions:
    """The answers of a version, the most probable class and the nearest example first."""
    near = answers.similarity.topk(min(_NUM_NEIGHBOURS, len(kept.labels)), dim=1)
    ordered = answers.probabilities.sort(dim=1, descending=True)
    return Predictions(
        learner=kept.id or None,
        model=version.ref,
        predictions=[
            _prediction(kept, ready, *row)
            for row in zip(
                ordered.values.tolist(),
                ordered.indices.tolist(),
                near.values.tolist(),
                near.indices.tolist(),
                strict=True,
            )
        ],
    )


def _prediction(
    kept: Kept,
    ready: Ready,
    probabilities: list[float],
    classes: list[int],
    similarities: list[float],
    examples: list[int],
) -> Prediction:
    unknown = ready.unknown_below is not None and similarities[0] < ready.unknown_below
    return Prediction(
        label=None if unknown else kept.classes[classes[0]],
        unknown=unknown,
        confidence=probabilities[0],
        probabilities=[
            Probability(label=kept.classes[i], probability=p)
            for i, p in zip(classes, probabilities, strict=True)
        ],
        nearest=[
            Neighbour(example=i, label=kept.labels[i], similarity=s)
            for i, s in zip(examples, similarities, strict=True)
        ],
    )
