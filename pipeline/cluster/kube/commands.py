"""`metaloom cluster`: retraining on Kubernetes, from a terminal."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cluster.retrain.policy import Because
from pipeline.core.errors import ConfigError, MachineError

if TYPE_CHECKING:
    from pipeline.cluster.kube.api import Kube
    from pipeline.cluster.kube.scheduling import Preview

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="""Retraining on a Kubernetes cluster.

    The cluster is the one of your kubeconfig (KUBECONFIG, --context). The manifests of
    infra/kubernetes must have been applied to it. Start with `metaloom cluster doctor`.
    """,
)

Namespace = Annotated[
    str | None,
    typer.Option("--namespace", "-n", help="[default: the context's, or metaloom]"),
]
Context = Annotated[str | None, typer.Option("--context", help="Of the kubeconfig.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
DryRun = Annotated[
    str | None,
    typer.Option("--dry-run", metavar="server", help="The server checks all and keeps nothing."),
]
Run = Annotated[str, typer.Argument(help="Name of a run; `metaloom cluster status` lists them.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def _kube(namespace: str | None, context: str | None) -> Kube:
    from pipeline.cluster.kube.connect import connect

    return connect(namespace, context)


def _dry(value: str | None) -> bool:
    if value not in (None, "server"):
        raise ConfigError(f"--dry-run={value} is not known. Write --dry-run=server.")
    return value is not None


def _say(as_json: bool, text: str, told: Any) -> None:
    print(json.dumps(told, indent=2) if as_json else text)


@app.command()
def doctor(namespace: Namespace = None, context: Context = None, as_json: AsJson = False) -> None:
    """Say what the cluster has and lacks, and how to mend it.

    Ends with status 1 if something keeps a retraining from running.
    """
    from pipeline.cluster.kube.doctor import examine

    findings = examine(_kube(namespace, context))
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    for finding in () if as_json else findings:
        print(f"{'ok     ' if finding.ok else 'PROBLEM'} {finding.name}: {finding.found}")
        if finding.mend:
            print(f"          -> {finding.mend}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def submit(
    commit: Annotated[str, typer.Argument(help="Hash, branch or tag.")] = "HEAD",
    namespace: Namespace = None,
    context: Context = None,
    dry_run: DryRun = None,
    because: Annotated[Because, typer.Option(help="What sets it off; for its report.")] = "manual",
    wait: Annotated[bool, typer.Option("--wait", help="Until it has ended.")] = False,
    as_json: AsJson = False,
) -> None:
    """Have one commit retrained now.

    Its name comes from the commit and its params.yaml: submitting it again while it waits or runs
    changes nothing, and one that has succeeded runs anew, for there may be new data. The driver in
    the cluster clones the commit, so it must have been pushed. With --because drift it ends at once
    unless the served traffic has drifted, for alerts that call this.

    \b
      metaloom cluster submit
      metaloom cluster submit v1.2 --wait
    """
    from pipeline.cluster.kube.retraining import submit as send

    full, params_hash = _commit_and_params(commit)
    kube = _kube(namespace, context)
    done = send(kube, full, params_hash, because=because, dry_run=_dry(dry_run))
    if wait and dry_run is None:
        _wait(kube, done.run, as_json)
        return
    how = "would be submitted" if dry_run else "submitted"
    text = f"{done.run} {how}." if done.new else f"{done.run} is there already: {done.state}."
    if not done.new and done.state in ("failed", "cancelled"):
        text += f" `metaloom cluster resume {done.run}` runs it again."
    _say(as_json, text, {**done._asdict(), "commit": full, "dry_run": bool(dry_run)})


def _commit_and_params(commit: str) -> tuple[str, str]:
    from pipeline.cluster.clone import resolve_commit
    from pipeline.cluster.commands import git

    full = resolve_commit(Path.cwd(), commit)
    params = git(Path.cwd(), "show", f"{full}:params.yaml")
    return full, hashlib.sha256(params.encode(errors="surrogateescape")).hexdigest()


def _wait(kube: Kube, run: str, as_json: bool) -> None:
    """Follow a run to its end, telling what it waits for."""
    from pipeline.cluster.kube.following import follow

    last = None
    for state in follow(kube, run):
        last = state
        if not as_json:
            print(state.line(run), flush=True)
    assert last is not None
    if as_json:
        print(json.dumps({"run": run, **last._asdict()}, indent=2))
    if last.state != "succeeded":
        raise typer.Exit(1)


@app.command()
def status(namespace: Namespace = None, context: Context = None, as_json: AsJson = False) -> None:
    """List the runs: state, stage, step, tasks/s, time left.

    And what keeps one from running.
    """
    import shutil

    from pipeline.cluster.kube.runs import as_table, list_runs, schedule_line

    kube = _kube(namespace, context)
    runs, schedule = list_runs(kube), schedule_line(kube)
    if as_json:
        told = {"schedule": schedule, "runs": [run.as_json() for run in runs]}
        print(json.dumps(told, indent=2))
        return
    print(schedule)
    width = max(60, shutil.get_terminal_size((80, 24)).columns)
    print(as_table(runs, width=width) if runs else "no runs yet")


@app.command()
def logs(
    run: Annotated[str | None, typer.Argument(help="Name of a run [default: the newest].")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until it has ended.")] = False,
    namespace: Namespace = None,
    context: Context = None,
    as_json: AsJson = False,
) -> None:
    """Print what a run's driver prints.

    A connection that breaks is made again, and no line comes twice.
    """
    from pipeline.cluster.kube.logs import read_logs
    from pipeline.cluster.kube.retraining import find_job
    from pipeline.cluster.kube.runs import list_runs

    kube = _kube(namespace, context)
    if run is None:
        found = list_runs(kube)
        if not found:
            raise MachineError(f"there are no runs in namespace {kube.namespace} yet.")
        run = found[0].run
    for line in read_logs(kube, find_job(kube, run), follow=follow):
        print(json.dumps({"run": run, "line": line}) if as_json else line, flush=True)


@app.command()
def cancel(
    run: Run,
    namespace: Namespace = None,
    context: Context = None,
    dry_run: DryRun = None,
    as_json: AsJson = False,
) -> None:
    """End a run; `resume` runs it again.

    A stage has a minute for its checkpoint.
    """
    from pipeline.cluster.kube.retraining import cancel as end

    before = end(_kube(namespace, context), run, dry_run=_dry(dry_run))
    over = before in ("succeeded", "failed", "cancelled")
    how = f"had ended before: {before}" if over else "is being cancelled"
    if dry_run and not over:
        how = "would be cancelled"
    _say(as_json, f"{run} {how}.", {"run": run, "before": before, "dry_run": bool(dry_run)})


@app.command()
def resume(
    run: Run,
    namespace: Namespace = None,
    context: Context = None,
    dry_run: DryRun = None,
    as_json: AsJson = False,
) -> None:
    """Run a failed or cancelled run again.

    Under its name, with the CronJob's present template.
    """
    from pipeline.cluster.kube.retraining import resume as again

    done = again(_kube(namespace, context), run, dry_run=_dry(dry_run))
    text = f"{run} runs again." if done.new else f"{run} has not ended: {done.state}."
    if dry_run and done.new:
        text = f"{run} would run again."
    _say(as_json, text, {**done._asdict(), "dry_run": bool(dry_run)})


@app.command()
def schedule(
    cron: Annotated[str, typer.Argument(help="Such as '30 2 * * *', or @daily.")],
    time_zone: Annotated[str, typer.Option("--time-zone", help="Of the IANA list.")] = "Etc/UTC",
    namespace: Namespace = None,
    context: Context = None,
    yes: Yes = False,
    dry_run: DryRun = None,
    as_json: AsJson = False,
) -> None:
    """Retrain by the clock: show what would change, and ask.

    \b
      metaloom cluster schedule '30 2 * * *' --time-zone Europe/Berlin
      metaloom cluster unschedule
    """
    from datetime import UTC, datetime

    from pipeline.cluster.kube.cron import check_zone, next_runs, parse_cron
    from pipeline.cluster.kube.scheduling import preview_schedule

    zone, parsed = check_zone(time_zone), parse_cron(cron)
    kube = _kube(namespace, context)
    times = [f"{t:%a %Y-%m-%d %H:%M %Z}" for t in next_runs(parsed, zone, datetime.now(UTC), 3)]
    preview = preview_schedule(kube, cron, time_zone)
    told = {"schedule": cron, "time_zone": time_zone, "next": times}
    _change(kube, preview, told, yes=yes, dry_run=_dry(dry_run), as_json=as_json)


@app.command()
def unschedule(
    namespace: Namespace = None,
    context: Context = None,
    yes: Yes = False,
    dry_run: DryRun = None,
    as_json: AsJson = False,
) -> None:
    """Retrain no more by the clock.

    A run that goes on is left alone.
    """
    from pipeline.cluster.kube.scheduling import preview_unschedule

    kube = _kube(namespace, context)
    told: dict[str, Any] = {"schedule": None}
    preview = preview_unschedule(kube)
    _change(kube, preview, told, yes=yes, dry_run=_dry(dry_run), as_json=as_json)


def _change(
    kube: Kube,
    preview: Preview,
    told: dict[str, Any],
    *,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Show a change, ask, make it."""
    from pipeline.cluster.kube.scheduling import apply

    changed = bool(preview.difference)
    if not as_json:
        print(preview.difference or "The CronJob is like that already.")
        for when in told.get("next", []):
            print(f"  runs {when}")
    if changed and not dry_run:
        if not yes and not as_json and not _agreed():
            raise typer.Exit(1)
        if as_json and not yes:
            raise ConfigError("--json cannot ask. Add --yes, or --dry-run=server.")
        apply(kube, preview)
    if as_json:
        result = {**told, "changed": changed, "dry_run": dry_run, "diff": preview.difference}
        print(json.dumps(result, indent=2))
    elif changed:
        print("Nothing was changed (dry run)." if dry_run else "Done.")


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("nobody is there to agree to this change. Add --yes.")
    return typer.confirm("Change it?")
