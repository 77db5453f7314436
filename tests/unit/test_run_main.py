"""How a command ends when the disk does not take what it writes."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from pipeline.runtime.logs import run_main


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_refuses_is_told_of_without_a_traceback(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise OSError(number, os.strerror(number), "/some/where")

    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert ended.value.code == 74
    told = capsys.readouterr().err
    assert told.startswith("error: cannot write into /some/where: ") and "Free some space" in told


def test_a_full_device_is_met_for_real(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        Path("/dev/full").write_text("x")

    with pytest.raises(SystemExit) as ended:
        run_main(main)
    assert ended.value.code == 74 and "No space left" in capsys.readouterr().err


def test_other_faults_of_the_system_are_not_hidden() -> None:
    def main() -> None:
        Path("/nowhere/at/all").read_text()

    with pytest.raises(FileNotFoundError):
        run_main(main)
