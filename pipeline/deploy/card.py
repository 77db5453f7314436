"""The model card: what was measured and how, on what data, where the limits are, how to ask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.deploy.request import MAX_QUERIES, MAX_SUPPORT, MAX_WAYS
from pipeline.engine.learner import Learner
from pipeline.evaluation.order import by_size
from pipeline.store.reader import Store

_LICENCES = {
    "glyphs": "Rendered from typefaces that come with pip packages, under the SIL Open Font "
    "Licence, Apache 2.0 or the Bitstream Vera licence; the pictures carry no font software.",
    "omniglot": "Omniglot (Lake et al., 2015), MIT licence.",
}
_OWN = "The pictures are your own: check that their licence and consent cover this use."


def model_card(
    name: str,
    learner: Learner,
    store: Store,
    evaluation: Mapping[str, Mapping[str, Any]],
    *,
    calibration: Mapping[str, Any],
    robustness: Mapping[str, Any] | None,
) -> str:
    """A Markdown card; the same model, data and numbers give the same text.

    Args:
        evaluation: metrics by setting, as `evaluate` wrote them for the store's domain.
        calibration: of `CalibrationFit`.
        robustness: of `Robustness`, if it was tried with spoilt queries.
    """
    return (
        "\n\n".join(
            [
                f"# {name}",
                "Learns new classes from a few labelled pictures each, without training: send a "
                "support set and queries, get labels and probabilities back.",
                f"## Measured\n\n{_measured(evaluation)}",
                f"## Confidence\n\n{_confidence(calibration)}",
                f"## Spoilt queries\n\n{_spoilt(robustness)}",
                f"## Model\n\n{_model(learner)}",
                f"## Data\n\n{_data(store)}",
                f"## Limits\n\n{_limits(learner, store)}",
                f"## How to ask\n\n{_how_to_ask()}",
            ]
        )
        + "\n"
    )


def _measured(evaluation: Mapping[str, Mapping[str, Any]]) -> str:
    baselines = sorted({b for numbers in evaluation.values() for b in numbers.get("baselines", {})})
    head = ["Setting", "Accuracy (95 %)", "Calibration error", *baselines, "Episodes"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for setting, numbers in by_size(evaluation):
        others = [_percent(numbers.get("baselines", {}).get(b)) for b in baselines]
        error = numbers.get("ece")
        cells = [
            setting,
            _percent(numbers),
            "–" if error is None else f"{error:.3f}",
            *others,
            f"{numbers['episodes']:,}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + _protocol(evaluation)


def _protocol(evaluation: Mapping[str, Mapping[str, Any]]) -> str:
    protocol = next(iter(evaluation.values()), {}).get("protocol", {})
    stated = ", ".join(
        f"{key.replace('_', ' ')} {protocol[key]}"
        for key in (
            "split",
            "queries",
            "within_group",
            "rotation",
            "batch_norm",
            "seed",
            "interval",
        )
        if key in protocol
    )
    return (
        f"Protocol: {stated or 'not recorded'}. All columns are measured on the same frozen "
        "episodes of classes that no training has seen. “5w1s” is 5 ways (classes) and 1 shot "
        "(example of each)."
    )


def _confidence(calibration: Mapping[str, Any]) -> str:
    errors = [calibration[key] for key in ("ece_before", "ece_after")]
    before, after = ("–" if error is None else f"{error:.4f}" for error in errors)
    return (
        f"Temperature {calibration['temperature']:.4f}, fitted on the frozen validation episodes, "
        f"where it takes the calibration error from {before} to {after}. Divide the logarithms of "
        "the probabilities by it and normalise them anew; the table above is without it."
    )


def _spoilt(robustness: Mapping[str, Any] | None) -> str:
    if robustness is None:
        return "Not measured."
    severities = robustness["severities"]
    names = sorted({name for found in severities.values() for name in found["corruptions"]})
    head = ["Severity", "All", *(name.replace("_", " ") for name in names)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for severity, found in severities.items():
        shares = [found["accuracy"], *(found["corruptions"].get(name) for name in names)]
        cells = [severity, *("–" if share is None else f"{share:.1%}" for share in shares)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + (
        f"\n\nAccuracy in {robustness['setting']} on {robustness['episodes']:,} test episodes with "
        f"clean support examples; with clean queries it is {robustness['clean']:.1%}."
    )


def _model(learner: Learner) -> str:
    size = sum(value.numel() for value in learner.params.values())
    shape = " x ".join(str(side) for side in learner.preprocessing.image_shape)
    rows = {
        "Algorithm": learner.name,
        "Backbone": learner.backbone.name,
        "Parameters": f"{size:,}",
        "Input": f"{shape} (channels x height x width), uint8; decoded and resized for you",
        "Batch norm": learner.model.batch_norm,
        **{
            key.replace("_", " ").capitalize(): value
            for key, value in sorted(learner.origin.items())
            if isinstance(value, str | int | float)
        },
    }
    return "\n".join(f"- {key}: {value}" for key, value in rows.items())


def _data(store: Store) -> str:
    counts = []
    for split in ("train", "val", "test"):
        members = [store.classes[i] for i in store.class_ids(split)]
        groups = sorted({c.group for c in members if c.group})
        named = f" ({', '.join(groups[:6])}{', …' if len(groups) > 6 else ''})" if groups else ""
        rows = sum(c.count for c in members)
        counts.append(f"- {split}: {len(members):,} classes, {rows:,} pictures{named}")
    licence = _LICENCES.get(store.domain, _OWN)
    lines = [f"Domain `{store.domain}`, digest `{store.digest[:16]}`.", "", *counts, "", licence]
    return "\n".join(lines)


def _limits(learner: Learner, store: Store) -> str:
    side = learner.preprocessing.image_shape[1]
    return "\n".join(
        [
            f"- Measured on {store.domain} only. Measure before you rely on it for other pictures.",
            f"- Pictures are reduced to {side} x {side} pixels; finer detail is lost.",
            "- It always names one of the classes given: it cannot say “none of these”.",
            "- Accuracy falls with more classes and with fewer, or unusual, examples of each.",
            f"- A request: 2 to {MAX_WAYS} classes, {MAX_SUPPORT} examples, {MAX_QUERIES} queries.",
            "- Not for decisions about people.",
        ]
    )


def _how_to_ask() -> str:
    return """Start it with `metaloom serve`, then:

```sh
curl http://127.0.0.1:5001/invocations -H 'Content-Type: application/json' -d '{"inputs": [{
  "support": [{"image": "<base64 PNG or JPEG>", "label": "cat"},
              {"image": "<base64 PNG or JPEG>", "label": "dog"}],
  "query": ["<base64 PNG or JPEG>"]}]}'
```

The answer is `{"predictions": [{"labels": ["cat"], "classes": ["cat", "dog"],
"probabilities": [[0.97, 0.03]]}]}`. Labels may be text or integers, and come back as given."""


def _percent(numbers: Mapping[str, Any] | None) -> str:
    if not numbers or numbers.get("accuracy") is None:
        return "–"
    spread = numbers.get("ci95")
    return f"{numbers['accuracy']:.2%}" + ("" if spread is None else f" ± {spread:.2%}")
