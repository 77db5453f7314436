"""What this machine has, what is missing, and how to mend it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic.json_schema import models_json_schema

from pipeline.core.config import Section, load_section
from pipeline.core.errors import PipelineError

MIN_PYTHON = (3, 11)
# Older patch releases let a crafted tar archive escape its folder (CVE-2025-4517).
SAFE_PYTHON = {(3, 11): 13, (3, 12): 11, (3, 13): 4}
MIN_DISK_BYTES = 5 * 10**9
MIN_MEMORY_BYTES = 4 * 10**9

PACKAGES = {
    "training": (
        *("torch", "numpy", "pyarrow", "pydantic", "safetensors", "pillow", "typer", "rich"),
        "pyyaml",
    ),
    "track": ("mlflow", "dvc", "psutil"),
    "glyphs": ("matplotlib", "fonttools"),
}
"""By extra; `training` is what every installation has."""

SECTIONS = {
    "preprocess": "pipeline.store.build:PreprocessConfig",
    "sample_tasks": "pipeline.tasks.plan:SampleTasksConfig",
    "pretrain": "pipeline.training.pretrain:PretrainConfig",
    "meta_train": "pipeline.training.meta_train:MetaTrainConfig",
    "evaluate": "pipeline.evaluation.evaluate:EvaluateConfig",
    "deploy": "pipeline.deploy.release:DeployConfig",
    "retrain": "pipeline.cluster.retrain.policy:RetrainConfig",
}
"""Where the model of each section of params.yaml is."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    """False only for what keeps the pipeline from running."""
    found: str
    mend: str = ""
    """What to do; also set for what works and could be better."""


def examine(root: Path) -> list[Finding]:
    """Look at everything; a check that breaks is a finding too."""
    checks: list[Callable[[Path], Iterator[Finding]]] = [
        _python,
        _packages,
        _typefaces,
        _machine,
        _accelerator,
        _repository,
        _params,
        _mlflow,
    ]
    findings = []
    for check in checks:
        try:
            findings += list(check(root))
        except Exception as error:  # the doctor must finish, whatever the patient has
            name = check.__name__.strip("_")
            findings.append(Finding(name, False, f"{type(error).__name__}: {error}", "See above."))
    return findings


def _python(root: Path) -> Iterator[Finding]:
    version = sys.version_info
    text = f"{version.major}.{version.minor}.{version.micro} ({sys.executable})"
    safe = version.micro >= SAFE_PYTHON.get((version.major, version.minor), 0)
    advice = "" if safe else "A newer patch release closes CVE-2025-4517 (tar archives)."
    if version[:2] < MIN_PYTHON:
        advice = f"Install Python {MIN_PYTHON[0]}.{MIN_PYTHON[1]} or newer."
    yield Finding("python", version[:2] >= MIN_PYTHON, text, advice)


def _packages(root: Path) -> Iterator[Finding]:
    for extra, names in PACKAGES.items():
        versions = {name: _version(name) for name in names}
        missing = [name for name, version in versions.items() if version is None]
        found = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        what = "metaloom" if extra == "training" else f"metaloom[{extra}]"
        mend = f"{', '.join(missing)} missing: pip install '{what}', or `make setup`."
        yield Finding(f"packages: {extra}", not missing, found or "none", mend if missing else "")


def _typefaces(root: Path) -> Iterator[Finding]:
    from pipeline.domains.glyphs import GlyphsConfig

    wanted = GlyphsConfig().packages
    versions = {name: _version(name) for name in wanted}
    off = {name: version for name, version in versions.items() if version != wanted[name]}
    problems = [f"{name} {version}" if version else f"no {name}" for name, version in off.items()]
    right = f"{len(wanted) - len(off)} of {len(wanted)} packages as pinned"
    needed = " ".join(f"{name}=={wanted[name]}" for name in off)
    mend = f"pip install {needed}: the pictures hang on the exact versions." if off else ""
    yield Finding("typefaces", not off, "; ".join([right, *problems]), mend)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine(root: Path) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cores", True, str(cores))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    mend = "" if memory >= MIN_MEMORY_BYTES else "The default run needs some 4 GB."
    yield Finding("memory", memory >= MIN_MEMORY_BYTES, f"{memory / 1e9:.1f} GB", mend)
    free = shutil.disk_usage(root).free
    mend = "" if free >= MIN_DISK_BYTES else "Free some: the packages and results need about 5 GB."
    yield Finding("disk", free >= MIN_DISK_BYTES, f"{free / 1e9:.1f} GB free", mend)


def _accelerator(root: Path) -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        hint = "This PyTorch has no CUDA: see pytorch.org." if shutil.which("nvidia-smi") else ""
        yield Finding("gpu", True, "none; the CPU is used", hint)
        return
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory
        yield Finding("gpu", True, f"{torch.cuda.get_device_name(index)}, {memory / 1e9:.0f} GB")


def _repository(root: Path) -> Iterator[Finding]:
    if shutil.which("git") is None:
        yield Finding("git", False, "not found", "Install git; runs are tagged with the commit.")
    else:
        command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found, ok = done.stdout.strip(), done.returncode == 0
        mend = "" if ok else "Run it in a clone, or `git init` and commit: runs name their commit."
        yield Finding("git", ok, f"commit {found}" if ok else "no commit here", mend)
    ok = (root / ".dvc").is_dir() and (root / "dvc.yaml").is_file()
    mend = "" if ok else "Go to the top of the repository, where dvc.yaml is."
    yield Finding("dvc repository", ok, "yes" if ok else f"not {root}", mend)


def _section(place: str) -> type[Section]:
    module, _, model = place.partition(":")
    kind: type[Section] = getattr(importlib.import_module(module), model)
    return kind


def params_schema() -> dict[str, Any]:
    """The JSON schema of params.yaml: every section, key, description and limit."""
    kinds = {name: _section(place) for name, place in SECTIONS.items()}
    references, definitions = models_json_schema(
        [(kind, "validation") for kind in kinds.values()], ref_template="#/$defs/{model}"
    )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "params.yaml",
        "type": "object",
        "additionalProperties": False,
        "required": list(kinds),
        "properties": {name: references[kind, "validation"] for name, kind in kinds.items()},
        "$defs": definitions["$defs"],
    }


def _params(root: Path) -> Iterator[Finding]:
    problems = []
    if not (root / "params.yaml").is_file():
        mend = "Go to the top of the repository, where it is kept."
        yield Finding("params.yaml", False, f"not in {root}", mend)
        return
    for name, place in SECTIONS.items():
        try:
            load_section(root / "params.yaml", name, _section(place))
        except PipelineError as error:
            problems.append(str(error))
        except ImportError as error:
            problems.append(f"{name}: cannot be checked ({error})")
    problems += _unknown_sections(root / "params.yaml")
    found = "valid" if not problems else "; ".join(problems)
    yield Finding("params.yaml", not problems, found, "Mend what is named." if problems else "")


def _unknown_sections(path: Path) -> list[str]:
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return []  # said already, by every section
    unknown = [str(name) for name in document or () if name not in SECTIONS]
    known = f"Known sections: {', '.join(SECTIONS)}"
    return [f"unknown section {', '.join(unknown)}. {known}"] if unknown else []


def _mlflow(root: Path) -> Iterator[Finding]:
    if importlib.util.find_spec("mlflow") is None:
        return
    from pipeline.runtime.mlflow_tracker import connect, shown_uri, tracking_uri

    uri = tracking_uri(root)
    database = uri.removeprefix("sqlite:///")
    if uri.startswith("sqlite:///") and not Path(database).exists():
        yield Finding("mlflow", True, f"{shown_uri(root)} (made by the first run)")
        return
    try:
        connect(root).search_experiments(max_results=1)
        yield Finding("mlflow", True, shown_uri(root))
    except Exception as error:  # MLflow, its HTTP client or its database layer
        reason = f"{shown_uri(root)}: {error}".splitlines()[0][:200]
        yield Finding("mlflow", False, reason, "Start it, or set MLFLOW_TRACKING_URI right.")
