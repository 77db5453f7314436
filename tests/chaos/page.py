"""`results/chaos.json` for people: `python -m tests.chaos.page` writes docs/chaos.md."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pipeline.core.files import read_json
from tests.chaos.campaign import RESULTS

PAGE = Path("docs/chaos.md")
_HEAD = """\
# Faults tried and survived

From `results/chaos.json`, which `make chaos SIZE=full` writes; this page by `python -m
tests.chaos.page`. A try whose fault came before any progress would have failed its campaign, and so
would other bits than an undisturbed run's, or more lost steps than the campaign allows (for kills:
the 12 steps between two checkpoints). Seconds are from the fault until the next new step, on two cores
that ran other work too; noticed is the longest time until the log said that something was wrong (at a SIGSTOP
4 seconds are the timeout). A campaign takes hours and is run in parts: each row names its commit. Rows
of Ray without a number of lost steps are older than its count: the journal that they were counted by is
filled at checkpoints alone.

| fault | tries | survived | bits equal | most steps lost | seconds, median | at most | noticed | commit |
|---|---:|---:|---:|---:|---:|---:|---:|---|
"""


def render(rows: list[dict[str, Any]]) -> str:
    """Markdown: one row a fault."""
    lines = []
    for row in rows:
        equal, lost = row["bits_equal"], row["steps_lost"]
        numbers = [row["tries"], row["survived"], equal, lost]
        seconds = [row.get("median_seconds"), row.get("most_seconds")]
        seconds.append(row.get("most_seconds_to_notice"))
        cells = ["" if n is None else f"{n:,}" for n in numbers]
        cells += ["" if s is None else f"{s:.1f}" for s in seconds]
        lines.append(f"| {row['fault']} | {' | '.join(cells)} | {row['commit']} |")
    useful = [f"{row['fault']} {row['goodput']:.1%}" for row in rows if "goodput" in row]
    if useful:
        lines.append(f"\nTime that was useful (F13: at least 90 %): {', '.join(useful)}.")
    return _HEAD + "\n".join(lines) + "\n"


def main() -> None:
    """Write the page from the rows of one size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--size", default="full", choices=["ci", "full"])
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    rows = [row for row in read_json(options.results)["rows"] if row["size"] == options.size]
    options.page.write_text(render(rows))
    print(f"wrote {options.page}: {len(rows)} faults")


if __name__ == "__main__":
    main()
