"""The registered model as MLflow runs it: a script that MLflow executes ("models from code").

Only `mlflow models serve` and `mlflow.pyfunc.load_model` come here. Our own code opens the bundle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from pydantic import BaseModel, SkipValidation

from pipeline.core.errors import PipelineError
from pipeline.deploy.bundle import Bundle, load_bundle
from pipeline.deploy.request import EpisodeAnswer, SupportExample, answer, parse_request

BUNDLE = "bundle"


class RefusedRequest(MlflowException):
    """A request that cannot be answered: status 400 and our message alone.

    MLflow's server assigns `message` to put the whole request, pictures included, before it.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        super().__init__(text, error_code=INVALID_PARAMETER_VALUE)

    @property
    def message(self) -> str:
        """What is wrong with the request."""
        return self._text

    @message.setter
    def message(self, value: str) -> None:
        return


class Episode(BaseModel, extra="allow"):
    """The form of a request, for the signature.

    It is checked by `parse_request`, because MLflow's own message would repeat every picture.
    """

    support: Annotated[list[SupportExample], SkipValidation] = []
    query: Annotated[list[str], SkipValidation] = []


class FewShotModel(PythonModel):
    """Answers episodes with the learner of a verified bundle."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the bundle; refuse to start when it was altered."""
        self.bundle: Bundle = load_bundle(Path(context.artifacts[BUNDLE]))

    def predict(
        self, model_input: list[Episode], params: dict[str, Any] | None = None
    ) -> list[EpisodeAnswer]:
        """One answer for each episode, of any ways and shots."""
        try:
            requests = [parse_request(dict(episode)) for episode in model_input]
            return [answer(self.bundle.learner, request) for request in requests]
        except PipelineError as error:
            raise RefusedRequest(str(error)) from None


set_model(FewShotModel())
