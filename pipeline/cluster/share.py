"""What other machines need to take results over instead of computing them: `dvc push`, completed.

DVC's run-cache restores a stage only whole. Metrics that git keeps (`cache: false`) belong to their
stage's entry, lie in the local cache, and are left out by `dvc push`; without them another machine
that does not have this dvc.lock finds every entry incomplete and computes again. They are pushed
here as what they are to DVC: objects named by their hash.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.cluster.commands import dvc
from pipeline.core.errors import MachineError
from pipeline.core.files import write_json

LOCK = "dvc.lock"


def default_remote(root: Path) -> str | None:
    """The remote that DVC pushes to; None where none is set."""
    for line in dvc(root, "config", "--list").splitlines():
        key, _, value = line.partition("=")
        if key == "core.remote":
            return value
    return None


def share(root: Path) -> str:
    """Push data, run-cache and metrics of a repository to its default remote; returns its name.

    Raises:
        MachineError: there is no remote, or it refuses.
    """
    remote = default_remote(root)
    if remote is None:
        raise MachineError(
            "no DVC remote is set, so there is no place to share results through. Add one: "
            "`dvc remote add --default storage s3://BUCKET/PATH`, then "
            "`dvc remote modify storage verify true` (docs/cluster.md)."
        )
    dvc(root, "push", "--run-cache")
    cache = Path(dvc(root, "cache", "dir").strip())
    hashes = sorted(digest for digest in _plain_outputs(root) if _object(cache, digest).is_file())
    with tempfile.TemporaryDirectory(prefix="metaloom-") as scratch:
        overlay = Path(scratch)
        (overlay / ".dvc").mkdir()
        shutil.copyfile(root / ".dvc/config", overlay / ".dvc/config")
        adopt_settings(root, overlay)
        dvc(overlay, "config", "--local", "core.no_scm", "true")
        outs = [{"md5": digest, "hash": "md5", "path": digest} for digest in hashes]
        write_json(overlay / "metrics.dvc", {"outs": outs})  # DVC reads YAML, and JSON is YAML
        dvc(overlay, "push", "metrics.dvc")
    return remote


def adopt_settings(original: Path, folder: Path) -> None:
    """Give a copy of a repository the original's cache, private settings and nearby remotes.

    Settings outside git (`.dvc/config.local`) may hold a secret: the copy is for the owner alone.
    What the copy pulls is always verified: with DVC's default it accepts altered objects.
    """
    private, copy = original / ".dvc/config.local", folder / ".dvc/config.local"
    copy.touch(mode=0o600)
    if private.is_file():
        copy.write_bytes(private.read_bytes())
    dvc(folder, "config", "--local", "cache.dir", dvc(original, "cache", "dir").strip())
    urls = _remotes(original)
    for name in _remotes(folder):
        dvc(folder, "remote", "modify", "--local", name, "verify", "true")
        if name in urls and "://" not in urls[name]:  # a folder, named relative to the original
            dvc(folder, "remote", "modify", "--local", name, "url", urls[name])


def read_lock(root: Path) -> dict[str, list[dict[str, Any]]]:
    """The outputs of every stage in dvc.lock; nothing where there is none."""
    import yaml

    if not (root / LOCK).is_file():
        return {}
    stages = yaml.safe_load((root / LOCK).read_text(encoding="utf-8")).get("stages") or {}
    return {name: list(stage.get("outs", [])) for name, stage in stages.items()}


def _plain_outputs(root: Path) -> Iterator[str]:
    for outs in read_lock(root).values():
        for out in outs:
            if out.get("hash") == "md5" and not out["md5"].endswith(".dir"):
                yield out["md5"]


def _object(cache: Path, digest: str) -> Path:
    return cache / "files/md5" / digest[:2] / digest[2:]


def _remotes(root: Path) -> dict[str, str]:
    """URL of every remote, a folder's absolute. (`dvc remote list` breaks long lines.)"""
    found = {}
    for line in dvc(root, "config", "--list").splitlines():
        key, _, value = line.partition("=")
        if key.startswith("remote.") and key.endswith(".url"):
            found[key.removeprefix("remote.").removesuffix(".url")] = value
    return found
