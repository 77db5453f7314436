"""Index-only sampling speed on one core: `python -m benchmarks.sampling [STORE]`.

Prints JSON: episodes per second (median, minimum, maximum of 7 runs) for 5-way 1-shot 15-query and
20-way 1-shot 15-query episodes, drawn in batches of 256 over the training classes.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from pipeline.store.reader import open_store
from pipeline.tasks.sampler import TRAIN_STREAM, class_table, examples_needed, sample
from pipeline.tasks.spec import EpisodeSpec

_BATCH, _BATCHES, _RUNS = 256, 40, 7


def main() -> None:
    """Measure and print."""
    store = open_store(Path(sys.argv[1] if len(sys.argv) > 1 else "data/store/glyphs"))
    rows = []
    for ways in (5, 20):
        spec = EpisodeSpec(ways=ways, shots=1, queries=15)
        table = class_table(store, "train", min_examples=examples_needed(spec))
        rates = []
        for run in range(_RUNS):
            start = time.perf_counter()
            for batch in range(_BATCHES):
                first = (run * _BATCHES + batch) * _BATCH
                indices = np.arange(first, first + _BATCH)
                sample(
                    table, spec, ways=ways, shots=1, seed=0, stream=TRAIN_STREAM, indices=indices
                )
            rates.append(_BATCHES * _BATCH / (time.perf_counter() - start))
        rows.append(
            {
                "case": f"{ways}w1s15q",
                "episodes_per_second": round(statistics.median(rates)),
                "minimum": round(min(rates)),
                "maximum": round(max(rates)),
            }
        )
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
