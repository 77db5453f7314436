"""Server processes of this machine, known by pid and time of birth, and the folder of their state.

A server has one folder: `settings.json` (ports and secrets, made once, so that a restart is the
same server), `running.json` (its process), `log` and its data. Whoever holds the folder can stop,
kill and start it, in another process too.
"""

from __future__ import annotations

import json
import os
import pwd
import random
import secrets
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from pipeline.core.errors import MachineError

LOOPBACK = "127.0.0.1"
START_SECONDS = 120.0
"""A server needs some ten seconds; two cores that are busy with several suites need patience."""
KILL_SECONDS = 20.0
_PORTS = range(20_000, 32_000)
"""Below the ports that the kernel gives to outgoing connections (32,768 and up on Linux), so that
nobody takes a stopped server's port before it comes back."""
_BIRTH_TOLERANCE_SECONDS = 2.0
_LOG_TAIL_BYTES = 2000
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A server that was started."""

    name: str
    folder: str
    """State, log and secrets."""
    ports: dict[str, int]
    url: str
    environment: dict[str, str]
    """What a client has to export; holds secrets."""
    stop_signal: int = signal.SIGTERM
    stop_seconds: float = 20.0
    """How long it may take to end by itself."""
    litter: tuple[str, ...] = ()
    """Files outside the folder that the server leaves behind."""
    pid: int = 0
    """The leader of a session of its own; every process of the server belongs to that session."""
    started: float = 0.0
    """Birth of that process, by which a reused pid is told apart."""
    boot: str = ""
    """The kernel's run: pids of an earlier one say nothing."""


# --------------------------------------------------------------------------- ports, secrets, files


def free_ports(num_ports: int) -> list[int]:
    """Different ports on which nothing listens, on any address of this machine."""
    found: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == num_ports:
            return found
    raise MachineError(
        f"{num_ports} free ports between {_PORTS.start} and {_PORTS.stop} are needed; stop some "
        "servers (`make cluster-down`)."
    )


def new_secret() -> str:
    """A password that needs no quoting in a URL, a shell or an ini file."""
    return secrets.token_hex(24)


def private_folder(folder: Path) -> Path:
    """Make a folder that only its owner may enter; return its absolute path."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder.resolve()


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    os.replace(temporary, path)


def settings(folder: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The ports and secrets of a server: made at its first start, the same ever after."""
    path = private_folder(folder) / "settings.json"
    if not path.exists():
        write_private(path, json.dumps(make(), indent=2) + "\n")
    known: dict[str, Any] = json.loads(path.read_text())
    return known


# ------------------------------------------------------------------------------ who is alive


def recorded(folder: Path) -> Running | None:
    """The server that was started last in this folder, dead or alive."""
    try:
        told = json.loads((folder / "running.json").read_text())
    except FileNotFoundError:
        return None
    return Running(**{**told, "litter": tuple(told["litter"])})


def running(folder: Path) -> Running | None:
    """The server of this folder, if its process is alive."""
    record = recorded(folder)
    return record if record is not None and leader(record) is not None else None


def leader(record: Running) -> psutil.Process | None:
    """The recorded process, unless it ended or its pid belongs to another one by now."""
    try:
        process = psutil.Process(record.pid)
        return process if _is_ours(process, record) and _lives(process) else None
    except psutil.NoSuchProcess:
        return None


def members(record: Running) -> list[psutil.Process]:
    """Every living process of a server: its session, and what descends from any of them."""
    if record.boot != boot_id():
        return []
    try:
        if not _is_ours(psutil.Process(record.pid), record):
            return []  # the pid, and so the session, is somebody else's now
    except psutil.NoSuchProcess:
        pass  # the kernel gives no pid away while a session of that number lives
    found = {p.pid: p for p in psutil.process_iter() if _session(p.pid) == record.pid}
    for process in list(found.values()):
        try:
            found |= {child.pid: child for child in process.children(recursive=True)}
        except psutil.NoSuchProcess:
            continue
    return [process for process in found.values() if _lives(process)]


def _is_ours(process: psutil.Process, record: Running) -> bool:
    near = abs(process.create_time() - record.started) < _BIRTH_TOLERANCE_SECONDS
    return near and record.boot == boot_id()


def boot_id() -> str:
    """Which run of the kernel this is; empty where it does not say."""
    return _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return 0


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# ------------------------------------------------------------------------------ start


def launch(
    record: Running,
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    answers: Callable[[], bool],
    user: str | None = None,
) -> Running:
    """Start a server and wait until it answers; one that runs already is only waited for.

    Raises:
        MachineError: it ended, or did not answer in time; the message holds its last words.
    """
    folder = Path(record.folder)
    present = running(folder)
    if present is None:
        present = _spawn(record, command, environment, user)
        write_private(folder / "running.json", json.dumps(asdict(present), indent=2) + "\n")
    deadline = time.monotonic() + START_SECONDS
    while not _true(answers):
        if leader(present) is None:
            kill(folder)
            raise MachineError(f"{record.name} ended at its start.\n{_last_words(folder)}")
        if time.monotonic() > deadline:
            kill(folder)
            raise MachineError(
                f"{record.name} did not answer at {record.url} within {START_SECONDS:.0f} s.\n"
                f"{_last_words(folder)}"
            )
        time.sleep(0.1)
    return present


def _spawn(
    record: Running, command: Sequence[str], environment: Mapping[str, str], user: str | None
) -> Running:
    drop: dict[str, Any] = {}
    if user is not None:
        drop = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}
    log = os.open(Path(record.folder) / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            cwd=record.folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            **drop,
        )
    finally:
        os.close(log)
    process.returncode = 0  # disowned: the server outlives us, and `kill` reaps it if it does not
    born = psutil.Process(process.pid).create_time()
    return replace(record, pid=process.pid, started=born, boot=boot_id())


def _last_words(folder: Path) -> str:
    log = folder / "log"
    tail = log.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")
    return f"Its log, {log}, ends with:\n{tail}"


def _true(answers: Callable[[], bool]) -> bool:
    try:
        return answers()
    except OSError:
        return False


def listens(port: int) -> bool:
    """Whether a connection to 127.0.0.1 is accepted."""
    with socket.create_connection((LOOPBACK, port), timeout=2):
        return True


def http_get(url: str, *, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
    """Status and body of a GET without proxies; raises OSError where nobody answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers=dict(headers or {}))
    try:
        with opener.open(request, timeout=5) as reply:
            return int(reply.status), reply.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def http_status(url: str) -> int:
    """Status of a GET; raises OSError where nobody answers."""
    return http_get(url)[0]


# ------------------------------------------------------------------------------ stop


def stop(folder: Path) -> None:
    """Ask the server of a folder to end, wait, and kill what stays."""
    record = recorded(folder)
    first = leader(record) if record is not None else None
    if record is not None and first is not None:
        first.send_signal(record.stop_signal)
        first.resume()  # a stopped process hears nothing
        deadline = time.monotonic() + record.stop_seconds
        while leader(record) is not None and time.monotonic() < deadline:
            time.sleep(0.05)
    kill(folder)


def kill(folder: Path) -> None:
    """SIGKILL every process of the server of a folder, and return when none is left.

    Raises:
        MachineError: some process survives SIGKILL: it hangs in the kernel.
    """
    record = recorded(folder)
    if record is None:
        return
    deadline = time.monotonic() + KILL_SECONDS
    while left := members(record):
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        if time.monotonic() > deadline:
            pids = sorted(process.pid for process in left)
            raise MachineError(
                f"{record.name}: processes {pids} survive SIGKILL. Restart the machine."
            )
        time.sleep(0.02)
    with suppress(ChildProcessError):  # another process started it, or it is reaped
        os.waitpid(record.pid, os.WNOHANG)
    for path in record.litter:
        Path(path).unlink(missing_ok=True)
