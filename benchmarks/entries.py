"""Who takes part in which case: peers as they are used, and ours the way Metaloom runs."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.cases import Case, Contestant, Device
from pipeline.core.functional import Precision

_LOOPS = ("eager", "higher", "torchopt")
_PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def entrants(case: Case, device: Device, cores: int) -> list[Contestant]:
    """The contestants of a case on this device; none where the case does not apply."""
    found = _on_gpu(case) if device == "cuda" else _on_cpu(case, cores)
    return list(dict.fromkeys(found))


def _on_cpu(case: Case, cores: int) -> Iterable[Contestant]:
    """Peers: one process, all cores as threads, and one thread. Ours: one-thread processes."""
    all_cores = min(cores, case.groups)
    if case.number in (1, 5, 7):
        yield Contestant(engine="auto", workers=all_cores)
    match case.number:
        case 1:
            yield from _peers((*_LOOPS, "functorch"), cores)
            yield from _peers(_LOOPS, 1)
            yield _core_for_core("eager", all_cores)
            yield Contestant(engine="eager", precision="bf16", threads=cores)
            yield from (Contestant(engine=name) for name in ("loop", "split", "vmap"))
            yield from _ours(("loop", "split"), all_cores)
        case 2:
            yield from _peers(_LOOPS, cores)
            yield _core_for_core("eager", all_cores)
            yield from _ours(("loop",), all_cores)
        case 3 | 4:
            yield from _peers(_LOOPS, cores)
            yield from _ours(("loop", "split"), all_cores)
        case 5:
            yield from _peers((*_LOOPS, "functorch"), cores)
            yield from _peers(("eager", "functorch"), 1)
            yield from (Contestant(engine=name) for name in ("loop", "vmap", "vmap_split"))
            yield from _ours(("vmap",), all_cores, precisions=("fp32",))
        case 6:
            yield from (Contestant(engine=name) for name in ("eager", "split"))
        case 7:
            yield from _peers(("plain",), cores)
            yield from _peers(("plain",), 1)
            yield _core_for_core("plain", all_cores)
            yield Contestant(engine="loop")
            yield from _ours(("loop",), all_cores)
        case 8 if cores > 1:
            for name in ("loop", "split"):
                if case.meta_batch == 32:
                    yield Contestant(engine=name)
                yield Contestant(engine=name, workers=2)
        case 9:
            yield Contestant(engine="meta_train")
            if all_cores > 1:
                yield Contestant(engine="meta_train", workers=all_cores)


def _on_gpu(case: Case) -> Iterable[Contestant]:
    """One process each: more of them on one card would only share it."""
    if case.number == 8:
        return
    if case.number == 9:
        yield Contestant(engine="meta_train", device="cuda")
        return
    if case.number == 6:
        for name in ("eager", "split", "vmap_split"):
            yield Contestant(engine=name, device="cuda")
        return
    peers = ("plain",) if case.number == 7 else (*_LOOPS, "functorch")
    for name in peers:
        yield Contestant(engine=name, device="cuda")
    reduced = _PRECISIONS if case.number != 5 else ("fp32",)
    if "bf16" in reduced:
        for name in dict.fromkeys([peers[0], peers[-1]]):
            yield Contestant(engine=name, precision="bf16", device="cuda")
    splits = ("split", "vmap_split") if case.number in (1, 3, 4, 5) else ()
    for name in ("auto", "loop", "vmap", *splits):
        for precision in ("fp32", "tf32", *reduced[1:]):
            yield Contestant(engine=name, precision=precision, device="cuda")


def _peers(names: Iterable[str], threads: int) -> Iterable[Contestant]:
    """One process each."""
    for name in names:
        yield Contestant(engine=name, threads=threads)


def _core_for_core(name: str, processes: int) -> Contestant:
    """A peer as nobody runs it: a process of one thread for each core, gradients not added up."""
    return Contestant(engine=name, workers=processes)


def _ours(
    names: Iterable[str], workers: int, precisions: Iterable[Precision] = _PRECISIONS
) -> Iterable[Contestant]:
    """In both precisions, shared by so many workers."""
    for name in names:
        for precision in precisions:
            yield Contestant(engine=name, precision=precision, workers=workers)
