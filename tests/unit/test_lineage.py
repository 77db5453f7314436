"""A version can be walked back to all it came from, and from any of that to the version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import RegistryError
from pipeline.deploy.lineage import (
    FIELDS,
    SHORTEST_PREFIX,
    as_text,
    come_from,
    missing,
    of_version,
    source_tags,
)
from pipeline.deploy.registry import Version
from pipeline.runtime.lineage import file_hash

HEX = st.text("0123456789abcdef", min_size=12, max_size=40)
TAGS = st.fixed_dictionaries(
    {
        "git.commit": HEX,
        "dvc.lock": HEX,
        "store.digest": HEX,
        "metaloom.bundle": HEX,
        "run.training": HEX,
        "episodes": st.dictionaries(st.sampled_from(["5w1s", "5w5s"]), HEX).map(json.dumps),
        "data": st.dictionaries(st.just("data/raw"), HEX).map(json.dumps),
    }
)


def version_of(number: int, tags: dict[str, str]) -> Version:
    return Version("m", number, tags, "somewhere", f"{number:032x}")


@given(tags=st.lists(TAGS, min_size=1, max_size=5), data=st.data())
def test_any_beginning_of_anything_leads_back(
    tags: list[dict[str, str]], data: st.DataObject
) -> None:
    """Against the plain thing: every value of every version, compared character by character."""
    versions = [version_of(number, one) for number, one in enumerate(tags, start=1)]
    values = [
        (number, value)
        for number, one in enumerate(tags, start=1)
        for text in one.values()
        for value in (json.loads(text).values() if text.startswith("{") else [text])
    ]
    _, whole = data.draw(st.sampled_from(values))
    asked = whole[: data.draw(st.integers(SHORTEST_PREFIX, len(whole)))]
    found = {(one.version, one.value) for one in come_from(versions, asked.upper())}
    runs = {(v.number, v.run_id) for v in versions if str(v.run_id).startswith(asked)}
    assert found == {(n, v) for n, v in values if v[: len(asked)] == asked} | runs


def test_what_is_not_recorded_is_named_and_never_made_up() -> None:
    tags = {"git.commit": "none", "dvc.lock": "absent", "store.digest": "1" * 64}
    lineage = of_version(version_of(3, tags))
    assert set(missing(lineage)) == set(FIELDS) - {"store"}
    text = as_text({**lineage, "aliases": [], "promotions": []})
    assert "git commit: not recorded" in text and f"store: {'1' * 64}" in text
    with pytest.raises(RegistryError, match="neither the number of a version nor 7 or more"):
        come_from([], "123abc")


def test_seeds_settings_and_raw_data_are_read_from_the_repository(tmp_path: Path) -> None:
    assert set(source_tags(tmp_path)) == {
        *("git.commit", "git.dirty", "code.hash", "dvc.lock", "params.hash"),
    }
    params = {"meta_train": {"seed": 3, "rate": 0.5}, "deploy": {"gate": {"seed": 4}}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    deps = [{"path": "pipeline/core", "md5": "c"}, {"path": "data/raw", "md5": "d" * 32}]
    (tmp_path / "dvc.lock").write_text(yaml.safe_dump({"stages": {"preprocess": {"deps": deps}}}))
    tags = source_tags(tmp_path)
    assert json.loads(tags["seeds"]) == {"meta_train.seed": "3", "deploy.gate.seed": "4"}
    assert json.loads(tags["data"]) == {"data/raw": "d" * 32}
    assert json.loads(tags["config"])["meta_train.rate"] == "0.5"
    assert tags["dvc.lock"] == file_hash(tmp_path / "dvc.lock")
