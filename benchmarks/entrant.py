"""A contestant's processes, as the driver sees them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, Contestant
from pipeline.launch.local import KEEP_MEMORY

_PATIENCE_SECONDS = 1800.0


def end_on_sigterm() -> None:
    """Let a driver that is told to end take its contestants and its scratch folder with it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


class EntrantError(Exception):
    """This contestant cannot go on; the message says why."""


class Entrant:
    """One contestant: a process for each worker, started at once, obeying line by line."""

    def __init__(self, case: Case, contestant: Contestant, scratch: Path) -> None:
        self.contestant = contestant
        self.scratch = scratch
        self.quanta = 1
        """Of a round; see `contestant.py`"""
        self.rates: list[float] = []
        """Tasks per second of each round"""
        self.tasks_per_round = 0
        self.strategy: str | None = None
        """What `auto` has chosen"""
        self.peak_memory_bytes: int | None = None
        self.gradient_error: float | None = None
        self.data_wait_fraction: float | None = None
        """Of a whole training run"""
        scratch.mkdir(parents=True)
        command = [sys.executable, "-m", "benchmarks.contestant", case.model_dump_json()]
        command += [contestant.model_dump_json(), str(scratch)]
        self._processes = [
            subprocess.Popen(
                command,
                env=self._environment(rank),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=(scratch / f"stderr-{rank}").open("w"),
                text=True,
            )
            for rank in range(contestant.workers)
        ]

    def ask(self, do: str, **arguments: Any) -> list[dict[str, Any]]:
        """Tell all workers, and wait for the answer of each.

        Raises:
            EntrantError: one of them failed, died or took too long.
        """
        line = json.dumps({"do": do, **arguments}) + "\n"
        watch = threading.Timer(_PATIENCE_SECONDS, self._kill)
        watch.start()
        try:
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(line)
                process.stdin.flush()
            answers = [self._answer(rank) for rank in range(len(self._processes))]
        except BrokenPipeError:
            raise EntrantError(self._last_words()) from None
        finally:
            watch.cancel()
        for answer in answers:
            if "error" in answer:
                raise EntrantError(answer["error"])
        return answers

    def kill(self) -> None:
        """End it at once: it keeps nothing, and a worker may be waiting for one that failed."""
        self._kill()
        for process in self._processes:
            assert process.stdin is not None and process.stdout is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()
            process.stdout.close()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()

    def _answer(self, rank: int) -> dict[str, Any]:
        stdout = self._processes[rank].stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            raise EntrantError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _last_words(self) -> str:
        for rank, process in enumerate(self._processes):
            code = process.wait() if len(self._processes) == 1 else process.poll()
            if code and code < 0:
                return f"was killed by {signal.Signals(-code).name}"
            said = (self.scratch / f"stderr-{rank}").read_text().strip().splitlines()
            if code and said:
                return said[-1]
        return "ended without a word"

    def _environment(self, rank: int) -> dict[str, str]:
        threads = str(self.contestant.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if self.contestant.device == "cpu":  # workers take a card where they see one
            environment["CUDA_VISIBLE_DEVICES"] = ""
        if self.contestant.is_peer:  # as users start it, but for the comparison core for core
            return {**environment, **KEEP_MEMORY} if self.contestant.workers > 1 else environment
        return {
            **environment,
            **KEEP_MEMORY,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.contestant.workers),
            "METALOOM_INIT": f"file://{(self.scratch / 'rendezvous').resolve()}",
            "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        }
