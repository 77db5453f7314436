"""A bundle as an MLflow model: its files, the code that serves it, what that needs."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.deploy.bundle import Bundle
from pipeline.runtime.lineage import code_root

ARTEFACT = "bundle"
_REQUIREMENTS = ("mlflow", "torch", "numpy", "pydantic", "safetensors", "pillow", "pyyaml")


@contextmanager
def no_bytecode() -> Iterator[None]:
    """MLflow tries the model where it is kept; compiled files must not get into the artefact."""
    before = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def stage_code(scratch: Path) -> Path:
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


def pyfunc_parts(bundle: Bundle, code: Path, scratch: Path) -> dict[str, Any]:
    """A bundle with the code that serves it, as MLflow wants it."""
    # MLflow keeps the folder's own name, and `fetch` looks for it by name.
    copied = shutil.copytree(bundle.folder, scratch / ARTEFACT)
    return {
        "python_model": str(code / "deploy" / "mlflow_model.py"),
        "artifacts": {ARTEFACT: str(copied)},
        "pip_requirements": requirements(),
        "metadata": {"bundle": bundle.digest, "domain": bundle.domain},
    }
