"""What MLflow stores of a version: the bundle with the code that serves it, and its signature."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core.errors import ArtefactError
from pipeline.deploy import signing
from pipeline.deploy.bundle import CARD, Bundle
from pipeline.deploy.packing import ARTEFACT, no_bytecode, pyfunc_parts, stage_code
from pipeline.deploy.patience import is_absent


def log_model(client: Any, name: str, bundle: Bundle, example: Any, run_id: str) -> Any:
    """Log the bundle with the code that serves it, as an MLflow model of a run."""
    import mlflow

    with tempfile.TemporaryDirectory() as scratch, no_bytecode():
        code = stage_code(Path(scratch))
        with _inside(client, run_id):
            mlflow.log_text(bundle.card, f"model_{CARD}")
            parts = pyfunc_parts(bundle, code, Path(scratch))
            return mlflow.pyfunc.log_model(
                name=name, **parts, code_paths=[str(code)], input_example=example
            )


@contextmanager
def _inside(client: Any, run_id: str) -> Iterator[None]:
    """Inside a run that stays open."""
    import mlflow

    with mlflow.start_run(run_id=run_id):
        yield
    client.update_run(run_id, status="RUNNING")


def download(base: str, target: Path) -> None:
    """A logged model's bundle, and only that."""
    from mlflow.artifacts import download_artifacts

    uri = f"{base.rstrip('/')}/artifacts/{ARTEFACT}"
    with tempfile.TemporaryDirectory() as scratch:
        try:
            found = Path(download_artifacts(artifact_uri=uri, dst_path=scratch))
        except Exception as error:
            if is_absent(error):
                raise ArtefactError(
                    f"{uri} does not exist: it was deleted, or never whole."
                ) from None
            raise
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(found, target, symlinks=True)


def signature_at(base: str) -> str | None:
    """The signature beside a logged model's bundle; None where there is none.

    It is looked for in a list: what stores say of a file that is absent differs.
    """
    from mlflow.artifacts import download_artifacts, list_artifacts

    if signing.SIGNATURE not in {Path(one.path).name for one in list_artifacts(artifact_uri=base)}:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        uri = f"{base.rstrip('/')}/{signing.SIGNATURE}"
        content = Path(download_artifacts(artifact_uri=uri, dst_path=scratch)).read_bytes()
    return content[: signing.MAX_SIGNATURE_BYTES].decode(errors="replace")
