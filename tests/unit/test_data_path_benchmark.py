"""The benchmark of the data path runs, and its rows are what they say."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import data_path
from pipeline.core.errors import MachineError
from pipeline.store.reader import open_store


def test_a_short_run_writes_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_path, "_OUT_OF_CACHE", 2**22)
    out = tmp_path / "rows.json"
    with data_path.synthetic_store(3000) as store:
        options = ["--store", str(store), "--sizes", "1000,3000", "--rounds", "5"]
        arguments = [*options, "--seconds", "0.001", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["data_path", *arguments])
        data_path.main()
    rows = [data_path.Row.model_validate(row) for row in json.loads(out.read_text())["rows"]]
    assert len({(row.case, row.engine) for row in rows}) == len(rows)
    for row in rows:
        assert 0 < row.minimum <= row.tasks_per_second <= row.maximum
        assert row.rounds == 5
        assert row.peer == row.engine.startswith("memcpy")
    moved = [row for row in rows if row.bytes_per_second is not None]
    assert len(moved) == 9
    for row in moved:  # 80 pictures of 784 bytes an episode, each read and written
        assert row.bytes_per_second == pytest.approx(row.tasks_per_second * 2 * 80 * 784)
    sized = [row for row in rows if row.store_rows]
    assert sorted(row.store_rows for row in sized) == [1000] * 3 + [3000] * 3
    for row in sized:
        assert 0 < row.open_seconds < 60 and 0 < row.verify_seconds < 60
        assert row.growth_bytes < 2**26


def test_a_synthetic_store_is_a_store_and_is_gone_afterwards() -> None:
    with data_path.synthetic_store(1000) as folder:
        store = open_store(folder)
        assert (store.num_rows, len(store.classes), store.image_shape) == (1000, 50, (1, 28, 28))
    assert not folder.exists()
    with pytest.raises(MachineError, match="Set TMPDIR"), data_path.synthetic_store(10**13):
        pass
