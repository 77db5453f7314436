from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.algorithms.table import AlgorithmConfig
from pipeline.core.config import Section, load_section, load_value, parse_section
from pipeline.core.errors import ConfigError


class Inner(Section):
    lr: float = 0.1


class Outer(Section):
    inner: Inner = Inner()
    steps: int = 3


@pytest.fixture
def params(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_text("train:\n  steps: 5\n  inner: {lr: 0.5}\n")
    return path


def test_a_section_is_read_and_frozen(params: Path) -> None:
    config = load_section(params, "train", Outer)
    assert config == Outer(steps=5, inner=Inner(lr=0.5))
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 7


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {stepz: 5}", r"stepz: unknown key\. Known keys: inner, steps"),
        ("train: {inner: {rate: 5}}", r"inner\.rate: unknown key\. Known keys: lr"),
        ("train: {steps: many}", r"steps: .*integer.*'many'"),
        ("other: {}", r"no section 'train'.*other"),
        ("train: [", "not valid YAML"),
        ("- 3", "must hold sections"),
    ],
)
def test_a_mistake_is_named(params: Path, text: str, expected: str) -> None:
    params.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_section(params, "train", Outer)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_section(tmp_path / "nowhere.yaml", "train", Outer)


def test_a_wrong_key_of_an_algorithm_lists_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"protonet\.scal: unknown key\. Known keys: scale, batch_norm"
    ):
        parse_section({"protonet": {"scal": 3}}, AlgorithmConfig, where="here")


def test_infinity_is_refused_where_it_is_read(params: Path) -> None:
    params.write_text("train: {inner: {lr: .inf}}")
    with pytest.raises(ConfigError, match=r"inner\.lr: .*finite"):
        load_section(params, "train", Outer)


def test_one_value(params: Path) -> None:
    assert load_value(params, "train.inner.lr", float) == 0.5
    with pytest.raises(ConfigError, match=r"train\.inner\.name must be a str, not None"):
        load_value(params, "train.inner.name", str)
