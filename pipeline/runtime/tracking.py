"""One run per stage, under one run per pipeline, recorded by a process of its own.

The stage writes metric points to a local journal and a few events to a pipe. A recorder process
(`pipeline.runtime.recorder`) forwards both to MLflow, so a dead or slow server, or a missing
library, costs the stage nothing; and a stage that is killed still has its run closed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from pydantic import BaseModel

from pipeline.core.errors import StoppedError, TrainingError
from pipeline.runtime import lineage
from pipeline.runtime.journal import Journal, Point, read_points
from pipeline.runtime.kept import Kept, journal_folder, stamped
from pipeline.runtime.logs import warn

FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"
FLUSH_SECONDS = 90.0
"""How long the end of a stage waits for its recorder; the recorder gives up earlier by itself."""
GAVE_UP = 3
"""Exit status of a recorder that has said itself what it could not send."""
INCOMPLETE_TAG = "metaloom.incomplete"
"""On a run whose points did not all arrive; `metaloom upload` sends them and takes it off."""
IDS_SECONDS = 30.0
"""How long to wait for the ids of a run that has just begun."""

_SWITCH = "METALOOM_TRACKING"


@dataclass(frozen=True)
class DataInput:
    """A data set that a stage read."""

    name: str
    digest: str
    source: str


@dataclass(frozen=True)
class RunStart:
    """What is known of a stage's run when it begins."""

    stage: str
    key: str
    """Unique: starting the same run twice gives the run that is already there."""
    began: float = 0.0
    """Seconds since the epoch; 0 for now."""
    pipeline: str = ""
    """What all stages of one pipeline run share."""
    owner: str = ""
    """The process whose end means that the pipeline run is over."""
    process: str = ""
    """The process whose end means that this stage is over."""
    params: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    inputs: Sequence[DataInput] = ()


@dataclass(frozen=True)
class RunIds:
    """The two runs of a stage in the tracking server."""

    parent: str
    child: str


class Tracker(Protocol):
    """A tracking server. Every call may be repeated: the second time changes nothing."""

    def start(self, run: RunStart, known: RunIds | None = None) -> RunIds:
        """Open the stage's run, and the pipeline's if it has none yet.

        Args:
            known: where an earlier recorder had begun it; gone on with if this server has it.
        """

    def log(self, ids: RunIds, points: Sequence[Point]) -> None:
        """Record metric points."""

    def link(self, ids: RunIds, outputs: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        """Point from the pipeline's run to the runs that made what DVC restored.

        Args:
            outputs: content hash by path, by stage.

        Returns:
            For every stage without a run of its own here: the run that made it, or `unknown`.
        """

    def finish(self, ids: RunIds, status: str, tags: Mapping[str, str], ended: float) -> None:
        """Close the stage's run, and the pipeline's until its next stage opens it again.

        Args:
            ended: when the stage did, in seconds since the epoch.
        """


@dataclass
class MemoryTracker:
    """A tracker that keeps everything in this process: the twin of the MLflow one, for tests."""

    started: dict[str, RunStart] = field(default_factory=dict)
    """By child run."""
    points: dict[tuple[str, str, int, float], float] = field(default_factory=dict)
    """Values by (child run, metric, step, time)."""
    linked: dict[str, dict[str, str]] = field(default_factory=dict)
    """Makers of restored stages, by parent run."""
    finished: dict[str, tuple[str, Mapping[str, str]]] = field(default_factory=dict)
    """Status and tags, by child run."""

    def start(self, run: RunStart, known: RunIds | None = None) -> RunIds:
        """Open a run."""
        self.started[run.key] = run
        return RunIds(parent=run.pipeline, child=run.key)

    def log(self, ids: RunIds, points: Sequence[Point]) -> None:
        """Record metric points."""
        for point in points:
            for name, value in point.metrics.items():
                self.points[ids.child, name, point.step, point.time] = value

    def link(self, ids: RunIds, outputs: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
        """Look for finished runs with the same outputs."""
        makers = {
            stage: next((key for key in self.finished if self._made(key, hashes)), "unknown")
            for stage, hashes in outputs.items()
            if not any(self._is_run_of(key, ids.parent, stage, hashes) for key in self.started)
        }
        self.linked[ids.parent] = makers
        return makers

    def finish(self, ids: RunIds, status: str, tags: Mapping[str, str], ended: float) -> None:
        """Close a run."""
        self.finished[ids.child] = (status, tags)

    def _is_run_of(self, key: str, parent: str, stage: str, hashes: Mapping[str, str]) -> bool:
        run, (_, tags) = self.started[key], self.finished.get(key, ("", {}))
        wrote_it = any(f"output.{path}" in tags for path in hashes)
        same = run.stage == stage or (run.stage == stage.partition("@")[0] and wrote_it)
        return run.pipeline == parent and same

    def _made(self, key: str, hashes: Mapping[str, str]) -> bool:
        status, tags = self.finished[key]
        return status == FINISHED and any(
            tags.get(f"output.{path}") == digest for path, digest in hashes.items()
        )


class StageRun:
    """A running stage's side of its record."""

    def __init__(self, root: Path, start: RunStart) -> None:
        self.journal = journal_folder(root) / f"{start.stage}-{start.key[:12]}.jsonl"
        """Rank 0 appends points here; they are forwarded while the stage runs."""
        self.start = start
        self._root = root
        self._points = Journal(self.journal)
        self._kept = Kept(self.journal) if _is_wanted() else None
        self._recorder = _start_recorder(root, self.journal)
        self._ids: RunIds | None = None
        self._events: list[dict[str, Any]] = []
        self._tell(stamped("start", run=asdict(start)))

    @property
    def ids(self) -> RunIds | None:
        """The runs' ids, waited for; None when nothing is recorded or no server answers."""
        if self._ids is None and self._recorder is not None:
            self._ids = _read_ids(self._recorder)
        return self._ids

    def log(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record metrics; without a step they describe the stage as a whole."""
        self._points.write(0 if step is None else step, metrics)

    def link_restored(self) -> None:
        """Link the stages that DVC restored from its cache to the runs that made them."""
        outputs = {}
        for stage, paths in lineage.pipeline_outputs(self._root).items():
            hashes = {path: lineage.content_hash(self._root / path) for path in paths}
            outputs[stage] = {path: digest for path, digest in hashes.items() if digest}
        self._tell(stamped("link", outputs=outputs))

    def finish(self, status: str, tags: Mapping[str, str]) -> None:
        """Close the run and wait, within a bound, until everything is recorded."""
        self._points.close()
        self._tell(stamped("end", status=status, tags=dict(tags)))
        status_of_recorder = _await_end(self._recorder)
        if status_of_recorder not in {0, GAVE_UP, None}:
            # It was killed. Another one says everything again; what is there already stays once.
            self._recorder = _start_recorder(self._root, self.journal)
            for event in self._events:
                self._send(event)
            status_of_recorder = _await_end(self._recorder)
        if status_of_recorder not in {0, GAVE_UP}:
            warn(kept_message(self.journal, sum(1 for _ in read_points(self.journal))))
        if self._kept is not None:
            self._kept.close()

    def _tell(self, event: dict[str, Any]) -> None:
        """Keep an event, for a later recorder or upload, and send it to the present recorder."""
        if self._kept is not None:
            self._kept.write(event)
        self._events.append(event)
        self._send(event)

    def _send(self, event: dict[str, Any]) -> None:
        if self._recorder is None or self._recorder.stdin is None:
            return
        try:
            self._recorder.stdin.write(json.dumps(event).encode() + b"\n")
            self._recorder.stdin.flush()
        except (BrokenPipeError, ValueError):
            # The recorder has died; the stage goes on, and its end starts another one.
            return


def kept_message(journal: Path, num_points: int) -> str:
    """What is said when a run could not be recorded whole."""
    return (
        f"MLflow did not take all of this run: its {num_points:,} points, settings and how it "
        f"ended are kept in {journal} and beside it. `metaloom upload` sends them when MLflow is "
        "back."
    )


@contextmanager
def stage_run(
    stage: str,
    config: BaseModel,
    *,
    inputs: Mapping[str, Path] | None = None,
    outputs: Sequence[Path] = (),
    root: Path | None = None,
    code_root: Path | None = None,
) -> Iterator[StageRun]:
    """Record a stage from start to end; refuse its result when the code changed meanwhile.

    Args:
        config: becomes the run's params, flattened.
        inputs: data sets that the stage reads, by name; they are recorded with content hashes.
        outputs: what it writes; tagged with content hashes when the body has ended.
        root: the repository (default: the working folder).
        code_root: where the code is (default: where this package was imported from).

    Raises:
        TrainingError: a .py file, or params.yaml, changed while the stage ran. DVC hashes both
            after the command has ended, so it would record the old output under the new name.
    """
    root = root or Path.cwd()
    code_root = code_root or lineage.code_root()
    code = lineage.code_hash(code_root)
    params = lineage.file_hash(root / "params.yaml")
    run = StageRun(root, _describe(stage, config, inputs or {}, root, code))
    try:
        yield run
        _refuse_changed_code(stage, code, lineage.code_hash(code_root))
        _refuse_changed_params(stage, params, lineage.file_hash(root / "params.yaml"))
    except BaseException as error:
        interrupted = isinstance(error, (KeyboardInterrupt, StoppedError))
        run.finish(
            KILLED if interrupted else FAILED, {"error": f"{type(error).__name__}: {error}"[:1000]}
        )
        raise
    tags = {
        f"output.{path.as_posix()}": lineage.content_hash(root / path) or "absent"
        for path in outputs
    }
    run.finish(FINISHED, tags)


def _describe(
    stage: str, config: BaseModel, inputs: Mapping[str, Path], root: Path, code: str
) -> RunStart:
    git = lineage.git_state(root)
    return RunStart(
        stage=stage,
        key=uuid.uuid4().hex,
        began=time.time(),
        params=lineage.flatten(config.model_dump(mode="json")),
        tags={
            "git.commit": git.commit,
            "git.dirty": str(git.dirty).lower(),
            "dvc.lock": lineage.file_hash(root / "dvc.lock"),
            "code.hash": code,
        },
        inputs=[
            DataInput(name, lineage.content_hash(root / path) or "absent", path.as_posix())
            for name, path in inputs.items()
        ],
    )


def _refuse_changed_code(stage: str, before: str, after: str) -> None:
    if before != after:
        raise TrainingError(
            f"The code under pipeline/ or stages/ changed while {stage} ran, so its result belongs "
            "to neither version and is not recorded. Run `dvc repro` again and leave the code "
            "alone until it has ended (a second clone is a good place to go on working)."
        )


def _refuse_changed_params(stage: str, before: str, after: str) -> None:
    if before != after:
        raise TrainingError(
            f"params.yaml changed while {stage} ran, so DVC would record the old result under the "
            "new settings. Nothing was recorded: run `dvc repro` again."
        )


def _is_wanted() -> bool:
    return os.environ.get(_SWITCH, "on").lower() not in {"off", "0", "false", "no"}


def _await_end(recorder: subprocess.Popen[bytes] | None) -> int | None:
    """Wait, within a bound, until a recorder that knows the end is done.

    Returns:
        Its exit status; None when it had to be stopped. Where there is none nothing is wanting.
    """
    if recorder is None:
        return 0
    assert recorder.stdin and recorder.stdout
    _close_quietly(recorder.stdin)
    try:
        return recorder.wait(FLUSH_SECONDS)
    except subprocess.TimeoutExpired:
        recorder.kill()
        recorder.wait()
        return None
    finally:
        recorder.stdout.close()


def _start_recorder(root: Path, journal: Path) -> subprocess.Popen[bytes] | None:
    if not _is_wanted():
        return None
    missing = [name for name in ("mlflow", "psutil") if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(missing)
        warn(
            f"{names} not installed: runs are not recorded, only kept in {journal.parent}. "
            "Install with `pip install 'metaloom[track]'`; `metaloom upload` then sends them."
        )
        return None
    command = [sys.executable, "-m", "pipeline.runtime.recorder", str(root), str(journal)]
    environment = {**os.environ, "PYTHONPATH": _python_path()}
    # A session of its own: Ctrl-C stops the stage, and the recorder then closes the run.
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )


def _python_path() -> str:
    """The present PYTHONPATH with our own code first, whatever the working folder is."""
    return os.pathsep.join(filter(None, [str(lineage.code_root()), os.environ.get("PYTHONPATH")]))


def _read_ids(recorder: subprocess.Popen[bytes]) -> RunIds | None:
    assert recorder.stdout
    if not select.select([recorder.stdout], [], [], IDS_SECONDS)[0]:
        return None
    line = recorder.stdout.readline()
    return RunIds(**json.loads(line)) if line.strip() else None


def _close_quietly(pipe: IO[bytes]) -> None:
    try:
        pipe.close()
    except BrokenPipeError:
        return
