"""The preprocess stage, run as DVC runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from pipeline.store.reader import open_store
from tests.conftest import REPOSITORY

SETTINGS = {
    "domain": "image_folder",
    "source": "raw",
    "image_size": 16,
    "channels": 3,
    "min_examples_per_class": 4,
}


def run_stage(folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "params.yaml").write_text(yaml.safe_dump({"preprocess": SETTINGS}))
    return subprocess.run(
        [sys.executable, "-m", "stages.preprocess"],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "METALOOM_TRACKING": "off"},
    )  # fmt: skip


def test_the_stage_writes_a_store_its_counts_and_a_summary(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(8):
        folder = tmp_path / "raw" / f"class{index}"
        folder.mkdir(parents=True)
        for example in range(4):
            pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{example}.png")
    (tmp_path / "raw" / "class0" / "notes.txt").write_text("not a picture")
    result = run_stage(tmp_path)
    assert result.returncode == 0, result.stderr
    store = open_store(tmp_path / "data/store/image_folder")
    counts = json.loads((tmp_path / "results/preprocess/metrics.json").read_text())
    told = counts["image_folder"]
    assert told["train_pictures"] + told["val_pictures"] + told["test_pictures"] == 32
    assert store.num_rows == 32
    assert told["dropped_pictures"] == 1
    assert (
        "dropped pictures: 1 - neither PNG nor JPEG, e.g. class0: class0/notes.txt" in result.stdout
    )
    assert (
        json.loads((store.folder / "report.json").read_text())["kept"]["train"]["pictures"]
        == (told["train_pictures"])
    )


def test_a_missing_source_is_one_sentence_and_not_a_traceback(tmp_path: Path) -> None:
    result = run_stage(tmp_path)
    assert result.returncode == 1
    assert "error: raw is neither a folder nor a zip." in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "data/store/image_folder").exists()
