"""Raw data to a store: `python -m stages.preprocess`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.core.config import load_section
from pipeline.core.files import write_json
from pipeline.runtime.logs import progress, run_main
from pipeline.runtime.tracking import stage_run
from pipeline.store.build import PreprocessConfig, build_store


def main() -> None:
    config = load_section("params.yaml", "preprocess", PreprocessConfig)
    target = Path("data/store") / config.domain
    inputs = {"raw": config.source} if config.source.exists() else {}
    with stage_run("preprocess", config, inputs=inputs, outputs=[target]) as run:
        report = build_store(config, target, progress=progress)
        counts = _counts(report)
        run.log({name: float(count) for name, count in counts.items()})
        write_json("results/preprocess/metrics.json", {config.domain: counts})
    print(_summary(report, target))


def _counts(report: dict[str, Any]) -> dict[str, int]:
    kept = {
        f"{split}_{unit}": entry[unit]
        for split, entry in report["kept"].items()
        for unit in ("classes", "pictures")
    }
    return {
        **kept,
        **{
            kind: sum(entry["count"] for entry in report[kind].values())
            for kind in ("dropped_pictures", "dropped_classes", "converted_pictures")
        },
    }


def _summary(report: dict[str, Any], target: Path) -> str:
    lines = [f"{target} holds:"]
    for split, entry in report["kept"].items():
        groups = ", ".join(entry["groups"][:4]) + (", ..." if len(entry["groups"]) > 4 else "")
        lines.append(
            f"  {split:5} {entry['classes']:5} classes {entry['pictures']:7} pictures ({groups})"
        )
    for kind in ("dropped_classes", "dropped_pictures", "converted_pictures", "notes"):
        for reason, entry in report[kind].items():
            example = entry["first"][0]
            lines.append(f"  {kind.replace('_', ' ')}: {entry['count']} - {reason}, e.g. {example}")
    lines.append(f"More in {target / 'report.json'}.")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
