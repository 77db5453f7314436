"""What every row of the table of domains must do."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.domains.base import SPLITS, Domain, Frame
from pipeline.domains.glyphs import GlyphsConfig
from pipeline.domains.image_folder import ImageFolderConfig
from pipeline.domains.omniglot import OmniglotConfig
from pipeline.domains.table import DOMAINS

PACKAGES = {"font-caladea": "0.0.2", "font-source-serif-pro": "0.0.1", "font-roboto": "0.0.1"}
CONTRACT = [
    ("glyphs", GlyphsConfig(packages=PACKAGES)),
    ("image_folder", ImageFolderConfig()),
    ("omniglot", OmniglotConfig(num_val_alphabets=1, rotations="train_only")),
]


def write_raw(root: Path) -> None:
    """A source that both file domains can read: three levels of folders of small pictures."""
    rng = np.random.default_rng(0)
    for part in ("images_background", "images_evaluation"):
        for alphabet in "ABCDEF":
            for character in range(3):
                folder = root / part / f"{part[7]}{alphabet}" / f"character{character:02d}"
                folder.mkdir(parents=True)
                for drawer in range(5):
                    buffer = io.BytesIO()
                    noise = rng.integers(0, 256, (30, 30), dtype=np.uint8)
                    Image.fromarray(noise).save(buffer, "PNG")
                    (folder / f"{drawer:02d}.png").write_bytes(buffer.getvalue())


@pytest.fixture(params=CONTRACT, ids=[name for name, _ in CONTRACT])
def domain(request: pytest.FixtureRequest, tmp_path: Path) -> Domain:
    name, config = request.param
    write_raw(tmp_path)
    source = tmp_path / "images_background" if name == "image_folder" else tmp_path
    return DOMAINS[name](config, Frame(source, image_size=20, channels=3, min_examples=5, seed=3))


def test_the_battery_is_complete() -> None:
    assert {name for name, _ in CONTRACT} == set(DOMAINS)


def test_it_is_a_domain(domain: Domain) -> None:
    assert isinstance(domain, Domain)


def test_a_plan_is_the_same_every_time(domain: Domain) -> None:
    assert domain.plan() == domain.plan()


def test_jobs_cover_every_example_once(domain: Domain) -> None:
    plan = domain.plan()
    covered = [job.first + i for job in plan.jobs for i in range(len(job.items))]
    assert sorted(covered) == list(range(len(plan.examples)))


def test_every_split_has_classes_of_enough_examples_and_no_class_is_in_two(domain: Domain) -> None:
    examples = domain.plan().examples
    homes = {(e.class_name, e.split, e.group) for e in examples}
    assert len(homes) == len({name for name, _, _ in homes})
    assert {split for _, split, _ in homes} == set(SPLITS)
    assert min(Counter(e.class_name for e in examples).values()) >= 5


def test_an_example_is_named_once_in_its_class(domain: Domain) -> None:
    names = [(e.class_name, e.name) for e in domain.plan().examples]
    assert len(set(names)) == len(names)


def test_drawing_gives_pictures_of_the_frame_and_accounts_for_every_item(domain: Domain) -> None:
    for job in domain.plan().jobs[:3]:
        drawn = domain.draw(job)
        assert drawn.pixels.shape == (len(drawn.kept), 3, 20, 20)
        assert drawn.pixels.dtype == np.uint8
        assert sorted([*drawn.kept, *drawn.refused]) == list(range(len(job.items)))
        assert set(drawn.converted) <= set(drawn.kept)
        assert (drawn.pixels.reshape(len(drawn.kept), -1).std(axis=1) > 0).all()


def test_drawing_is_a_pure_function_of_the_job(domain: Domain) -> None:
    """Sent to another process, in another order, or one by one, a job is drawn the same."""
    sent = pickle.loads(pickle.dumps(domain))
    job = domain.plan().jobs[-1]
    whole = domain.draw(job).pixels
    assert np.array_equal(sent.draw(job).pixels, whole)
    turned = type(job)(job.source, 0, job.items[::-1])
    assert np.array_equal(sent.draw(turned).pixels, whole[::-1])
    for position in (0, len(job.items) - 1):
        alone = domain.draw(type(job)(job.source, 0, job.items[position : position + 1]))
        assert np.array_equal(alone.pixels[0], whole[position])


def test_the_seed_moves_held_out_classes_only(domain: Domain) -> None:
    other = type(domain)(
        domain.config,
        Frame(**{**vars(domain.frame), "seed": 4}),  # type: ignore[attr-defined]
    )
    first, second = domain.plan().examples, other.plan().examples
    assert {e.class_name.partition("/rot")[0] for e in first} == {
        e.class_name.partition("/rot")[0] for e in second
    }
