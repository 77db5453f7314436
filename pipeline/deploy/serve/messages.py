"""What clients send and what they are told; OpenAPI is made of these models."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)

from pipeline.deploy.serve.settings import Policy

Label = (
    Annotated[StrictInt, Field(ge=-(2**53), le=2**53)]
    | Annotated[StrictStr, Field(min_length=1, max_length=100)]
)
LearnerName = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\u0000]+$")]
"""No NUL: PostgreSQL keeps none."""
LearnerId = Annotated[str, Field(pattern=r"^lrn_[0-9a-f]{32}$")]
KeyId = Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
DOT = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAFElEQVR42mNgwAv+/2dgYGBiIAwAUT8CAbdEfvsAAAAASU"
    "VORK5CYII="
)
"""A small PNG, for examples that can be sent as they are."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Input(_Message):
    """One picture, in one of two forms."""

    image: str | None = Field(default=None, description="PNG or JPEG, base64", examples=[DOT])
    vector: list[StrictFloat] | None = Field(
        default=None,
        description="the stored picture itself: channels x height x width values from 0 to 255",
        examples=[None],
    )
    text: str | None = Field(
        default=None,
        description="for models of texts; models of pictures refuse it",
        examples=[None],
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Input:
        if sum(value is not None for value in (self.image, self.vector, self.text)) != 1:
            raise ValueError("give exactly one of image, vector and text")
        return self


class Example(Input):
    """A picture and its class."""

    label: Label = Field(description="any text or integer; comes back as given", examples=["dot"])


class Options(_Message):
    """How a learner is kept."""

    model: Policy | None = Field(
        default=None,
        description="follow: learned anew when the champion changes; pin: stays with its version",
    )


class NewLearner(_Message):
    """A few labelled examples of each class."""

    name: LearnerName | None = None
    support: list[Example] = Field(min_length=1)
    options: Options = Options()


class MoreExamples(_Message):
    """Examples that a new learner has beside those of an old one."""

    name: LearnerName | None = None
    support: list[Example] = Field(min_length=1)


class Queries(_Message):
    """Pictures to be classified."""

    queries: list[Input] = Field(min_length=1)
    against: Literal["champion", "challenger"] = Field(
        default="champion", description="which model version answers"
    )


class Episode(_Message):
    """Examples and queries at once; nothing is kept."""

    support: list[Example] = Field(min_length=1)
    queries: list[Input] = Field(min_length=1)
    against: Literal["champion", "challenger"] = "champion"


class ModelRef(_Message):
    """A model version."""

    name: str
    version: int | None = Field(description="in the registry; null for a bundle from a folder")
    bundle: str = Field(description="SHA-256 that vouches for every byte of it")


class ClassOf(_Message):
    """A class of a learner."""

    label: Label
    shots: int


class LearnerTold(_Message):
    """A learner: immutable, named by its content."""

    id: LearnerId
    name: str | None
    created: datetime
    parent: LearnerId | None
    classes: list[ClassOf]
    examples: int
    options: Options
    model: ModelRef = Field(description="the version that made it")
    unknown_below: float | None = Field(
        description="similarity to the nearest example below which an answer is `unknown`"
    )


class Listed(_Message):
    """A page of learners, newest first."""

    learners: list[LearnerTold]
    next: LearnerId | None


class Probability(_Message):
    """Of one class."""

    label: Label
    probability: float


class Neighbour(_Message):
    """A support example that is like the query."""

    example: int = Field(description="its number in the support set, from 0")
    label: Label
    similarity: float = Field(description="cosine of the features, from -1 to 1")


class Prediction(_Message):
    """The answer to one query."""

    label: Label | None = Field(description="null when it is unknown")
    unknown: bool
    confidence: float = Field(description="calibrated probability of the most probable class")
    probabilities: list[Probability]
    nearest: list[Neighbour]


class Predictions(_Message):
    """Answers in the order of the queries."""

    learner: LearnerId | None
    model: ModelRef = Field(description="the version that answered")
    predictions: list[Prediction]


class InputForm(_Message):
    """What the model takes."""

    kind: Literal["image"] = "image"
    channels: int
    height: int
    width: int


class VersionTold(ModelRef):
    """A version that serves, with its measured numbers."""

    algorithm: str
    input: InputForm
    evaluation: dict[str, dict[str, Any]]


class Refused(_Message):
    """A version that was to serve and may not."""

    version: int
    why: str


class Tally(BaseModel):
    """What a version has done in one replica since it serves there."""

    answered: int = 0
    failed: int = 0
    compared: int = Field(default=0, description="queries that it answered in the shadow")
    agreed: int = Field(default=0, description="of these: with the champion's label")


class ReplicaTold(_Message):
    """What a replica serves, and how that does."""

    champion: ModelRef | None
    challenger: ModelRef | None
    tallies: dict[Literal["champion", "challenger"], Tally]
    share: float = Field(description="of the learners that the challenger answers")
    refused: list[Refused]


class ModelTold(_Message):
    """What serves now."""

    champion: VersionTold
    challenger: VersionTold | None
    limits: dict[str, int]
    refused: list[Refused]


class Health(_Message):
    """Whether the process lives."""

    status: str = "ok"
    """Or what is wrong"""


class Readiness(_Message):
    """Whether requests are answered, by what, and what keeps a newer version out."""

    status: Literal["ready", "loading", "draining", "stuck"]
    model: ModelRef | None
    problems: list[str]
