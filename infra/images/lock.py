"""`python -m infra.images.lock [IMAGE...] [-- PIP'S ARGUMENTS]`: make locks and bills anew.

Versions come from constraints.txt; what is not there keeps the version of the present lock, or with
`--upgrade` becomes what pip finds. Needs an index, and writes down none.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from packaging.utils import canonicalize_name

from infra.images.bill import bill_of
from infra.images.contents import IMAGES, PYTHON, Image
from infra.images.resolve import LockError, Package, resolve
from pipeline.core.errors import PipelineError
from pipeline.core.files import write_bytes

_LINE = re.compile(r"([A-Za-z0-9._-]+)==([^ ;\\]+)(?: ; (.*?))? \\")
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")


def main() -> None:
    """Parse, do, and report a mistake without a traceback."""
    arguments = sys.argv[1:]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(prog="python -m infra.images.lock", description=__doc__)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help=f"of {', '.join(IMAGES)}")
    parser.add_argument("--upgrade", action="store_true", help="forget the present lock")
    asked = parser.parse_args(arguments[:end])
    if unknown := set(asked.images) - set(IMAGES):
        parser.error(f"no such image: {', '.join(sorted(unknown))}; known: {', '.join(IMAGES)}")
    try:
        for name in asked.images or IMAGES:
            packages = make(IMAGES[name], Path.cwd(), arguments[end + 1 :], asked.upgrade)
            print(f"{name}: {len(packages)} packages in {IMAGES[name].lock}")
    except PipelineError as error:
        sys.exit(str(error))


def make(image: Image, root: Path, more: Sequence[str], upgrade: bool = False) -> list[Package]:
    """Resolve an image and write its lock and its bill.

    Raises:
        LockError: pyproject.toml lacks an extra of the image (pip would only warn), or pip fails.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    if missing := set(image.extras) - set(project["optional-dependencies"]):
        raise LockError(f"pyproject.toml has no extra {', '.join(sorted(missing))}.")
    constraints = (root / "constraints.txt").read_text()
    known = {} if upgrade or not image.lock.exists() else read_lock(image.lock.read_text())
    pins = {
        **{name: entry.version for name, entry in known.items()},
        **parse_constraints(constraints),
    }
    pins["torch"] = pins["torch"].partition("+")[0] + image.torch
    packages = resolve(image, root, pins, more)
    bill = bill_of(image, packages)
    write_bytes(image.lock, as_text(image, packages).encode())
    write_bytes(image.bill, bill.encode())
    return packages


def parse_constraints(text: str) -> dict[str, str]:
    """Version by canonical name."""
    pairs = [line.split("==") for line in text.split() if "==" in line]
    return {canonicalize_name(name): version for name, version in pairs}


def as_text(image: Image, packages: Sequence[Package]) -> str:
    """A requirements file for `pip install --require-hashes --no-deps`."""
    machines = ", ".join(image.machines)
    lines = [
        f"# Made by `python -m infra.images.lock {image.name}`; not to be edited.",
        f"# Python {PYTHON} on Linux, {machines}. Extras: {', '.join(image.extras)}.",
    ]
    for package in packages:
        only = " or ".join(f'platform_machine == "{m}"' for m in package.machines)
        marker = "" if package.machines == image.machines else f" ; {only}"
        lines.append(f"{package.name}=={package.version}{marker} \\")
        lines += [f"    --hash=sha256:{one} \\" for one in package.hashes[:-1]]
        lines.append(f"    --hash=sha256:{package.hashes[-1]}")
    return "\n".join(lines) + "\n"


class Entry:
    """One package of a lock."""

    def __init__(self, name: str, version: str, marker: str | None) -> None:
        """Without hashes yet."""
        self.name, self.version, self.marker = name, version, marker
        self.hashes: list[str] = []


def read_lock(text: str) -> Mapping[str, Entry]:
    """Entries by canonical name.

    Raises:
        LockError: a line is none of those that `as_text` writes, or a package has no hash.
    """
    entries: dict[str, Entry] = {}
    last: Entry | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        if match := _LINE.fullmatch(line):
            last = entries[canonicalize_name(match[1])] = Entry(match[1], match[2], match[3])
        elif last is not None and (match := _HASH.fullmatch(line.strip(" \\"))):
            last.hashes.append(match[1])
        else:
            raise LockError(f"line {number} of the lock is no pin and no hash: {line!r}")
    if bare := [entry.name for entry in entries.values() if not entry.hashes]:
        raise LockError(f"the lock has no hash of {', '.join(bare)}")
    return entries


if __name__ == "__main__":
    main()
