"""The other parts of docs/results.md: accuracy on Omniglot and the data path, from their JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.core.files import read_json

ACCURACY, DATA_PATH = (Path(f"benchmarks/results/{n}.json") for n in ("omniglot", "data_path"))
CURVES = Path("docs/images/omniglot.png")

_ACCURACY = """\
## Accuracy on Omniglot

From `{record}`, made by `python -m benchmarks.omniglot`. Vinyals split (`{split}`):
{train:,} classes to train on, which are characters in four rotations, shifted by up to two pixels;
{val} to validate and {test} to test, as they are. 28x28, Conv4-64, inductive batch norm, one model,
{episodes:,} test episodes of 15 queries a class, mean and 95 % interval (1.96 s / √n). Validation
chose the step of each run. ProtoNet's settings were changed once, after an earlier run had been
scored (docs/log.md).
"""
_DATA = """\
## Data path

From `{record}`, made by `python -m benchmarks.data_path` on {machine}: medians, with the least and
the most. Gathering is compared with a plain copy of as many bytes, read plus written; pictures of
28x28 in grey are 784 bytes each, scattered over the store.
"""


def render_accuracy(document: dict[str, Any], record: Path, picture: Path) -> str:
    """Markdown: one row a run and setting."""
    rows = document["rows"]
    episodes = max(test["episodes"] for row in rows for test in row["test"].values())
    split = document["split_hash"][:8]
    lines = [
        _ACCURACY.format(record=record, episodes=episodes, split=split, **document["classes"]),
        "| run | precision | start | training tasks | setting | accuracy |",
        "|---|---|---|---:|---|---:|",
    ]
    for row in rows:
        for setting, test in row["test"].items():
            accuracy = f"{100 * test['accuracy']:.2f} ± {100 * test['ci95']:.2f} %"
            start = "pre-trained" if row["pretrained"] else "fresh weights"
            told = f"| {row['run']} | {row['precision']} | {start} | {row['tasks']:,} "
            lines.append(f"{told}| {setting} | {accuracy} |")
    return "\n".join([*lines, "", f"![Validation accuracy over training tasks]({picture})"])


def render_data_path(document: dict[str, Any], record: Path) -> str:
    """Markdown: one row a case and contestant."""
    lines = [
        _DATA.format(record=record, machine=document["machine"]),
        "| case | contestant | episodes/s | least to most | GB/s |",
        "|---|---|---:|---:|---:|",
    ]
    for row in document["rows"]:
        moved = row["bytes_per_second"]
        gigabytes = "" if moved is None else f"{moved / 1e9:.1f}"
        spread = f"{row['minimum']:,.0f} to {row['maximum']:,.0f}"
        lines.append(
            f"| {row['case']} | {row['engine']} | {row['tasks_per_second']:,.0f} | {spread} "
            f"| {gigabytes} |"
        )
    return "\n".join([*lines, *_openings(document["rows"])])


def _openings(rows: list[dict[str, Any]]) -> list[str]:
    """What opening a store of each size takes, and what using it adds."""
    stores = {row["store_rows"]: row for row in rows if row.get("open_seconds") is not None}
    if not stores:
        return []
    lines = ["", "| rows of the store | opened in | memory of its index | more while it is used |"]
    lines.append("|---:|---:|---:|---:|")
    for size, row in sorted(stores.items()):
        memory = f"{row['open_bytes'] / 1e6:.0f} MB | {row['growth_bytes'] / 1e6:.1f} MB"
        lines.append(f"| {size:,} | {row['open_seconds']:.3f} s | {memory} |")
    return [
        *lines,
        "",
        "The index holds classes, here one for every 20 rows; pictures stay on disk.",
    ]


def other_sections(page: Path) -> list[str]:
    """Those whose record is there."""
    parts = []
    if ACCURACY.exists():
        picture = CURVES.relative_to(page.parent)
        parts.append(render_accuracy(read_json(ACCURACY), ACCURACY, picture))
    if DATA_PATH.exists():
        parts.append(render_data_path(read_json(DATA_PATH), DATA_PATH))
    return parts


def draw_curves(rows: list[dict[str, Any]], target: Path) -> None:
    """Validation accuracy over training tasks, one line a run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
    for row, colour in zip(rows, ("#1a6fb5", "#c4622d", "#e0a53a", "#5b8c3a"), strict=False):
        xs = [step * row["tasks_per_step"] for step, _ in row["curve"]]
        ys = [100 * accuracy for _, accuracy in row["curve"]]
        axes.plot(xs, ys, "o-", markersize=3.5, linewidth=1.6, color=colour, label=row["run"])
    axes.set_xlabel("training tasks", fontsize=8)
    axes.set_ylabel("validation accuracy, 5-way 1-shot, %", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110, metadata={"Software": None})
    plt.close(figure)
