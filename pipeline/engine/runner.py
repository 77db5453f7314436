"""The engine of a run: computes group after group, and goes on when memory runs out once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.algorithms.base import Algorithm
from pipeline.core.errors import TrainingError
from pipeline.core.functional import Model
from pipeline.core.types import Params, Task
from pipeline.engine.memory import is_out_of_memory
from pipeline.engine.meta_gradient import Engine, GroupGradient
from pipeline.engine.replay import computed_by
from pipeline.runtime.logs import say


class Runner:
    """`meta_gradient` with an engine that halves its chunk once if the plan was too bold."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._compute = computed_by(engine)
        self._halved = False

    def method(self) -> dict[str, Any]:
        """What the sums of a group depend on: strategies and chunks agree within rounding alone."""
        engine = self.engine
        return {"strategy": engine.strategy, "chunk": engine.chunk, "stride": engine.stride}

    def go_on_by(self, method: Mapping[str, Any]) -> None:
        """Compute as an earlier start of this run did, on whatever machine that was."""
        if method == self.method():
            return
        self.engine = replace(self.engine, **method)
        self._compute = computed_by(self.engine)
        say("engine", **method, why="of the checkpoint: another one would round otherwise")

    def __call__(
        self, algorithm: Algorithm, model: Model, params: Params, tasks: Sequence[Task]
    ) -> GroupGradient:
        """The gradient of a group.

        Raises:
            TrainingError: there is too little memory for the smaller chunk too.
        """
        try:
            return self._compute(algorithm, model, params, tasks, self.engine)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.engine = self._smaller(len(tasks), str(error))
            self._compute = computed_by(self.engine)  # drops what was recorded for larger chunks
        return self(algorithm, model, params, tasks)

    def _smaller(self, num_tasks: int, why: str) -> Engine:
        size = (self.engine.chunk or num_tasks) if self.engine.at_once else 1
        said = why.splitlines()[0].rstrip(".")
        if self._halved or size == 1:
            advice = ["take smaller episodes or fewer workers"]
            if size > 1:
                advice.insert(0, "lower meta_train.engine.chunk")
            if self.engine.strategy != "split":
                advice.insert(0, "set meta_train.engine.strategy to split, which needs least")
            raise TrainingError(
                f"out of memory with {size} task(s) at once by strategy {self.engine.strategy!r}: "
                f"{said}. To mend it, {', or '.join(advice)}."
            ) from None
        self._halved = True
        say("engine", out_of_memory=said, chunk=size // 2)
        return replace(self.engine, chunk=size // 2)
