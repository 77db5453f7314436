"""A release in words, for the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from pipeline.evaluation.order import by_size


def summary(record: Mapping[str, Any], numbers: Mapping[str, Any], command: str) -> str:
    """What was promoted, how good it is, and how to go on; at most 80 columns."""
    version, decision = record["version"], record["decision"]
    names = ", ".join(f"@{a}" for a, number in record["aliases"].items() if number == version)
    lines = [f"{record['model']} version {version}: {names or 'registered, serves under no alias'}"]
    lines += [f"  {line}" for line in _wrapped(decision["reason"])]
    for setting, found in by_size(numbers):
        others = ", ".join(
            f"{name} {other['accuracy']:.1%}" for name, other in found.get("baselines", {}).items()
        )
        interval = f"{found['accuracy']:.2%} ± {found['ci95']:.2%}"
        lines.append(f"  {setting:<6} {interval}" + (f"  ({others})" if others else ""))
    return "\n".join(
        [
            *lines,
            "",
            "Go on with:",
            f"  {command + ' report --open':<34} the report: curves, episodes, mistakes",
            f"  {command + ' ui':<34} MLflow: runs and model versions",
            f"  {command + ' serve':<34} answers on http://127.0.0.1:5001",
        ]
    )


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, width=76, break_on_hyphens=False)
