"""Configuration: frozen sections of params.yaml, checked once, where they are read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.core.errors import ConfigError


class Section(BaseModel):
    """Base of every configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )


S = TypeVar("S", bound=Section)
V = TypeVar("V")


def load_section(path: str | Path, name: str, model: type[S]) -> S:
    """Read one section of a params file into its frozen model.

    Raises:
        ConfigError: the file or section is missing, or a key or value is not allowed; the
            message names each place and, for an unknown key, the known ones.
    """
    document = _read_yaml(Path(path))
    if name not in document:
        known = ", ".join(sorted(document)) or "none"
        raise ConfigError(f"{path} has no section {name!r}. Add it; the file has: {known}.")
    return parse_section(document[name], model, where=f"{path}: {name}")


def load_value(path: str | Path, key: str, kind: type[V]) -> V:
    """Read one value of a params file by its dotted key.

    Raises:
        ConfigError: the file or key is missing, or the value is of another type.
    """
    value: Any = _read_yaml(Path(path))
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, kind):
        raise ConfigError(
            f"{path}: {key} must be a {kind.__name__}, not {value!r}. Mend that line."
        )
    return value


def parse_section(values: Any, model: type[S], *, where: str) -> S:
    """Check already parsed values against a section's model; `where` opens the error message.

    Raises:
        ConfigError: a key or value is not allowed.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = [_explain(problem, model) for problem in error.errors()]
        raise ConfigError(f"{where} is not usable:\n  " + "\n  ".join(problems)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml  # here, because workers on bare machines get their configuration as JSON

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist. Run from the top of the repository, where it is kept."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} is not valid YAML: {error}. Mend the line that it names."
        ) from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold sections (`name:` with keys below), not {document!r}.")
    return document


def _explain(problem: Any, model: type[BaseModel]) -> str:
    place = ".".join(str(part) for part in problem["loc"]) or "the section"
    if problem["type"] not in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{place}: {problem['msg']} (got {problem['input']!r})"
    owner = _kind_at(model, problem["loc"][:-1])
    known = ", ".join(_keys(owner)) if owner else "see params.schema.json"
    return f"{place}: unknown key. Known keys: {known}"


def _kind_at(model: type[BaseModel], path: tuple[int | str, ...]) -> type[Any] | None:
    """The nested section or dataclass that a path of keys leads to, if every step is one."""
    kind: type[Any] = model
    for key in path:
        fields = get_type_hints(kind)
        if not isinstance(fields.get(str(key)), type):
            return None
        kind = fields[str(key)]
    return kind if _keys(kind) else None


def _keys(kind: type[Any]) -> list[str]:
    if issubclass(kind, BaseModel):
        return list(kind.model_fields)
    return [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
