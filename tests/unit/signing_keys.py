"""Pairs of keys for tests, made as docs/serving.md has them made: by openssl."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Keys:
    private: Path
    public: Path


def make_keys(folder: Path, name: str = "own", curve: str = "P-256") -> Keys:
    keys = Keys(folder / f"{name}.pem", folder / f"{name}.pub.pem")
    kind = ["-algorithm", "EC", "-pkeyopt", f"ec_paramgen_curve:{curve}"]
    _openssl("genpkey", *kind, "-out", str(keys.private))
    keys.private.chmod(0o600)
    _openssl("pkey", "-in", str(keys.private), "-pubout", "-out", str(keys.public))
    return keys


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
