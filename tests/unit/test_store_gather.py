"""Gathering is indexing into all shards laid end to end; a row outside raises and never wraps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import ArtefactError
from pipeline.store.reader import Store, StoredClass, open_store
from pipeline.store.writer import StoreContent, write_store

NUM_ROWS = 45


@pytest.fixture(scope="module", params=[(7, (3, 5, 7)), (20, (1, 28, 28)), (45, (1, 1, 1))])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Seven shards, three or one; pictures of an odd number of bytes, of a round one, of one."""
    rows_per_shard, shape = request.param
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_ROWS, *shape), np.uint8)
    splits = ["train", "val", "test"]
    classes = tuple(StoredClass(s, s, s, 15 * i, 15) for i, s in enumerate(splits))
    names = [f"row {row}" for row in range(NUM_ROWS)]
    content = StoreContent("test", classes, pixels, np.arange(NUM_ROWS), names)
    folder = tmp_path_factory.mktemp("stores") / "store"
    write_store(folder, content, rows_per_shard=rows_per_shard, report={})
    return open_store(folder)


def end_to_end(store: Store) -> np.ndarray:
    return np.concatenate(store._images)


@given(data=st.data(), kind=st.sampled_from([np.int64, np.int32, np.uint8, np.uint64]))
def test_gather_indexes_the_shards_laid_end_to_end(
    store: Store, data: st.DataObject, kind: type[np.integer]
) -> None:
    shape = data.draw(st.sampled_from([(), (1,), (90,), (3, 4), (0,), (2, 0)]))
    size = int(np.prod(shape))
    rows = data.draw(st.lists(st.integers(0, NUM_ROWS - 1), min_size=size, max_size=size))
    index = np.array(rows, dtype=kind).reshape(shape)
    found = store.gather(index)
    assert np.array_equal(found, end_to_end(store)[index.astype(np.int64)])
    assert found.dtype == np.uint8
    assert found.flags.writeable and found.flags.c_contiguous


def test_gather_takes_rows_that_do_not_lie_together(store: Store) -> None:
    rows = np.arange(NUM_ROWS)[::-3]
    assert not rows.flags.c_contiguous
    assert np.array_equal(store.gather(rows), end_to_end(store)[rows])


@pytest.mark.parametrize("outside", [-1, -NUM_ROWS, NUM_ROWS, 10 * NUM_ROWS, 2**62, -(2**63)])
@pytest.mark.parametrize("where", [0, 3])
def test_a_row_outside_the_store_is_refused_by_number(
    store: Store, outside: int, where: int
) -> None:
    rows = np.array([4, 8, 15, 16])
    rows[where] = outside
    for use in (store.gather, store.names, store.checked):
        with pytest.raises(ArtefactError, match=f"rows 0 to 44; row {outside} was asked for"):
            use(rows)


def test_names_follow_the_rows(store: Store) -> None:
    rows = np.array([[44, 0], [7, 20]])
    assert store.names(rows) == ["row 44", "row 0", "row 7", "row 20"]
