"""Where a run's checkpoints are kept while it runs, and which one it goes on from.

Every host keeps its own copy, so that any of them may go away; hosts that share one folder keep
one. With METALOOM_STORAGE there is one more copy in an object store.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from pipeline.core.errors import GuardError, PipelineError, StorageError
from pipeline.runtime.checkpoint import (
    Checkpoint,
    clear_checkpoints,
    drop_checkpoint,
    load_checkpoint,
    newest_digest,
    newest_step,
    save_checkpoint,
    tidy_checkpoints,
)
from pipeline.runtime.collectives import barrier, broadcast_bytes, gather_shares
from pipeline.runtime.context import Context
from pipeline.runtime.logs import say
from pipeline.runtime.mirror import Mirror
from pipeline.runtime.storage import storage_from_environment

_SLOW_SECONDS = 1.0
_STATE = "state"
_TOKEN = ".main-"


class Keeper:
    """The checkpoints of one run, as one worker sees them."""

    def __init__(self, folder: Path, context: Context) -> None:
        self._folder, self._context = folder, context
        self._writes = context.is_main
        storage = storage_from_environment() if context.is_main else None
        self._mirror = None if storage is None else Mirror(folder, storage)

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if self._mirror is not None:
            # After a fault the workers are started again, and that should not wait for a store.
            self._mirror.close(flush=kind is None or issubclass(kind, PipelineError))
        if kind is GuardError:  # every worker has it, and none ends the run before the upload
            self._context.wait_for_main("last upload")

    def resume(self) -> Checkpoint | None:
        """The newest good checkpoint that any host, or the store, has; on every worker.

        Raises:
            StorageError: the object store does not answer.
        """
        self._writes = self._keeps_a_copy()
        if self._writes:
            tidy_checkpoints(self._folder)
        if self._mirror is not None:
            self._mirror.fetch_newer(newest_step(self._folder))
            self._mirror.start()
        self._context.wait_for_all("download")
        barrier()
        own = [newest_step(self._folder), newest_digest(self._folder)]
        row = torch.tensor([own], device=self._context.device)
        held = gather_shares(row, self._context.world_size, self._context).tolist()
        if all(other == held[0] for other in held):
            return load_checkpoint(self._folder)
        steps = [step for step, _ in held]
        return self._from(steps.index(max(steps)))

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Keep a checkpoint, on every host's first worker."""
        if not self._writes:
            return
        begin = time.monotonic()
        save_checkpoint(self._folder, step, tensors, state)
        if (seconds := time.monotonic() - begin) > _SLOW_SECONDS:
            say("slow disk", checkpoint_seconds=seconds, folder=str(self._folder))

    def _from(self, source: int) -> Checkpoint:
        """One worker's newest checkpoint, sent to all; hosts without it keep a copy."""
        sent = None
        if self._context.rank == source:
            found = load_checkpoint(self._folder)
            assert found is not None
            sent = safetensors.torch.save(found.tensors, {_STATE: json.dumps(found.state)})
        received = broadcast_bytes(sent, source, self._context)
        length = int.from_bytes(received[:8], "little")
        header = json.loads(received[8 : 8 + length])
        state = json.loads(header["__metadata__"][_STATE])
        checkpoint = Checkpoint(safetensors.torch.load(received), state)
        if self._writes and self._context.rank != source:
            step = state["progress"]["step"]
            drop_checkpoint(self._folder, step)  # of the same step and other bits
            save_checkpoint(self._folder, step, *checkpoint)
        return checkpoint

    def _keeps_a_copy(self) -> bool:
        """The main worker does, and the first of each host that does not see the main's folder."""
        context = self._context
        first = torch.tensor([int(context.local_rank == 0)], device=context.device)
        hosts = int(gather_shares(first, context.world_size, context).sum())
        if hosts <= 1:
            return context.is_main
        token = self._leave_token() if context.is_main else 0
        own = torch.tensor([token], device=context.device)
        token = int(gather_shares(own, context.world_size, context).max())
        shared = (self._folder / f"{_TOKEN}{token}").exists()
        return context.is_main or (context.local_rank == 0 and not shared)

    def _leave_token(self) -> int:
        """A file that nobody else makes: who sees it, sees this folder."""
        token = 1 + secrets.randbits(62)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for old in self._folder.glob(f"{_TOKEN}*"):
                old.unlink()
            (self._folder / f"{_TOKEN}{token}").touch()
        except OSError as error:
            raise StorageError(
                f"cannot write into {self._folder}: {error}. Free some space or mend the disk, "
                "then run the same command again."
            ) from error
        return token


def drop_copies(folder: Path, context: Context) -> None:
    """Remove the other hosts' checkpoints once the main worker has left the run's result.

    The main host's own stay until the driver has the result.
    """
    barrier()
    if context.local_rank == 0 and not context.is_main and not any(folder.glob(f"{_TOKEN}*")):
        clear_checkpoints(folder)
