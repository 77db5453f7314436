"""Raw data for a clone: from git and DVC, or from an absolute path; never from a folder by chance.

A run of a commit must be repeatable from the commit. Files that lie in the original's data/raw and
are known to nobody else would be lost with that folder, so they are refused, by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pipeline.cluster.commands import dvc, git
from pipeline.core.config import load_value
from pipeline.core.errors import DataError, MachineError


def bring_raw_data(root: Path, clone: Path, remote: str | None) -> Iterator[str]:
    """Bring what DVC tracks; say where other raw data are read from.

    Raises:
        DataError: DVC cannot bring what it tracks, or the source holds what nobody tracks.
    """
    tracked = [n for n in git(clone, "ls-files", "-z").split("\0") if n.endswith(".dvc")]
    if tracked:
        try:
            dvc(clone, "pull" if remote else "checkout", "--", *tracked)
        except MachineError as error:
            raise DataError(
                f"the data of {', '.join(tracked)} cannot be brought here. Where they are, run "
                f"`dvc push`.\n{error}"
            ) from None
    source = PurePosixPath(load_value(clone / "params.yaml", "preprocess.source", str))
    if source.is_absolute():
        yield f"raw data are read where they lie: {source}"
    elif ".." in source.parts:
        raise DataError(
            f"preprocess.source leads out of the repository: {source}. A clone lies elsewhere; "
            "write an absolute path into params.yaml."
        )
    elif not any(_overlap(source, PurePosixPath(n.removesuffix(".dvc"))) for n in tracked):
        _refuse_unknown(root, clone, source)


def _overlap(one: PurePosixPath, other: PurePosixPath) -> bool:
    return one == other or one in other.parents or other in one.parents


def _refuse_unknown(root: Path, clone: Path, source: PurePosixPath) -> None:
    unknown = sorted(_files(root / source) - _files(clone / source))
    if unknown:
        first = source / unknown[0].split("/")[0] if unknown[0] else source
        raise DataError(
            f"{source} holds {len(unknown)} files that neither git nor DVC keeps, such as "
            f"{source / unknown[0]}; a run of the commit could not be repeated without them. "
            f"Let DVC keep them (`dvc add {first}`, then commit {first}.dvc), or set "
            "preprocess.source to an absolute path: such data are read where they lie."
        )


def _files(path: Path) -> set[str]:
    """Names of the files of a folder, but for hidden ones; a single file is itself."""
    if path.is_file():
        return {""}
    names = (f.relative_to(path) for f in path.rglob("*") if f.is_file())
    return {n.as_posix() for n in names if not any(part.startswith(".") for part in n.parts)}
