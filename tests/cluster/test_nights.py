"""The three nights of docs/retraining.md, in a fresh clone, with the real pipeline."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.dvc_machines import environment, succeed
from tests.e2e import test_pipeline as e2e

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_new_letters_are_promoted_and_wrong_labels_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(e2e, "SLICE", {})
    folder, letters = tmp_path / "clone", tmp_path / "letters"
    folder.mkdir()
    e2e.fresh_clone(folder)
    env = environment(folder, {})
    python = sys.executable

    def draw(night: str) -> None:
        succeed(folder, env, python, "-m", "examples.nights", night, str(letters))

    def retrain() -> dict[str, Any]:
        said = succeed(folder, env, python, "-m", "pipeline.cli", "retrain", "--local", "--json")
        found: dict[str, Any] = json.loads(said)
        return found

    draw("begin")
    succeed(folder, env, "dvc", "import-url", "--no-download", str(letters), "data/raw/letters")
    e2e.commit(folder, "letters")
    first = retrain()
    assert (first["state"], first["model"]["version"]) == ("promoted", 1)
    draw("more")
    second = retrain()
    assert (second["state"], second["model"]["version"]) == ("promoted", 2), second["reason"]
    assert len(second["data"]["new_classes"]) == 52
    accuracies = [night["metrics"]["5w1s"]["accuracy"] for night in (first, second)]
    assert accuracies[1] > accuracies[0]
    draw("poison")
    third = retrain()
    assert (third["state"], third["model"]["aliases"]) == ("not_promoted", ["challenger"])
    beaten = [rule for rule in third["rules"] if rule["rule"] == "beats_champion"]
    assert beaten and not any(rule["passed"] for rule in beaten)
    fourth = retrain()
    assert (fourth["state"], fourth["branch"]) == ("no_change", third["branch"])
    page = succeed(folder, env, "git", "show", f"{third['branch']}:results/retrain/report.md")
    assert "not promoted" in page and "against the champion" in page
