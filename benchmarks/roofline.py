"""What the machine could do at best: `python -m benchmarks.roofline` prints its speeds.

A kernel that computes F operations and moves M bytes takes at least max(F / P, M / B) on a machine
of P FLOP/s and B bytes/s. The sum over the kernels of the eager loop is its operation-wise roofline
(after Williams et al., Roofline, 2009), an estimate: a tensor that is still in a cache moves faster
than B.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.cases import Device, num_cores
from pipeline.core.config import Section

FLOAT_BYTES: Mapping[Literal["fp32", "bf16"], int] = {"fp32": 4, "bf16": 2}
_SIZES = (1024, 2048, 4096, 8192, 16384)
_LARGE_SECONDS = 0.1
"""A product that takes longer is large enough: no larger one is tried"""
_COPY_BYTES: Mapping[Device, int] = {"cpu": 2**28, "cuda": 2**31}
"""Far above what caches hold, and above what starting a kernel costs"""
_LEAST_RUNS, _LEAST_SECONDS = 3, 0.5

_ALLOCATIONS = ("aten::empty", "aten::new_empty")
_OVERWRITING = {"aten::copy_", "aten::fill_", "aten::zero_"}
"""Their first tensor is written and not read"""


class Peaks(Section):
    """The speeds of a machine, all of its cores or the whole card, measured."""

    fp32: float
    """FLOP/s of the best square matrix product, PyTorch's default: on a card without TF32"""
    bf16: float
    tf32: float | None = None
    """On a card: fp32 with inputs rounded to TF32, as its tensor cores take them"""
    bytes_per_second: float
    """Of the best large copy, read plus written"""


class Operation(NamedTuple):
    """What one kernel computes and moves."""

    flops: int
    """By PyTorch's own formulas: of matrix products and convolutions; 0 for all others"""
    floats: int
    """Numbers of floating point, read plus written; bytes follow from the precision"""
    other_bytes: int
    """Of indices and masks, read plus written"""

    def num_bytes(self, float_bytes: int) -> int:
        """Moved, if a number takes so many bytes."""
        return self.floats * float_bytes + self.other_bytes


Operations = Mapping[Operation, int]
"""How often each took place"""


class Traffic(TorchDispatchMode):
    """Counts the kernels that run inside of it; views and allocations are none.

    A kernel reads each of its input tensors once and writes each of its outputs once. A tensor
    counts with the elements that it really holds, not those that it was expanded to.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[Operation] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run it, and count it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        if not _is_free(func, inputs, outputs):
            flops = flop_registry.get(func._overloadpacket, _no_flops)
            read = inputs[1:] if func._schema.name in _OVERWRITING else inputs
            moved = [*_parts(read).values(), *_parts(outputs).values()]
            operation = Operation(
                flops=flops(*args, **kwargs, out_val=out),
                floats=sum(count for count, dtype in moved if dtype.is_floating_point),
                other_bytes=sum(
                    count * dtype.itemsize for count, dtype in moved if not dtype.is_floating_point
                ),
            )
            self.operations[operation] += 1
        return out


def total_flops(operations: Operations) -> int:
    """Of all together."""
    return sum(times * operation.flops for operation, times in operations.items())


def total_bytes(operations: Operations, float_bytes: int) -> int:
    """Of all together."""
    return sum(times * operation.num_bytes(float_bytes) for operation, times in operations.items())


def least_seconds(
    operations: Operations, flops_per_second: float, bytes_per_second: float, float_bytes: int
) -> float:
    """Sum over kernels of max(F / P, M / B): one after the other, each at its own limit."""
    return sum(
        times * max(one.flops / flops_per_second, one.num_bytes(float_bytes) / bytes_per_second)
        for one, times in operations.items()
    )


def _no_flops(*args: Any, **kwargs: Any) -> int:
    return 0


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _is_free(func: Any, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> bool:
    """Whether no number moves: a view, or memory that is only allocated."""
    if func._schema.name.startswith(_ALLOCATIONS) or torch.Tag.inplace_view in func.tags:
        return True
    # By storage, since not all that share it say so in their schema (`_unsafe_view`).
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    shared = [tensor.untyped_storage().data_ptr() in own for tensor in outputs]
    return bool(shared) and all(shared) and not func._schema.is_mutable


def _parts(tensors: Sequence[Tensor]) -> dict[Any, tuple[int, torch.dtype]]:
    """Elements and type of each part of a storage; the same part seen twice is one."""
    parts = {}
    for tensor in (one for one in tensors if one.numel()):
        axes = zip(tensor.stride(), tensor.shape, strict=True)
        held = sorted((stride, size) for stride, size in axes if stride and size != 1)
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), *held)
        parts[place] = (math.prod(size for _, size in held), tensor.dtype)
    return parts


# --- the machine -------------------------------------------------------------------------------


def peaks_of(device: Device) -> Peaks:
    """Measured in a process of its own, with a thread for each core."""
    command = [sys.executable, "-m", "benchmarks.roofline", "--device", device]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return Peaks.model_validate_json(done.stdout)


def measure_peaks(
    device: Device, sizes: Sequence[int] = _SIZES, copy_bytes: int | None = None
) -> Peaks:
    """With the threads that this process has; on a card, the whole card.

    Args:
        sizes: of the square matrices, rising.
        copy_bytes: of the tensor that is copied.
    """
    return Peaks(
        fp32=_product_flops_per_second(torch.float32, device, sizes),
        bf16=_product_flops_per_second(torch.bfloat16, device, sizes),
        tf32=_tf32_flops_per_second(device, sizes),
        bytes_per_second=_copy_bytes_per_second(device, copy_bytes or _COPY_BYTES[device]),
    )


def _product_flops_per_second(dtype: torch.dtype, device: Device, sizes: Sequence[int]) -> float:
    best = 0.0
    for size in sizes:
        # Not zeros: a card that multiplies zeros draws less power and clocks higher.
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = _best_seconds(partial(torch.mm, a, b, out=out), device)
        best = max(best, 2 * size**3 / seconds)
        if seconds > _LARGE_SECONDS:
            break
    return best


def _tf32_flops_per_second(device: Device, sizes: Sequence[int]) -> float | None:
    if device != "cuda":
        return None
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return _product_flops_per_second(torch.float32, device, sizes)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _copy_bytes_per_second(device: Device, num_bytes: int) -> float:
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(work: Callable[[], object], device: Device) -> float:
    """Of several runs; the first warms up."""
    runs: list[float] = []
    end = time.perf_counter() + _LEAST_SECONDS
    while len(runs) < _LEAST_RUNS or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        runs.append(time.perf_counter() - start)
    return min(runs)


def main() -> None:
    """Print the speeds of this machine as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.roofline")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    device: Device = parser.parse_args().device
    torch.set_num_threads(num_cores())
    print(measure_peaks(device).model_dump_json())


if __name__ == "__main__":
    main()
