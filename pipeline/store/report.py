"""The report of a store: what was kept, and what was dropped or changed, by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipeline.domains.base import SPLITS, Plan
from pipeline.store.reader import StoredClass

_NUM_SHOWN = 10


class Report:
    """Collects reasons; names come in the order in which they are told."""

    def __init__(self, plan: Plan) -> None:
        self._facts = dict(plan.facts)
        self._dropped = {reason: list(names) for reason, names in plan.dropped.items()}
        self._dropped_classes = {r: list(names) for r, names in plan.dropped_classes.items()}
        self._class_pictures: Counter[str] = Counter()
        self._converted = {reason: list(names) for reason, names in plan.converted.items()}
        self._notes: dict[str, list[str]] = {}

    def drop(self, reason: str, name: str) -> None:
        """A picture is not stored."""
        self._dropped.setdefault(reason, []).append(name)

    def drop_class(self, reason: str, name: str, num_pictures: int) -> None:
        """A class is not stored, nor the pictures that it still had."""
        self._dropped_classes.setdefault(reason, []).append(name)
        self._class_pictures[reason] += num_pictures

    def convert(self, reason: str, name: str) -> None:
        """A picture is stored, but had to be changed."""
        self._converted.setdefault(reason, []).append(name)

    def note(self, reason: str, name: str) -> None:
        """A picture is stored as it is, but somebody might want to know."""
        self._notes.setdefault(reason, []).append(name)

    def sentence(self) -> str:
        """Everything dropped, in one line."""
        parts = [f"{len(v)} pictures ({k})" for k, v in sorted(self._dropped.items()) if v]
        parts += [f"{len(v)} classes ({k})" for k, v in sorted(self._dropped_classes.items()) if v]
        return ", ".join(parts) or "nothing"

    def summary(self, domain: str, classes: Sequence[StoredClass]) -> dict[str, Any]:
        """The report as JSON."""
        kept = {
            split: {
                "classes": sum(c.split == split for c in classes),
                "pictures": sum(c.count for c in classes if c.split == split),
                "groups": sorted({c.group for c in classes if c.split == split}),
            }
            for split in SPLITS
        }
        return {
            "domain": domain,
            "facts": self._facts,
            "kept": kept,
            "dropped_pictures": _counted(self._dropped),
            "dropped_classes": {
                reason: {**entry, "pictures": self._class_pictures[reason]}
                for reason, entry in _counted(self._dropped_classes).items()
            },
            "converted_pictures": _counted(self._converted),
            "notes": _counted(self._notes),
        }


def _counted(names: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    return {
        reason: {"count": len(entries), "first": entries[:_NUM_SHOWN]}
        for reason, entries in sorted(names.items())
        if entries
    }
