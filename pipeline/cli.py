"""The `metaloom` command: look at the machine, release, promote, roll back, serve."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from pipeline.cluster.kube.commands import app as cluster
from pipeline.core.errors import MachineError, PipelineError, RegistryError, StorageError
from pipeline.deploy import commands as deploy_commands
from pipeline.deploy.commands import AsJson, Model, model_name, say
from pipeline.deploy.release_commands import release
from pipeline.deploy.reproduce_command import reproduce
from pipeline.deploy.retrain_command import retrain
from pipeline.deploy.serve import commands
from pipeline.runtime.logs import run_main, warn

REPORT = Path("results/evaluate/report.html")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
    help="""Few-shot learners, from pictures to a served model.

    The pipeline itself is run by DVC, from the top of the repository:

    \b
      dvc repro                                    run what has changed
      dvc exp run -S meta_train.algorithm.name=maml    try another setting
      dvc metrics show / dvc plots show            look at the numbers

    This command does the rest. Start with `metaloom doctor`.
    """,
)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine has and lacks, and how to mend it.

    Ends with status 1 if something keeps the pipeline from running.
    """
    from pipeline.doctor import examine

    findings = examine(Path.cwd())
    if as_json:
        print(json.dumps([vars(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            print(f"{'ok     ' if finding.ok else 'PROBLEM'} {finding.name}: {finding.found}")
            if finding.mend:
                print(f"          -> {finding.mend}")
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


app.add_typer(release, name="release")
app.add_typer(cluster, name="cluster")


app.command()(deploy_commands.promote)
app.command()(deploy_commands.export)
app.command()(retrain)
app.command()(reproduce)


@app.command()
def rollback(model: Model = None, as_json: AsJson = False) -> None:
    """Make the champion before this one serve again.

    It must still be whole. Doing it twice goes two champions back.
    """
    from pipeline.deploy.registry import Registry

    registry = Registry(Path.cwd(), model or model_name())
    now, dropped = registry.rollback()
    text = f"{registry.name}: version {now.number} is @champion again, {dropped.number} is not."
    say(as_json, text, registry.aliases())


@app.command()
def lineage(
    what: Annotated[
        str,
        typer.Argument(help="A version, or 7 or more characters of a commit, hash or run id."),
    ],
    model: Model = None,
    as_json: AsJson = False,
) -> None:
    """Say where a version came from, or what came of something.

    \b
      metaloom lineage 3         its commit, data, seeds, runs, decision
      metaloom lineage 1f3c9ab   versions of a commit, store, bundle or run
    """
    from pipeline.deploy.lineage import as_text, trace
    from pipeline.deploy.registry import Registry

    traced = trace(Registry(Path.cwd(), model or model_name()), what)
    print(json.dumps(traced, indent=2) if as_json else as_text(traced))


@app.command()
def upload(as_json: AsJson = False) -> None:
    """Send what MLflow and the object store did not take, each once.

    A stage goes on without MLflow and keeps its points and its settings in .metaloom/journal.
    This sends them, in the run that was begun if there is one, and may be stopped and run again.
    Runs of stages that are still going are left alone. Checkpoints of unfinished runs go to
    METALOOM_STORAGE, if it is set.
    """
    from pipeline.runtime.mirror import upload_checkpoints
    from pipeline.runtime.mlflow_tracker import MlflowTracker
    from pipeline.runtime.upload import Outcome, as_text, refuse_unsent
    from pipeline.runtime.upload import upload as send

    outcomes, checkpoints, faults = list[Outcome](), list[str](), list[PipelineError]()
    try:
        outcomes = send(Path.cwd(), lambda: MlflowTracker(Path.cwd()))
    except RegistryError as error:
        faults.append(error)
    try:  # whatever MLflow said: they have nothing to do with each other
        checkpoints = upload_checkpoints(Path(".metaloom/checkpoints"))
    except StorageError as error:
        faults.append(error)
    told = {"runs": [vars(one) for one in outcomes], "checkpoints": checkpoints}
    if as_json:
        print(json.dumps(told, indent=2))
    elif outcomes or not faults:
        print(as_text(outcomes))
    for name in () if as_json else checkpoints:
        print(f"The newest checkpoint of {name} is in the object store.")
    for fault in faults[1:]:
        warn(str(fault))
    if faults:
        raise faults[0]
    refuse_unsent(outcomes)


class _WithRest(TyperCommand):
    """A command that keeps what follows `--` apart, for another program."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Set the rest aside in `ctx.meta`."""
        end = args.index("--") if "--" in args else len(args)
        ctx.meta["rest"] = args[end + 1 :]
        return super().parse_args(ctx, args[:end])


@app.command(cls=_WithRest)
def run(
    context: typer.Context,
    commit: Annotated[
        str | None, typer.Argument(help="Hash, branch or tag [default: HEAD].")
    ] = None,
    branch: Annotated[str | None, typer.Option(help="New branch for the results.")] = None,
    push: Annotated[bool, typer.Option(help="Push data and branch.")] = True,
    remote: Annotated[str | None, typer.Option(help="Git remote to push the branch on to.")] = None,
    allow_dirty: Annotated[
        bool, typer.Option("--allow-dirty", help="Run HEAD though files differ.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a commit in a clone; its results come back as a branch.

    The working tree stays free to go on working in. What this machine's DVC cache or the DVC
    remote holds is not computed again; a run that was killed goes on where it was. What follows
    `--` goes to `dvc repro`:

    \b
      metaloom run v1.2 -- evaluate
    """
    from pipeline.cluster.run import RunRequest, run_commit
    from pipeline.runtime.lineage import pipeline_outputs
    from pipeline.runtime.mlflow_tracker import tracking_uri

    rest = tuple(context.meta["rest"])
    request = RunRequest(commit, branch, push, remote, allow_dirty, rest)
    written = [path for paths in pipeline_outputs(Path.cwd()).values() for path in paths]
    here = {"MLFLOW_TRACKING_URI": tracking_uri(Path.cwd())}
    result = run_commit(Path.cwd(), request, written=written, environment=here)
    print(json.dumps(result.as_json(), indent=2) if as_json else result.summary())


@app.command()
def share(as_json: AsJson = False) -> None:
    """Push data, run-cache and metrics for other machines.

    `dvc push` alone leaves out the metrics that git keeps, and without these a machine that does
    not have this dvc.lock computes again. `metaloom run` does this by itself.
    """
    from pipeline.cluster.share import share as push_all

    remote = push_all(Path.cwd())
    print(json.dumps({"remote": remote}) if as_json else f"{remote} has all that is here.")


@app.command()
def replay(
    path: Annotated[Path, typer.Argument(help="Folder that the run's message names.")],
    as_json: AsJson = False,
) -> None:
    """Compute again a training step that a guard refused.

    A step whose loss or gradient is no finite number, or far from the usual, is kept in
    .metaloom/incidents with the parameters of that moment. This shows for each item of its groups
    where it is in the stream, its classes, its loss and the length of its own gradient.
    """
    from pipeline.training.replay import as_text
    from pipeline.training.replay import replay as again

    told = again(path)
    print(json.dumps(told, indent=2) if as_json else as_text(told))


@app.command()
def join(
    rendezvous: Annotated[str, typer.Argument(help="METALOOM_RENDEZVOUS of the driver's host.")],
    once: Annotated[bool, typer.Option("--once", help="End with the first run.")] = False,
) -> None:
    """Be one more host of another host's runs.

    That host drives them with METALOOM_LAUNCHER=torchrun. Waits for a run, takes part in it with
    METALOOM_NUM_WORKERS workers, and waits for the next, until Ctrl-C. Start it in a clone of the
    same commit that has the same data (`dvc pull`).
    """
    from pipeline.launch.torchrun import join_runs

    join_runs(rendezvous, Path(".metaloom/join"), once=once)


@app.command()
def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Registered model, models:/NAME@ALIAS or models:/NAME/VERSION, or the folder of a "
            "bundle [default: the model of the last release]."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5001,
    config: commands.Config = None,
    replicas: Annotated[
        str | None,
        typer.Option(help="On a Ray cluster: so many replicas, or 1:4 as the load asks for."),
    ] = None,
) -> None:
    """Serve a model over HTTP, with a page to try it, until Ctrl-C.

    The service follows @champion: a version that is promoted, here or in MLflow, serves within
    `poll_seconds`, after every byte of it was verified and it has been tried. On a terminal the
    address that is printed opens the page with a key that is good for a day.

    \b
      metaloom serve
      metaloom serve --replicas 1:4       on the Ray cluster of RAY_ADDRESS
      metaloom keys make alice --scope read --scope write
      curl -H "Authorization: Bearer $KEY" http://127.0.0.1:5001/v1/model
    """
    commands.serve(model or model_name(), host, port, config, replicas)


app.add_typer(commands.keys, name="keys")


@app.command()
def ui(port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000) -> None:
    """Open MLflow on the runs and models of this repository.

    Until Ctrl-C. With MLFLOW_TRACKING_URI set to a server, its address is printed instead.
    """
    from pipeline.deploy.smoke import serve_environment
    from pipeline.runtime.mlflow_tracker import quiet_environment, tracking_uri

    uri = tracking_uri(Path.cwd())
    if uri.startswith("http"):
        print(f"MLflow runs at {uri}")
        return
    print(f"MLflow on http://127.0.0.1:{port} (Ctrl-C ends)")
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    settings = {**quiet_environment(), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    _foreground(command, serve_environment(settings), Path.cwd())


@app.command()
def report(
    show: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Print where the evaluation report is, and open it on request."""
    if not REPORT.is_file():
        raise MachineError(f"{REPORT} does not exist. Run `dvc repro evaluate`.")
    print(REPORT.resolve())
    if show and not webbrowser.open(REPORT.resolve().as_uri()):
        raise MachineError("no browser could be opened here; copy the file to where one is.")


@app.command()
def schema() -> None:
    """Print the JSON schema of params.yaml.

    params.schema.json holds it, for editors.
    """
    from pipeline.doctor import params_schema

    print(json.dumps(params_schema(), indent=2))


def _foreground(command: list[str], environment: Mapping[str, str], folder: Path) -> None:
    """Run a server until it ends, or Ctrl-C or SIGTERM ends it."""
    process = subprocess.Popen(command, env=dict(environment), cwd=folder)
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    signal.signal(signal.SIGINT, lambda number, frame: process.terminate())
    status = process.wait()
    if status > 0:
        raise MachineError(f"the server ended with status {status}; what it printed says why.")


def main() -> None:
    """Run the command; an error is reported by its message alone."""
    run_main(app)


if __name__ == "__main__":
    main()
