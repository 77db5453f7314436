"""HTML and SVG from nested calls; every text is escaped unless it was built here."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable
from typing import TypeAlias


class Markup(str):
    """Text that is markup already and is not escaped again."""

    __slots__ = ()


Child: TypeAlias = "str | int | Iterable[Child] | None"
Attribute: TypeAlias = str | float | bool | None

_VOID = {"img", "meta", "br", "line", "circle", "rect", "path", "polyline", "polygon"}


def tag(name: str, /, *children: Child, **attributes: Attribute) -> Markup:
    """One element. `class_` means class, other underscores become dashes, None leaves it out."""
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Child) -> Markup:
    """Children one after the other, escaped where they are plain text."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, str | int):
        return Markup(html.escape(visible(str(children))))
    return Markup("".join(join(child) for child in children))


def visible(text: str) -> str:
    """Text without control characters, which HTML forbids, and without those that turn its order.

    A class name may hold both. The two joiners stay: words and emoji are written with them.
    """
    return "".join(c if _is_visible(c) else "\N{REPLACEMENT CHARACTER}" for c in text)


def _is_visible(character: str) -> bool:
    kept = "\n\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}"
    return character in kept or unicodedata.category(character) not in {"Cc", "Cf", "Cs"}


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    if isinstance(value, float):
        value = f"{value:.2f}".rstrip("0").rstrip(".")
    name = key.rstrip("_").replace("_", "-")
    name = "viewBox" if name == "viewbox" else name
    return f' {name}="{html.escape(visible(str(value)), quote=True)}"'
