"""The model registry: versions, their evidence, and the aliases that say which one serves."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import MachineError, PipelineError, RegistryError
from pipeline.deploy.bundle import CARD, Bundle, load_bundle
from pipeline.runtime.lineage import code_root
from pipeline.runtime.mlflow_tracker import connect, experiment_id, shown_uri, tracking_uri

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
BUNDLE_TAG, WEIGHTS_TAG = "metaloom.bundle", "metaloom.weights"
SMOKE_TAG, ROLLED_BACK_TAG, HISTORY_TAG = (
    "metaloom.smoke",
    "metaloom.rolled_back",
    "metaloom.champions",
)
PASSED = "passed"
KEPT_CHAMPIONS = 20
_ARTEFACT = "bundle"
_REQUIREMENTS = ("mlflow", "torch", "numpy", "pydantic", "safetensors", "pillow", "pyyaml")


@dataclass(frozen=True)
class Version:
    """One registered model version."""

    name: str
    number: int
    tags: Mapping[str, str]
    source: str
    run_id: str | None

    @property
    def digest(self) -> str:
        """Of its bundle, as recorded on registration; empty for a version that is not ours."""
        return self.tags.get(BUNDLE_TAG, "")

    @property
    def uri(self) -> str:
        """Its address for MLflow's own commands."""
        return f"models:/{self.name}/{self.number}"


class Registry:
    """The versions of one registered model in MLflow; its aliases say what serves."""

    def __init__(self, root: Path, name: str) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise MachineError(
                "MLflow is not installed. Install it: pip install 'metaloom[track]'."
            )
        self.name = name
        self.uri = tracking_uri(root)
        self.shown = shown_uri(root)
        self._root = root
        self._client = connect(root)

    def find(self, digest: str) -> Version | None:
        """The version that holds this bundle, if it is registered."""
        with _explained(self.shown):
            condition = f"name = '{self.name}' and tags.`{BUNDLE_TAG}` = '{digest}'"
            found = self._client.search_model_versions(condition)
        numbers = sorted(int(version.version) for version in found)
        return self.version(numbers[0]) if numbers else None

    def register(
        self,
        bundle: Bundle,
        example: Any,
        *,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> tuple[Version, bool]:
        """Register a bundle unless it is registered; returns the version and whether it is new.

        Args:
            example: a request, kept as the model's input example.
            run_id: the run that it belongs to; without one a run is made for it.
            tags: of the version; set together with it, not afterwards.
        """
        if known := self.find(bundle.digest):
            return known, False
        with _explained(self.shown):
            model = self._log_model(bundle, example, run_id)
            self._ensure_registered_model()
            own = {BUNDLE_TAG: bundle.digest, WEIGHTS_TAG: bundle.weights_digest}
            made = self._client.create_model_version(
                self.name,
                source=model.model_uri,
                run_id=model.run_id,
                tags={**(tags or {}), **own},
                description=bundle.card,
                model_id=model.model_id,
            )
        return self.version(int(made.version)), True

    def version(self, number: int) -> Version:
        """One version.

        Raises:
            RegistryError: there is none of this number, or the registry does not answer.
        """
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_model_version(self.name, str(number))
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise RegistryError(
                    f"{self.name} has no version {number} (MLflow at {self.shown}). "
                    "`metaloom ui` shows those it has."
                ) from None
            raise _silent(self.shown, error) from None
        return Version(self.name, int(found.version), dict(found.tags), found.source, found.run_id)

    def aliases(self) -> dict[str, int]:
        """Version number by alias; empty when nothing is registered."""
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return {}
            raise _silent(self.shown, error) from None
        return {alias: int(number) for alias, number in found.aliases.items()}

    def champion(self) -> Version | None:
        """The version that serves: whatever the alias says now, whoever moved it."""
        number = self.aliases().get(CHAMPION)
        return None if number is None else self.version(number)

    def fetch(self, version: Version, target: Path) -> Bundle:
        """Download a version's bundle, and only that, and open it verified.

        Raises:
            ArtefactError: it is not the bundle that was registered.
            RegistryError: the version is not one of ours, or cannot be downloaded.
        """
        if not version.digest:
            raise RegistryError(
                f"version {version.number} of {self.name} was not registered by metaloom (it "
                f"has no tag {BUNDLE_TAG}): nothing vouches for it. "
                "Register models with `dvc repro deploy`."
            )
        from mlflow.artifacts import download_artifacts

        with _explained(
            self.shown, f"version {version.number} of {self.name} cannot be downloaded"
        ):
            base = self._client.get_model_version_download_uri(self.name, str(version.number))
            uri = f"{base.rstrip('/')}/artifacts/{_ARTEFACT}"
            with tempfile.TemporaryDirectory() as scratch:
                found = Path(download_artifacts(artifact_uri=uri, dst_path=scratch))
                shutil.copytree(found, target, symlinks=True)
        return load_bundle(target, digest=version.digest)

    def tag(self, version: Version, tags: Mapping[str, str]) -> Version:
        """Set tags of a version."""
        with _explained(self.shown):
            for key, value in tags.items():
                self._client.set_model_version_tag(
                    self.name, str(version.number), key, value[:5000]
                )
        return self.version(version.number)

    def promote(self, version: Version) -> Version | None:
        """Make a version the champion and the champion `previous`; returns the old champion.

        Raises:
            RegistryError: the version has not passed the smoke test.
        """
        if version.tags.get(SMOKE_TAG) != PASSED:
            raise RegistryError(
                f"version {version.number} of {self.name} has not passed the smoke test "
                f"({version.tags.get(SMOKE_TAG, 'it never ran')}), so it may not serve. "
                "Run `dvc repro deploy` to test it."
            )
        old = self.champion()
        if old is not None and old.number == version.number:
            return None
        history = [n for n in self._history(old) if n != version.number]
        self._set_history([*history, version.number])
        self._move(CHAMPION, version.number)
        if self.aliases().get(CHALLENGER) == version.number:
            self._drop(CHALLENGER)
        if ROLLED_BACK_TAG in version.tags:
            number = str(version.number)
            with _explained(self.shown):
                self._client.delete_model_version_tag(self.name, number, ROLLED_BACK_TAG)
        return old

    def challenge(self, version: Version) -> None:
        """Mark a version as the one that waits for a person's decision."""
        self._move(CHALLENGER, version.number)

    def rollback(self) -> tuple[Version, Version]:
        """Make the champion before this one serve again; returns (new champion, dropped one).

        Raises:
            RegistryError: there is no earlier champion, or it is no longer whole.
        """
        current = self.champion()
        if current is None:
            raise RegistryError(f"{self.name} has no champion, so there is nothing to roll back.")
        history = self._history(current)[:-1]
        earlier = self.aliases().get(PREVIOUS)
        if earlier is not None and earlier != current.number:
            history = [n for n in history if n != earlier] + [earlier]
        if not history:
            raise RegistryError(
                f"version {current.number} is the first champion of {self.name}; nothing was "
                "before it. Name the version that should serve: `metaloom promote VERSION`."
            )
        target = self.version(history[-1])
        with tempfile.TemporaryDirectory() as scratch:
            self.fetch(target, Path(scratch) / "bundle")
        self._set_history(history)
        self._move(CHAMPION, target.number)
        self.tag(current, {ROLLED_BACK_TAG: time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        return target, current

    def _history(self, champion: Version | None) -> list[int]:
        """Champions in order, the present one last, even when its alias was moved by hand."""
        from mlflow.exceptions import MlflowException

        try:
            text = self._client.get_registered_model(self.name).tags.get(HISTORY_TAG, "[]")
            known = [int(number) for number in json.loads(text)]
        except (MlflowException, ValueError, TypeError):
            known = []
        if champion is None:
            return known
        return [number for number in known if number != champion.number] + [champion.number]

    def _set_history(self, history: list[int]) -> None:
        """Record the order of champions, then point `previous` at the last but one."""
        with _explained(self.shown):
            text = json.dumps(history[-KEPT_CHAMPIONS:])
            self._client.set_registered_model_tag(self.name, HISTORY_TAG, text)
        if len(history) > 1:
            self._move(PREVIOUS, history[-2])
        else:
            self._drop(PREVIOUS)

    def _move(self, alias: str, number: int) -> None:
        with _explained(self.shown):
            self._client.set_registered_model_alias(self.name, alias, str(number))

    def _drop(self, alias: str) -> None:
        if alias in self.aliases():
            with _explained(self.shown):
                self._client.delete_registered_model_alias(self.name, alias)

    def _ensure_registered_model(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(
                self.name, description="Few-shot learner by Metaloom."
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _log_model(self, bundle: Bundle, example: Any, run_id: str | None) -> Any:
        """Log the bundle with the code that serves it, as an MLflow model of a run."""
        import mlflow

        with tempfile.TemporaryDirectory() as scratch, _no_bytecode():
            code = _stage_code(Path(scratch))
            with _run(self._client, experiment_id(self._client, self._root), run_id):
                mlflow.log_text(bundle.card, f"model_{CARD}")
                parts = _pyfunc(bundle, code, Path(scratch))
                return mlflow.pyfunc.log_model(
                    name=self.name, **parts, code_paths=[str(code)], input_example=example
                )

    def save_local(self, bundle: Bundle, target: Path) -> None:
        """Write an MLflow model of a verified bundle that runs the code that is installed here."""
        import mlflow

        with tempfile.TemporaryDirectory() as scratch:
            parts = _pyfunc(bundle, code_root() / "pipeline", Path(scratch))
            mlflow.pyfunc.save_model(path=str(target), **parts)


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """MLflow tries the model where it is kept; compiled files must not get into the artefact."""
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _stage_code(scratch: Path) -> Path:
    """Copy the package's sources, and nothing else, for a model that is served elsewhere."""
    return Path(
        shutil.copytree(
            code_root() / "pipeline",
            scratch / "pipeline",
            ignore=lambda folder, names: (
                [n for n in names if not n.endswith(".py") and not (Path(folder) / n).is_dir()]
                + [n for n in names if n == "__pycache__"]
            ),
        )
    )


def requirements() -> list[str]:
    """What the model needs, pinned to what is installed; local build labels (+cpu) are dropped."""
    return [
        f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _REQUIREMENTS
    ]


def _pyfunc(bundle: Bundle, code: Path, scratch: Path) -> dict[str, Any]:
    # MLflow keeps the folder's own name, and `fetch` looks for it by name.
    copied = shutil.copytree(bundle.folder, scratch / _ARTEFACT)
    return {
        "python_model": str(code / "deploy" / "mlflow_model.py"),
        "artifacts": {_ARTEFACT: str(copied)},
        "pip_requirements": requirements(),
        "metadata": {"bundle": bundle.digest, "domain": bundle.domain},
    }


@contextmanager
def _run(client: Any, experiment: str, run_id: str | None) -> Iterator[None]:
    """Inside a run: the given one, which stays open, or one of its own."""
    import mlflow

    if run_id is None:
        mlflow.set_experiment(experiment_id=experiment)
        with mlflow.start_run(run_name="release"):
            yield
        return
    with mlflow.start_run(run_id=run_id):
        yield
    client.update_run(run_id, status="RUNNING")


def _silent(uri: str, error: Exception) -> RegistryError:
    reason = str(error).splitlines()[0][:300]
    return RegistryError(
        f"the registry at {uri} does not answer: {reason}. Start its server, or set "
        "MLFLOW_TRACKING_URI right; `metaloom doctor` looks into it."
    )


@contextmanager
def _explained(uri: str, what: str = "the registry refused") -> Iterator[None]:
    """Turn MLflow's faults into ours."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # MLflow, its HTTP client, its database layer and the disk
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise RegistryError(
            f"{what} (MLflow at {uri}: {reason}). `metaloom doctor` looks into it."
        ) from None
