"""A step that a guard refused, computed again item by item: what `metaloom replay` shows.

V values: all parameters as one vector. T items of a group.
"""

from __future__ import annotations

import importlib
import math
import textwrap
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pipeline.core.config import Section, parse_section
from pipeline.core.errors import ArtefactError, DataError
from pipeline.core.files import read_json, verify
from pipeline.core.types import Params
from pipeline.runtime.context import Context, fingerprint, make_deterministic
from pipeline.runtime.lineage import code_hash, code_root, content_hash
from pipeline.training.incidents import KIND, RECORD, WEIGHTS, Incident, IncidentRecord, plain
from pipeline.training.programs import Program
from pipeline.training.state import flatten, unflatten
from pipeline.training.steps import mean_norm

_OURS = "pipeline."
_WIDTH = 79


def replay(folder: Path) -> dict[str, Any]:
    """Compute the groups of a kept incident again, on this machine.

    Returns:
        What happened, whether code and machine are those of that time, and for every group its
        numbers beside the recorded ones and its items, each with its own loss and gradient.

    Raises:
        ArtefactError: the folder was altered, or holds no incident of this version.
        DataError: the store, the tasks or the weights that the run read are not these any more.
    """
    record = _read(folder)
    job = _job(record, folder)
    _check_inputs(record, job)
    make_deterministic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    context = Context(rank=0, world_size=1, device=device)
    program, start = importlib.import_module(record.entry).program(job, context, record.engine)
    vector = safetensors.torch.load_file(folder / WEIGHTS)["vector"].to(device)
    params = unflatten(vector, start)
    found = record.incident
    groups = [_group(program, params, found, place) for place in range(len(found.groups))]
    return {
        "kind": found.kind,
        "step": found.step,
        "position": found.position,
        "unit": found.unit,
        "gradient_norm_of_all_groups": found.norm,
        "bit_equal": all(group["bit_equal"] for group in groups),
        "same_code": record.code == code_hash(code_root()),
        "same_machine": record.machine == fingerprint()["id"],
        "groups": groups,
    }


def as_text(told: dict[str, Any]) -> str:
    """What `replay` found, for people; at most 80 columns."""
    lines = textwrap.wrap(
        f"{told['kind']} at step {told['step']} (meta-batch {told['position']}); the gradient of "
        f"all groups had norm {_short(told['gradient_norm_of_all_groups'])}.",
        _WIDTH,
    )
    for group in told["groups"]:
        lines += ["", *_group_lines(group)]
    lines.append("")
    if told["bit_equal"]:
        lines.append("All numbers are those of the run, bit for bit.")
    else:
        lines += textwrap.wrap(f"Not the run's numbers: {_why_not(told)}.", _WIDTH)
    return "\n".join(lines)


def _read(folder: Path) -> IncidentRecord:
    if not folder.is_dir():
        raise ArtefactError(
            f"there is no folder {folder}. A run's log names the folder of its incident after "
            "`metaloom replay`; they are in .metaloom/incidents."
        )
    manifest = verify(folder)
    if manifest.get("kind") != KIND or set(manifest["files"]) != {RECORD, WEIGHTS}:
        raise ArtefactError(
            f"{folder} holds no incident. Name a folder that a run's log names after `metaloom "
            "replay`; they are in .metaloom/incidents."
        )
    return parse_section(read_json(folder / RECORD), IncidentRecord, where=str(folder / RECORD))


def _job(record: IncidentRecord, folder: Path) -> Section:
    """The run's job; by names of this package alone, and nothing in the folder is executed."""
    module, _, name = record.job_type.partition(":")
    if not (module.startswith(_OURS) and record.entry.startswith(_OURS)):
        raise ArtefactError(
            f"{folder} names code outside this package ({record.job_type}, {record.entry}), which "
            "is not run. Replay it where that program is, by its own means."
        )
    try:
        kind = getattr(importlib.import_module(module), name, None)
        known = hasattr(importlib.import_module(record.entry), "program")
    except ImportError:
        kind, known = None, False
    if not (known and isinstance(kind, type) and issubclass(kind, Section)):
        raise ArtefactError(
            f"{folder} is of a program ({record.entry}) that this version does not have. Replay it "
            "with the version that ran it."
        )
    return parse_section(record.job, kind, where=f"{folder}: job")


def _check_inputs(record: IncidentRecord, job: Section) -> None:
    for name, then in record.inputs.items():
        path: Path = getattr(job, name)
        now = content_hash(path)
        if now is None:
            raise DataError(
                f"{path} ({name} of the run) is not here. Run this from the top of the repository "
                "that ran it, and bring the data back: `dvc checkout`."
            )
        if now != then:
            raise DataError(
                f"{path} ({name} of the run) has changed since, so that the same places of the "
                "stream are other items now. Bring back what the run read: check out its commit, "
                "then `dvc checkout`."
            )


def _group(program: Program, params: Params, found: Incident, place: int) -> dict[str, Any]:
    """One group anew, beside what is recorded of it."""
    group, size = found.groups[place], program.items_per_group
    with program.feed([group]) as feed:
        batch = feed.take(found.position, group)
        result = program.gradient(params, batch)
        losses = [plain(loss) for loss in result.metrics["loss"].float().tolist()]
        norm = plain(float(mean_norm(flatten(result.gradient), size)))
        own = [flatten(gradient) for gradient in program.alone(params, batch)]
    known = program.describe(found.position, group)
    return {
        "group": group,
        "gradient_norm": norm,
        "recorded_gradient_norm": found.norms[place],
        "losses": losses,
        "recorded_losses": found.losses[place],
        "bit_equal": (norm, losses) == (found.norms[place], found.losses[place]),
        "items": [
            {**item, **_own_numbers(gradient, loss)}
            for item, gradient, loss in zip(known, own, losses, strict=True)
        ],
    }


def _own_numbers(gradient: Tensor, loss: float | str) -> dict[str, Any]:
    norm = float(gradient.norm())
    finite = bool(torch.isfinite(gradient).all()) and not isinstance(loss, str)
    return {"loss": loss, "gradient_norm": plain(norm), "finite": finite and math.isfinite(norm)}


def _group_lines(group: dict[str, Any]) -> list[str]:
    losses, recorded = (
        ", ".join(map(_short, group[key][:4])) + (", ..." if len(group[key]) > 4 else "")
        for key in ("losses", "recorded_losses")
    )
    same = "bit-equal" if group["bit_equal"] else "NOT EQUAL"
    head = (
        f"{'item':>12} {'seed':>12} {'ways':>5} {'shots':>5} {'loss':>10} {'gradient':>10}  finite"
    )
    lines = [
        f"group {group['group']}: {same}",
        f"  gradient norm {_short(group['gradient_norm'])}, in the run "
        f"{_short(group['recorded_gradient_norm'])}",
        *textwrap.wrap(f"losses {losses}; in the run {recorded}", _WIDTH - 2, initial_indent="  "),
        head,
    ]
    for item in group["items"]:
        lines.append(
            f"{item['index']:>12} {item['seed']:>12} {item.get('ways', '-'):>5} "
            f"{item.get('shots', '-'):>5} {_short(item['loss']):>10} "
            f"{_short(item['gradient_norm']):>10}  {'yes' if item['finite'] else 'NO'}"
        )
        names = ", ".join(item["classes"])
        text = f"{names}: {item['example']}" if "example" in item else names
        lines += textwrap.wrap(
            text, _WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 4, break_on_hyphens=False
        )
    return lines


def _short(number: float | str) -> str:
    return number if isinstance(number, str) else f"{number:.5g}"


def _why_not(told: dict[str, Any]) -> str:
    reasons = [
        text
        for key, text in (
            ("same_code", "the code has changed since"),
            ("same_machine", "this machine computes with other kernels (processor, GPU, PyTorch)"),
        )
        if not told[key]
    ]
    return " and ".join(reasons) or "code and machine are the same, so one of them erred"
