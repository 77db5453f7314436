"""What the data of a retraining are, and how they differ from those of the last one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cluster.commands import dvc, git, try_git
from pipeline.cluster.retrain.start import TRACKED
from pipeline.core.config import load_value
from pipeline.core.errors import DataError, MachineError
from pipeline.core.files import canonical_json, read_json, sha256_bytes, sha256_file

DATA = "results/retrain/data.json"
"""In the commit of every retraining: the classes that it learned from, with their sizes."""
INPUTS = "Inputs"
"""Trailer of that commit: the digest of all that the pipeline computes from."""
BRANCHES = "retrain"
_LOOK_BACK = 400
"""Merged nights that are looked at: more than a year of them."""
_CODE = ("pipeline/", "stages/", "dvc.yaml", "constraints.txt")
_PARAMS = "params.yaml"
POLICY = "retrain"
"""Its section of params.yaml says when to retrain: no model depends on it."""
_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Inputs:
    """What a run computes from, by digest."""

    code: str
    """Of the pipeline's code and parameters."""
    data: str
    """Of what DVC and git keep of the raw data."""

    @property
    def digest(self) -> str:
        """Of both."""
        return sha256_bytes(f"{self.code} {self.data}".encode())


def update_imports(folder: Path) -> list[str]:
    """`dvc update` of what was imported (`dvc import-url`, `dvc import`); returns what changed.

    Raises:
        DataError: a source does not answer.
    """
    imports = [name for name in _tracked(folder) if _is_import(folder / name)]
    before = {name: (folder / name).read_bytes() for name in imports}
    if imports:
        try:
            dvc(folder, "update", "--", *imports)
        except MachineError as error:
            raise DataError(
                f"{', '.join(imports)}: the source of these data does not answer. Nothing was "
                f"changed; run the same command again when it does.\n{error}"
            ) from None
    return [name for name in imports if (folder / name).read_bytes() != before[name]]


def inputs_of(folder: Path) -> Inputs:
    """The digests of a working tree as it is now; outputs, pages and tests do not count."""
    import yaml

    names = [name for name in git(folder, "ls-files", "-z").split("\0") if name]
    source = Path(load_value(folder / "params.yaml", "preprocess.source", str))
    code = [name for name in names if name.startswith(_CODE)]
    data = [name for name in names if name.endswith(".dvc") or source in Path(name).parents]
    data = [name for name in data if name != TRACKED]  # another champion is nothing to learn from
    if source.is_absolute():  # read where it lies, and no commit knows what lies there
        data += [path.as_posix() for path in [source, *source.rglob("*")]]
    params = yaml.safe_load((folder / _PARAMS).read_text(encoding="utf-8"))
    settings = canonical_json({k: v for k, v in params.items() if k != POLICY})
    return Inputs(
        code=sha256_bytes(f"{_digest(folder, code)} {settings}".encode()),
        data=_digest(folder, data, of=_content),
    )


def describe(folder: Path, inputs: Inputs) -> dict[str, Any]:
    """The store's classes, for a later comparison; call it when `preprocess` has run."""
    domain = load_value(folder / "params.yaml", "preprocess.domain", str)
    columns = read_json(folder / "data/store" / domain / "manifest.json")["classes"]
    rows = zip(*(columns[key] for key in ("name", "group", "split", "count")), strict=True)
    several = len(set(columns["group"])) > 1  # then a name may occur in two of them
    classes = {
        f"{group}/{name}" if several else name: {"group": group, "split": split, "examples": count}
        for name, group, split, count in rows
    }
    digests = {"code": inputs.code, "data": inputs.data}
    return {"domain": domain, "inputs": digests, "classes": classes}


def compare(now: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """What came, what went, and which classes grew; everything is new where nothing is before."""
    new = now["classes"]
    same_domain = before is not None and before["domain"] == now["domain"]
    old = before["classes"] if before is not None and same_domain else {}
    grown = {
        name: one["examples"] - old.get(name, {"examples": 0})["examples"]
        for name, one in new.items()
    }
    return {
        "compared": bool(old),
        "new_examples": {
            split: sum(max(n, 0) for name, n in grown.items() if new[name]["split"] == split)
            for split in _SPLITS
        },
        "lost_examples": sum(max(-n, 0) for n in grown.values())
        + sum(one["examples"] for name, one in old.items() if name not in new),
        "new_classes": sorted(set(new) - set(old)),
        "lost_classes": sorted(set(old) - set(new)),
        "moved_classes": sorted(
            name for name in set(new) & set(old) if new[name]["split"] != old[name]["split"]
        ),
        "splits": {
            split: {"before": _size(old, split), "now": _size(new, split)} for split in _SPLITS
        },
    }


def earlier(root: Path, commit: str) -> Iterator[tuple[str, str]]:
    """Earlier retrainings and their inputs, the newest first: branches, here and on the remotes.

    Then those that were merged into a commit: their branches may have been deleted since.
    """
    form = f"%(refname)%00%(contents:trailers:key={INPUTS},valueonly,separator=)"
    places = [f"refs/heads/{BRANCHES}", f"refs/remotes/*/{BRANCHES}/*"]
    listed = git(root, "for-each-ref", "--sort=-committerdate", f"--format={form}", *places)
    form = f"--format=%H%x00%(trailers:key={INPUTS},valueonly,separator=)"
    merged = git(root, "log", f"--grep=^{INPUTS}: ", f"--max-count={_LOOK_BACK}", form, commit)
    for line in [*listed.splitlines(), *merged.splitlines()]:
        name, _, inputs = line.partition("\0")
        if inputs.strip():
            yield name, inputs.strip()


def recorded(root: Path, reference: str, name: str) -> dict[str, Any] | None:
    """A JSON file of a commit; None where that has none."""
    shown = try_git(root, "show", f"{reference}:{name}")
    if shown.returncode != 0:
        return None
    found: dict[str, Any] = json.loads(shown.stdout)
    return found


def _size(classes: dict[str, Any], split: str) -> dict[str, int]:
    counts = [one["examples"] for one in classes.values() if one["split"] == split]
    return {"classes": len(counts), "examples": sum(counts)}


def _tracked(folder: Path) -> list[str]:
    return [name for name in git(folder, "ls-files", "-z").split("\0") if name.endswith(".dvc")]


def _is_import(path: Path) -> bool:
    import yaml

    return bool((yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("deps"))


def _digest(folder: Path, names: list[str], of: Callable[[Path], str] = sha256_file) -> str:
    files = {name: folder / name for name in names}
    hashes = {
        name: of(path) for name, path in files.items() if path.is_file() and not path.is_symlink()
    }
    return sha256_bytes(canonical_json(hashes).encode())


def _content(path: Path) -> str:
    """Of a file; of a `.dvc` file what its outputs are, which the same bytes sent again leave.

    The rest of it (the source's etag, sizes, versions, words) changes without them.
    """
    if path.suffix != ".dvc":
        return sha256_file(path)
    import yaml

    known = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    outs = known.get("outs") or []
    if not all(out.get("md5") for out in outs):
        return sha256_file(path)
    return sha256_bytes(canonical_json(sorted((out["path"], out["md5"]) for out in outs)).encode())
