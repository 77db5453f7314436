"""Pictures per second of preprocessing: this machine's pool, Ray tasks, Ray Data.

`python -m benchmarks.preprocess` draws the same jobs in each way, in turn, and compares what comes
back with the pool's. RAY_ADDRESS says which cluster; without it Ray starts on this machine, with as
many CPUs as the pool has processes. Medians over rounds, the first of which warms up and is not
counted; the start of Ray is told apart. Writes benchmarks/results/preprocess.json.

Ray Data is here to be compared with: the product has the tasks (docs/log.md).
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import ray
from PIL import Image

from benchmarks.cases import num_cores
from benchmarks.record import this_machine
from pipeline.core.config import Section
from pipeline.core.files import sha256_bytes, write_json
from pipeline.domains.base import Domain, Drawn, Frame, Job
from pipeline.domains.image_folder import ImageFolder, ImageFolderConfig
from pipeline.runtime.logs import run_main
from pipeline.store.drawing import draw_jobs, limited_memory
from pipeline.store.ray_drawing import draw_on_ray

RECORD = Path("benchmarks/results/preprocess.json")
_CLASSES = 24
Drawing = Callable[[Domain, Sequence[Job]], Iterator[tuple[Job, Drawn]]]


class Row(Section):
    """One way of drawing."""

    way: str
    pictures_per_second: float
    """Median over rounds"""
    minimum: float
    maximum: float
    rounds: int
    pictures: int
    """In a round"""
    jobs: int
    same: bool
    """Whether every picture was that of the pool"""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preprocess", description=__doc__)
    parser.add_argument("--pictures", type=int, default=12_000)
    parser.add_argument("--side", type=int, default=320, help="of the raw JPEGs, in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RECORD)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="metaloom-preprocess-") as name:
        domain = raw_pictures(Path(name), options.pictures, options.side)
        start = time.perf_counter()
        _connect()
        seconds = time.perf_counter() - start
        rows = contest(domain, options.rounds)
        nodes = [{"cpus": node["Resources"].get("CPU", 0)} for node in ray.nodes() if node["Alive"]]
        ray.shutdown()
    for row in rows:
        rate = f"{row.pictures_per_second:8,.0f} ({row.minimum:,.0f} to {row.maximum:,.0f})"
        print(f"{row.way:12} {rate:32} pictures/s, {'same' if row.same else 'OTHER'} bytes")
    print(f"Ray was there after {seconds:.1f} s; its nodes: {nodes}")
    document = {
        "machine": this_machine("cpu").name,
        "ray_start_seconds": round(seconds, 2),
        "nodes": nodes,
        "rows": [row.model_dump(mode="json") for row in rows],
    }
    write_json(options.out, document)


def _connect() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
    else:
        ray.init(
            address="local", num_cpus=num_cores(), include_dashboard=False, log_to_driver=False
        )


def raw_pictures(root: Path, count: int, side: int) -> Domain:
    """Class folders of smooth random JPEGs; 64 different ones, again and again."""
    rng = np.random.default_rng(0)
    contents = []
    for _ in range(64):
        small = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        contents.append(buffer.getvalue())
    for number in range(count):
        folder = root / f"class{number % _CLASSES:02d}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number:06d}.jpg").write_bytes(contents[number % len(contents)])
    frame = Frame(source=root, image_size=84, channels=3, min_examples=2, seed=0)
    return ImageFolder(ImageFolderConfig(), frame)


def draw_with_ray_data(domain: Domain, jobs: Sequence[Job]) -> Iterator[tuple[Job, Drawn]]:
    """The same by Ray Data: a row a job, `flat_map`, and a row a job back."""
    data = ray.data.from_items(
        [{"index": i} for i in range(len(jobs))], override_num_blocks=len(jobs)
    )
    task = partial(_draw_row, domain=ray.put(domain), jobs=ray.put(tuple(jobs)))
    for row in data.map(task).iter_rows():
        job = jobs[row["index"]]
        refused = dict(zip(row["refused"].tolist(), row["reasons"].tolist(), strict=True))
        pixels = np.frombuffer(row["pixels"], np.uint8).reshape(row["shape"])
        yield job, Drawn(pixels, tuple(row["kept"].tolist()), refused)


def _draw_row(row: dict[str, int], *, domain: ray.ObjectRef, jobs: ray.ObjectRef) -> dict:
    with limited_memory():
        drawn = ray.get(domain).draw(ray.get(jobs)[row["index"]])
    return {
        "index": row["index"],
        "pixels": drawn.pixels.tobytes(),
        "shape": np.array(drawn.pixels.shape),
        "kept": np.array(drawn.kept, np.int64),
        "refused": np.array(list(drawn.refused), np.int64),
        "reasons": np.array(list(drawn.refused.values()), dtype=str),
    }


WAYS: dict[str, Drawing] = {
    "pool": partial(draw_jobs, num_workers=num_cores()),
    "Ray tasks": partial(draw_on_ray, num_workers=num_cores()),
    "Ray Data": draw_with_ray_data,
}


def contest(domain: Domain, rounds: int) -> list[Row]:
    """All ways in turn, round by round; the first round warms up."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    jobs = domain.plan().jobs
    pictures = sum(len(job.items) for job in jobs)
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    hashes: dict[str, set[str]] = {way: set() for way in WAYS}
    for _ in range(1 + rounds):
        for way, draw in WAYS.items():
            start = time.perf_counter()
            drawn = list(draw(domain, jobs))
            rates[way].append(pictures / (time.perf_counter() - start))
            hashes[way].add(_hash(drawn))
    return [
        Row(
            way=way,
            pictures_per_second=statistics.median(found[1:]),
            minimum=min(found[1:]),
            maximum=max(found[1:]),
            rounds=rounds,
            pictures=pictures,
            jobs=len(jobs),
            same=hashes[way] == hashes["pool"] and len(hashes[way]) == 1,
        )
        for way, found in rates.items()
    ]


def _hash(drawn: Sequence[tuple[Job, Drawn]]) -> str:
    """Of all pictures, in the order of the plan."""
    ordered = sorted(drawn, key=lambda pair: pair[0].first)
    return sha256_bytes(b"".join(d.pixels.tobytes() for _, d in ordered))


if __name__ == "__main__":
    run_main(main)
