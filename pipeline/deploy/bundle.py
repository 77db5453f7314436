"""A bundle: the folder that is served. Weights, description, evidence, card; nothing that runs."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel
from safetensors import SafetensorError

from pipeline.core.errors import ArtefactError, PipelineError
from pipeline.core.files import MANIFEST, canonical_json, new_folder, read_json, sha256_file, verify
from pipeline.deploy.drift import Reference
from pipeline.deploy.golden import Golden, golden_of
from pipeline.engine.learner import DESCRIPTION, WEIGHTS, Learner, load_learner

FORMAT_VERSION = 2
EVIDENCE, CARD = "evaluation.json", "card.md"
REFERENCE, GOLDEN = "drift.json", "golden.json"
FILES = frozenset({WEIGHTS, DESCRIPTION, EVIDENCE, CARD})
"""In every bundle; what traffic is compared with, and a golden episode, may be there too"""
_LATER = frozenset({REFERENCE, GOLDEN})
_KIND = "metaloom bundle"
_Part = TypeVar("_Part", bound=BaseModel)
_HEADER = {"kind": _KIND, "format_version": FORMAT_VERSION}
_EVIDENCE_KEYS = {
    1: {"domain", "settings"},  # before there was a temperature: it is 1
    FORMAT_VERSION: {"domain", "settings", "calibration", "robustness"},
}


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: every byte of it has been verified."""

    folder: Path
    learner: Learner
    domain: str
    evaluation: dict[str, Any]
    """Measured numbers with their protocols, by setting ("5w1s")."""
    calibration: dict[str, Any] | None
    """The fitted temperature, and what it was fitted on; None where there is none."""
    robustness: dict[str, Any] | None
    """Accuracies with spoilt queries, by severity; None where they were not tried."""
    card: str
    digest: str
    """SHA-256 of the manifest, which vouches for everything else."""
    weights_digest: str
    reference: Reference | None = None
    """What its traffic is compared with; None in bundles from before there was any."""
    golden: Golden | None = None
    """Answers that it must still give where it is loaded; None in bundles from before that."""

    @property
    def temperature(self) -> float:
        """What logits are divided by for honest confidences; 1 where none was fitted."""
        return 1.0 if self.calibration is None else float(self.calibration["temperature"])

    @property
    def weights_bytes(self) -> int:
        """Size of the weights on disk."""
        return (self.folder / WEIGHTS).stat().st_size


def make_bundle(
    target: Path,
    learner_folder: Path,
    evaluation: dict[str, Any],
    *,
    domain: str,
    card: str,
    calibration: dict[str, Any] | None = None,
    robustness: dict[str, Any] | None = None,
    reference: Reference | None = None,
) -> Bundle:
    """Gather a sealed learner and its measured numbers into a bundle.

    The same learner and numbers give the same bytes, so the digest names the release.

    Args:
        evaluation: metrics by setting, as `evaluate` wrote them for this domain.
        card: the model card, Markdown.
        calibration: of `CalibrationFit`: its `temperature` is what serving divides logits by.
        robustness: of `Robustness`.
        reference: of `make_reference`.
    """
    verify(learner_folder)
    with new_folder(target, **_HEADER) as folder:
        for name in (WEIGHTS, DESCRIPTION):
            shutil.copyfile(learner_folder / name, folder / name)
        evidence = {
            "domain": domain,
            "settings": evaluation,
            "calibration": calibration,
            "robustness": robustness,
        }
        (folder / EVIDENCE).write_text(canonical_json(evidence), encoding="utf-8")
        (folder / CARD).write_text(card, encoding="utf-8")
        if reference is not None:
            told = canonical_json(reference.model_dump(mode="json"))
            (folder / REFERENCE).write_text(told, encoding="utf-8")
        temperature = float(calibration["temperature"]) if calibration else 1.0
        golden = golden_of(load_learner(learner_folder), temperature)
        told = canonical_json(golden.model_dump(mode="json"))
        (folder / GOLDEN).write_text(told, encoding="utf-8")
    return load_bundle(target)


def load_bundle(folder: Path, *, digest: str | None = None) -> Bundle:
    """Open a bundle: everything is verified before anything is parsed, and nothing is executed.

    Args:
        digest: what the manifest's SHA-256 must be, where a registry has recorded it.

    Raises:
        ArtefactError: a byte differs, a file is missing, extra or a link, it is not the recorded
            bundle, or no bundle that this version can open.
    """
    before = _digest_of(folder)
    version = _check_manifest(folder)
    found = sha256_file(folder / MANIFEST)
    if digest is not None and found != digest:
        raise ArtefactError(
            f"{folder} is not the bundle that was registered: its digest is {found[:12]}…, and the "
            f"registry recorded {digest[:12]}…. Do not serve it; register the model again."
        )
    try:
        learner = load_learner(folder)
        evidence = _checked_evidence(read_json(folder / EVIDENCE), version)
        bundle = Bundle(
            folder=folder,
            learner=learner,
            domain=str(evidence["domain"]),
            evaluation=dict(evidence["settings"]),
            calibration=evidence.get("calibration"),
            robustness=evidence.get("robustness"),
            card=(folder / CARD).read_text(encoding="utf-8"),
            digest=found,
            weights_digest=sha256_file(folder / WEIGHTS),
            reference=_part(folder / REFERENCE, Reference),
            golden=_part(folder / GOLDEN, Golden),
        )
        if _digest_of(folder) != before:  # its parts may be of two bundles, each of them whole
            raise ArtefactError(f"{folder} was replaced while it was read. Open it again.")
        return bundle
    except PipelineError:
        raise
    except (
        OSError,
        SafetensorError,
        RuntimeError,
        KeyError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise ArtefactError(
            f"{folder} is sealed and yet no bundle: {type(error).__name__}: {error}. "
            "Make it again (`dvc repro`)."
        ) from None


def _part(path: Path, kind: type[_Part]) -> _Part | None:
    """None where the bundle has none; ValueError where it is none of its kind."""
    return kind.model_validate(read_json(path)) if path.exists() else None


def _digest_of(folder: Path) -> str | None:
    """Of the manifest; None where there is none to read."""
    try:
        return sha256_file(folder / MANIFEST)
    except OSError:
        return None


def _checked_evidence(evidence: dict[str, Any], version: int) -> dict[str, Any]:
    """Exactly what its format holds, and a temperature that can be divided by.

    Raises:
        ValueError: it is not.
    """
    if set(evidence) != _EVIDENCE_KEYS[version]:
        raise ValueError(f"{EVIDENCE} of format {version} holds {sorted(evidence)}")
    if (calibration := evidence.get("calibration")) is not None:
        temperature = calibration["temperature"]
        if type(temperature) not in (int, float) or not 0 < temperature < math.inf:
            raise ValueError(f"the temperature is {temperature!r}")
    return evidence


def _check_manifest(folder: Path) -> int:
    """Everything is as it was sealed, it is a bundle of ours, and nothing is beside it.

    Returns:
        Its format version.
    """
    manifest = verify(folder)
    files = set(manifest.pop("files"))
    if files - _LATER != FILES:
        raise ArtefactError(
            f"{folder} is no bundle: it must hold exactly {sorted(FILES)} (and "
            f"{' and '.join(sorted(_LATER))}, if it has them); missing {sorted(FILES - files)}, "
            f"extra {sorted(files - FILES - _LATER)}."
        )
    version = manifest.get("format_version")
    if manifest != {"kind": _KIND, "format_version": version} or version not in (1, FORMAT_VERSION):
        raise ArtefactError(
            f"{folder} is no bundle of format 1 or {FORMAT_VERSION}: its manifest says {manifest}. "
            "Use the version that made it, or make it again (`dvc repro`)."
        )
    if extra := [p for p in folder.iterdir() if p.name not in files | {MANIFEST}]:
        raise ArtefactError(f"{folder} holds what no bundle holds: {extra[0].name!r}. Remove it.")
    return int(version)
