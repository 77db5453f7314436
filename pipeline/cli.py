"""The `metaloom` command: look at the machine, release, promote, roll back, serve."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import textwrap
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.core.config import load_section, load_value
from pipeline.core.errors import MachineError, RegistryError
from pipeline.core.files import read_json
from pipeline.evaluation.order import by_size
from pipeline.runtime.logs import run_main

RECORD = Path("results/deploy/release.json")
REPORT = Path("results/evaluate/report.html")
METRICS = Path("results/evaluate/metrics.json")
PARAMS = Path("params.yaml")

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

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Registered name [default: the one of the last release]."),
]


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Look at this machine: what is there, what is missing, how to mend it.

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


@app.command()
def release(as_json: AsJson = False) -> None:
    """Say what was released; register it if this machine's registry does not have it.

    A record of a release can be here without the release being in the registry: another registry
    was chosen since, or its database is gone. This asks the registry and makes up for it; where
    the release is registered it changes nothing.
    """
    from pipeline.deploy.registry import Registry
    from pipeline.deploy.release import DeployConfig, Sources, deploy, refuse_failed_smoke

    config = load_section(PARAMS, "deploy", DeployConfig)
    record = read_json(RECORD)
    registry = Registry(Path.cwd(), record["model"])
    known = registry.find(record["bundle"])
    if known is None:
        print("This registry does not have the release yet: registering it.", file=sys.stderr)
        record = deploy(config, Sources(), root=Path.cwd())
        refuse_failed_smoke(record)
    else:
        record = {**record, "version": known.number, "aliases": registry.aliases()}
    if as_json:
        print(json.dumps(record, indent=2))
    else:
        print(_summary(record, read_json(METRICS).get(record["domain"], {})))


@app.command()
def promote(
    version: Annotated[int | None, typer.Argument(help="Version [default: @challenger].")] = None,
    model: Model = None,
    as_json: AsJson = False,
) -> None:
    """Make a registered version the champion, whatever the gate said.

    The version must have passed its smoke test, and its bundle must be the one that was
    registered. The old champion stays registered as @previous; `metaloom rollback` brings it back.
    Moving the alias in MLflow does the same, without these checks.
    """
    from pipeline.deploy.registry import CHALLENGER, Registry

    registry = Registry(Path.cwd(), model or _model_name())
    number = version if version is not None else registry.aliases().get(CHALLENGER)
    if number is None:
        raise RegistryError(
            f"{registry.name} has no challenger. Name the version: `metaloom promote VERSION`."
        )
    chosen = registry.version(number)
    with tempfile.TemporaryDirectory() as scratch:
        registry.fetch(chosen, Path(scratch) / "bundle")
    old = registry.promote(chosen)
    was = f"; version {old.number} is @previous" if old else ""
    _say(as_json, f"{registry.name}: version {number} is @champion{was}.", registry.aliases())


@app.command()
def rollback(model: Model = None, as_json: AsJson = False) -> None:
    """Make the champion before this one serve again, if it is still whole.

    Doing it twice goes two champions back.
    """
    from pipeline.deploy.registry import Registry

    registry = Registry(Path.cwd(), model or _model_name())
    now, dropped = registry.rollback()
    text = f"{registry.name}: version {now.number} is @champion again, {dropped.number} is not."
    _say(as_json, text, registry.aliases())


@app.command()
def serve(
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5001,
    model: Model = None,
) -> None:
    """Serve the champion on 127.0.0.1 until Ctrl-C, with MLflow's scoring server.

    The champion's bundle is downloaded and every byte verified; the code that runs is this
    installation's, never the artefact's. The model card shows a request; also try:

    \b
      curl http://127.0.0.1:5001/ping
    """
    from pipeline.deploy.registry import Registry
    from pipeline.deploy.smoke import serve_command, serve_environment
    from pipeline.runtime.mlflow_tracker import quiet_environment

    registry = Registry(Path.cwd(), model or _model_name())
    champion = registry.champion()
    if champion is None:
        raise RegistryError(
            f"{registry.name} has no champion. Run `dvc repro`, or choose one: `metaloom promote`."
        )
    with tempfile.TemporaryDirectory() as scratch:
        bundle = registry.fetch(champion, Path(scratch) / "bundle")
        registry.save_local(bundle, Path(scratch) / "model")
        print(f"{registry.name} version {champion.number} on http://127.0.0.1:{port} (Ctrl-C ends)")
        settings = {**quiet_environment(), "MLFLOW_TRACKING_URI": registry.uri}
        command = serve_command(str(Path(scratch) / "model"), port)
        _foreground(command, serve_environment(settings), Path(scratch))


@app.command()
def ui(port: Annotated[int, typer.Option(help="Port on 127.0.0.1.")] = 5000) -> None:
    """Open MLflow on the runs and models of this repository until Ctrl-C.

    With MLFLOW_TRACKING_URI set to a server, that server's address is printed instead.
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
    """Print the JSON schema of params.yaml, for editors; params.schema.json holds it."""
    from pipeline.doctor import params_schema

    print(json.dumps(params_schema(), indent=2))


def _summary(record: Mapping[str, Any], numbers: Mapping[str, Any]) -> str:
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
    command = _command_name()
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


def _command_name() -> str:
    """What can be typed here again: by its path where it lies in this folder (`.venv/bin`)."""
    called = Path(sys.argv[0]).absolute()
    if called.name != "metaloom" or not called.is_relative_to(Path.cwd()):
        return "metaloom"
    return str(called.relative_to(Path.cwd()))


def _model_name() -> str:
    if RECORD.is_file():
        return str(read_json(RECORD)["model"])
    name = load_value(PARAMS, "deploy.model_name", str)
    return f"{name}-{load_value(PARAMS, 'preprocess.domain', str)}"


def _say(as_json: bool, text: str, aliases: Mapping[str, int]) -> None:
    print(json.dumps({"aliases": dict(aliases)}) if as_json else text)


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
