"""The first step of an image's build: do its arguments say what is built, and on what?

Standard library only: it runs in the bare base image.
"""

import os
import re
import sys

PYTHON = (3, 11)  # of the lock
SAFE = 13  # 3.11.13; before it a tar archive may write outside its folder (CVE-2025-4517)


def complaint(base: str, revision: str, version: tuple[int, int, int]) -> str | None:
    """What is wrong with the arguments, and how to mend it; None if nothing is."""
    if not re.fullmatch(r".+@sha256:[0-9a-f]{64}", base):
        return f"BASE is {base!r}: name it by digest, --build-arg BASE=python@sha256:..."
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        return (
            f"REVISION is {revision!r}: give the commit, --build-arg REVISION=$(git rev-parse HEAD)"
        )
    if version[:2] != PYTHON:
        return f"BASE has Python {version[0]}.{version[1]}; the lock is of {PYTHON[0]}.{PYTHON[1]}."
    if version[2] < SAFE:
        return f"BASE has Python 3.11.{version[2]}: CVE-2025-4517 is mended in 3.11.{SAFE}."
    return None


if __name__ == "__main__":
    here = (sys.version_info[0], sys.version_info[1], sys.version_info[2])
    sys.exit(complaint(os.environ.get("BASE", ""), os.environ.get("REVISION", ""), here))
