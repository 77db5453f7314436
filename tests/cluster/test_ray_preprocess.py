"""A store drawn by a Ray cluster has the bytes of one drawn here, whatever dies meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from pipeline.domains.glyphs import GlyphsConfig
from pipeline.store.build import PreprocessConfig, build_store
from tests.chaos.campaign import Campaign, Try, save
from tests.cluster.conftest import RayCluster
from tests.unit.raw_pictures import write_classes

CLASSES = [f"class{i}" for i in range(12)]


def settings(domain: str, source: Path, **changes: object) -> PreprocessConfig:
    values = {"domain": domain, "source": source, "image_size": 24, "min_examples_per_class": 3}
    if domain == "glyphs":
        known = GlyphsConfig().packages
        few = {name: known[name] for name in ("font-roboto", "font-lato")}
        scripts = {"train_scripts": ["GREEK"], "test_scripts": ["CYRILLIC"]}
        values |= {"min_examples_per_class": 5, "glyphs": {"packages": few, **scripts}}
    return PreprocessConfig.model_validate({**values, **changes})


PROGRAM = """
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from pipeline.runtime.logs import run_main
from pipeline.domains.glyphs import GlyphsConfig
from pipeline.store.build import PreprocessConfig, build_store
from tests.cluster.test_ray_preprocess import Telling

config = PreprocessConfig.model_validate_json(Path(sys.argv[1]).read_text())
run_main(lambda: build_store(config, Path(sys.argv[2]), progress=Telling) and None)
"""


class Telling:
    """A progress bar that prints how many pictures have been drawn."""

    def __init__(self, label: str, *, total: int, unit: str) -> None:
        self.done, self.total = 0, total

    def __enter__(self) -> Telling:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def advance(self, count: int = 1) -> None:
        self.done += count
        print(json.dumps([self.done, self.total]), flush=True)


def begin(
    config: PreprocessConfig, target: Path, cluster: RayCluster, **environment: str
) -> subprocess.Popen[str]:
    """What the stage does, as a process of its own: Ray reads its environment once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    file = target.with_suffix(".json")
    file.write_text(config.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(file), str(target)],
        env={
            **os.environ,
            **cluster.environment,
            "METALOOM_LAUNCHER": "ray_train",
            "PYTHONPATH": os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")]),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def progress_lines(stream: IO[str]) -> Iterator[list[int]]:
    """What `Telling` printed; Ray prints there too."""
    return (json.loads(line) for line in stream if line.startswith("["))


def content(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with 480 pictures, some files of which are none."""
    root = tmp_path_factory.mktemp("raw") / "pictures"
    write_classes(root, CLASSES, count=40)
    for name in CLASSES[:3]:
        (root / name / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    return root


@pytest.mark.parametrize("domain", ["image_folder", pytest.param("glyphs", marks=pytest.mark.slow)])
def test_two_nodes_draw_the_bytes_of_one_machine(
    domain: str, pictures: Path, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    config = settings(domain, pictures)
    report = build_store(config, tmp_path / "here", num_workers=1)
    drawing = begin(config, tmp_path / "there", ray_cluster)
    told, said = drawing.communicate(timeout=250)
    assert drawing.returncode == 0, said
    assert content(tmp_path / "there") == content(tmp_path / "here")
    assert len(told.splitlines()) > 1
    if domain == "image_folder":
        assert sum(entry["count"] for entry in report["dropped_pictures"].values()) == 3


@pytest.mark.slow
def test_a_node_killed_in_the_middle_changes_no_byte(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    """Its jobs are done again by the other one."""
    root = tmp_path / "raw"
    write_classes(root, CLASSES, count=250, size=160)
    config = settings("image_folder", root, image_size=84, channels=3)
    build_store(config, tmp_path / "here")
    record = Campaign("a Ray node killed while a store is drawn")
    drawing = begin(config, tmp_path / "there", ray_cluster)
    assert drawing.stdout is not None
    try:
        told = progress_lines(drawing.stdout)
        first, total = next(told)
        start = time.monotonic()
        ray_cluster.node.kill()
        rest = [done for done, _ in told]
        said = drawing.communicate(timeout=250)[1]
    finally:
        ray_cluster.node.start()
    assert drawing.returncode == 0, said
    same = content(tmp_path / "there") == content(tmp_path / "here")
    record.add(Try(first, rest[-1] == total, same, seconds=time.monotonic() - start))
    record.notes["pictures"] = total
    save(record)
    record.check()
    assert 0 < first < total, "it was killed before or after the work"


@pytest.mark.slow
def test_a_node_that_does_not_see_the_raw_data_is_named(
    pictures: Path, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    config = settings("image_folder", pictures)
    target, elsewhere = tmp_path / "there", str(tmp_path / "not there")
    drawing = begin(config, target, ray_cluster, METALOOM_WORKSPACE=elsewhere)
    _, said = drawing.communicate(timeout=250)
    assert drawing.returncode == 1
    assert "does not see" in said and "Mount the raw data on all nodes" in said
    assert "Traceback" not in said and not target.exists()


@pytest.mark.slow
def test_a_node_that_sees_other_data_is_found_out(
    pictures: Path, ray_cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a relative path the nodes see another folder, with the same names and other pictures."""
    write_classes(tmp_path / "other" / "raw", CLASSES, count=40, first_seed=50_000)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "raw").symlink_to(pictures)
    monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
    monkeypatch.chdir(tmp_path / "own")
    config, elsewhere = settings("image_folder", Path("raw")), str(tmp_path / "other")
    drawing = begin(config, tmp_path / "there", ray_cluster, METALOOM_WORKSPACE=elsewhere)
    _, said = drawing.communicate(timeout=250)
    assert drawing.returncode == 1
    assert "draws raw otherwise than this machine" in said and "Traceback" not in said
    assert not (tmp_path / "there").exists()


@pytest.mark.slow
def test_an_address_where_no_cluster_is_is_an_error(
    pictures: Path, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    config = settings("image_folder", pictures)
    nowhere = {"RAY_ADDRESS": "127.0.0.1:1", "RAY_gcs_rpc_server_reconnect_timeout_s": "1"}
    drawing = begin(config, tmp_path / "there", ray_cluster, **nowhere)
    _, said = drawing.communicate(timeout=250)
    assert drawing.returncode == 1, said
    assert "no Ray cluster could be used at 127.0.0.1:1" in said
