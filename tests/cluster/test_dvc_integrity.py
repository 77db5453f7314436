"""Whatever is altered on the way (remote, cache, workspace), training does not begin on it."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml

from infra.local.s3 import file_system
from infra.local.servers import Server
from pipeline.algorithms.nearest_centroid import NearestCentroid
from pipeline.backbones.table import BackboneSpec, build_model, init_params
from pipeline.core.errors import ArtefactError
from pipeline.core.files import new_folder
from pipeline.engine.learner import Learner, Preprocessing, load_learner, save_learner
from pipeline.store.reader import Store, open_store
from pipeline.tasks.frozen import read_episodes
from pipeline.tasks.plan import read_training_stream
from tests.cluster.dvc_machines import REMOTE, add_remote, attempt, contents, environment, succeed
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.timeout(900)

SEED = 20
ROUND = 9
"""Objects altered at once; DVC judges each by itself."""
TRIES = {"remote": 34, "cache": 33, "workspace": 33}
STORE, TASKS, PRETRAINED = "data/store/blobs", "data/tasks", "models/pretrained/mlp"
FOLDERS = (STORE, TASKS, PRETRAINED)


def check_tasks(folder: Path) -> None:
    read_training_stream(folder)
    read_episodes(folder, "val")


CHECKS: dict[str, Callable[[Path], object]] = {
    STORE: open_store,
    TASKS: check_tasks,
    PRETRAINED: load_learner,
}
"""What training does with its inputs before its first step."""


@dataclass(frozen=True)
class Project:
    """A repository whose training inputs DVC tracks, on a remote of its own."""

    folder: Path
    env: dict[str, str]
    bucket: str
    files: dict[str, bytes]
    s3: Server

    def another_machine(self, folder: Path) -> dict[str, str]:
        succeed(self.folder, self.env, "git", "clone", "--quiet", str(self.folder), str(folder))
        return environment(folder, self.s3.environment)


def untrained(store: Store) -> Learner:
    spec = BackboneSpec(name="mlp", settings={"hidden": [8]}, image_shape=store.image_shape)
    algorithm = NearestCentroid()
    model = build_model(spec, algorithm.batch_norm)
    own = algorithm.init(model.feature_dim, torch.Generator().manual_seed(0))
    shape = Preprocessing(image_shape=store.image_shape, mean=store.mean, std=store.std)
    origin = {"val_accuracy": 0.5}
    return Learner(algorithm, model, {**init_params(spec, 0), **own}, shape, spec, origin)


def write_params(folder: Path) -> None:
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    params["preprocess"]["domain"] = "blobs"
    params["pretrain"]["candidates"] = ["mlp"]
    params["meta_train"]["outer"] |= {"num_steps": 2, "validate_every": 2, "warmup_steps": 0}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


@pytest.fixture(scope="module")
def project(
    s3: Server, blob_store: Store, blob_tasks: Path, tmp_path_factory: pytest.TempPathFactory
) -> Project:
    folder = tmp_path_factory.mktemp("integrity") / "project"
    shutil.copytree(blob_store.folder, folder / STORE)
    shutil.copytree(blob_tasks, folder / TASKS)
    with new_folder(folder / PRETRAINED, kind="learner") as building:
        save_learner(building, untrained(blob_store))
    write_params(folder)
    env = environment(folder, s3.environment)
    succeed(folder, env, "git", "init", "--quiet")
    succeed(folder, env, "dvc", "init", "--quiet")
    path = f"integrity-{os.getpid()}"
    add_remote(folder, env, f"{s3.environment['METALOOM_S3']}/{path}")
    succeed(folder, env, "dvc", "add", "--quiet", *FOLDERS)
    succeed(folder, env, "dvc", "push", "--quiet")
    succeed(folder, env, "git", "add", "--all")
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.invalid")
    succeed(folder, env, "git", *identity, "commit", "--quiet", "--message", "inputs")
    bucket = s3.environment["METALOOM_S3"].removeprefix("s3://")
    return Project(folder, env, f"{bucket}/{path}", contents(folder, *FOLDERS), s3)


def altered(content: bytes, rng: random.Random) -> bytes:
    """Other bytes, as many: a bit turned over, a run of zeros, or two pieces in each other's place."""
    result = bytearray(content)
    kind, size = rng.randrange(3), min(16, len(content) // 2)
    while result == content:
        first, second = sorted(rng.sample(range(len(content) - size + 1), 2))
        if kind == 0:
            result[first] ^= 1 << rng.randrange(8)
        elif kind == 1:
            result[first : first + size] = bytes(size)
        elif second >= first + size:
            one, two = result[first : first + size], result[second : second + size]
            result[first : first + size], result[second : second + size] = two, one
        if result == content:
            kind = 0
    return bytes(result)


def rounds(files: dict[str, bytes], tries: int, seed: int) -> Iterator[dict[str, bytes]]:
    """Different files at a time, each with its altered bytes; `tries` in all, every file often."""
    rng = random.Random(seed)
    names = rng.sample(sorted(files), len(files))
    while tries:
        chosen = names[: min(ROUND, tries)]
        names = names[len(chosen) :] + chosen
        tries -= len(chosen)
        yield {name: altered(files[name], rng) for name in chosen}


def write_unnoticed(path: Path, content: bytes) -> None:
    """In place: same file, same size, same times of change, same mode."""
    before = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    path.chmod(before.st_mode)
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (
        before.st_ino,
        before.st_size,
        before.st_mtime_ns,
    )


def folder_of(name: str) -> str:
    return next(folder for folder in FOLDERS if name.startswith(f"{folder}/"))


def refuses(root: Path, name: str, check: Callable[[Path], object] | None = None) -> bool:
    """Whether training would refuse the folder that a file lies in."""
    folder = folder_of(name)
    try:
        (check or CHECKS[folder])(root / folder)
    except ArtefactError:
        return True
    return False


def md5(content: bytes) -> str:
    """The name that DVC gives to an object."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@contextmanager
def altered_remote(project: Project, changes: dict[str, bytes]) -> Iterator[None]:
    """Objects of some names hold other bytes."""
    store = file_system(project.s3.environment)

    def put(oid: str, content: bytes) -> None:
        with store.open_output_stream(f"{project.bucket}/files/md5/{oid[:2]}/{oid[2:]}") as file:
            file.write(content)

    for name, content in changes.items():
        put(md5(project.files[name]), content)
    yield
    for name in changes:
        put(md5(project.files[name]), project.files[name])


def cached(root: Path, content: bytes) -> Path:
    oid = md5(content)
    return root / ".dvc/cache/files/md5" / oid[:2] / oid[2:]


@pytest.fixture(scope="module")
def machine(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second machine that has pulled everything, whole."""
    folder = tmp_path_factory.mktemp("machine") / "b"
    env = project.another_machine(folder)
    succeed(folder, env, "dvc", "pull")
    assert contents(folder, *FOLDERS) == project.files
    assert not any(refuses(folder, name) for name in project.files)
    return folder


def test_what_was_altered_on_the_remote_never_arrives(project: Project, tmp_path: Path) -> None:
    refused = arrived = 0
    for number, changes in enumerate(rounds(project.files, TRIES["remote"], SEED)):
        folder = tmp_path / f"b{number}"
        env = project.another_machine(folder)
        with altered_remote(project, changes):
            pulled = attempt(folder, env, "dvc", "pull")
        assert pulled.returncode != 0
        assert "Traceback" not in pulled.stderr
        for name, content in project.files.items():
            here = cached(folder, content).is_file()
            if name in changes:
                assert not here and not (folder / name).exists(), f"seed {SEED}: {name}"
                refused += refuses(folder, name)
            else:
                arrived += here
    print(f"remote: {refused} of {TRIES['remote']} refused; {arrived} whole objects arrived")
    assert refused == TRIES["remote"]
    assert arrived > 0


def test_what_was_altered_in_the_cache_is_not_trained_on(project: Project, machine: Path) -> None:
    """DVC checks it out and calls it up to date, for size and times are as it remembers them."""
    env = environment(machine, project.s3.environment)
    refused = unnoticed = 0
    for changes in rounds(project.files, TRIES["cache"], SEED + 1):
        for name, content in changes.items():
            write_unnoticed(cached(machine, project.files[name]), content)
        delivered = checked_out(machine, env, changes)
        for name in changes:
            write_unnoticed(cached(machine, project.files[name]), project.files[name])
        checked_out(machine, env, project.files)
        unnoticed += sum(delivered[name] == content for name, content in changes.items())
        refused += count_refused(machine, project, delivered)
    print(f"cache: {refused} of {TRIES['cache']} refused; DVC let {unnoticed} pass")
    assert refused == TRIES["cache"]
    assert unnoticed > 0


def checked_out(
    root: Path, env: dict[str, str], names: Sequence[str] | dict[str, bytes]
) -> dict[str, bytes]:
    """What DVC puts in place of these files."""
    for folder in FOLDERS:
        shutil.rmtree(root / folder, ignore_errors=True)
    attempt(root, env, "dvc", "checkout", "--force")
    return {name: (root / name).read_bytes() if (root / name).is_file() else b"" for name in names}


def count_refused(
    root: Path,
    project: Project,
    changes: dict[str, bytes],
    check: Callable[[Path], object] | None = None,
) -> int:
    """How many of the files, altered one at a time, keep training from beginning."""
    refused = 0
    for name, content in changes.items():
        assert content != project.files[name]
        if content:
            write_unnoticed(root / name, content)
        else:
            (root / name).unlink()  # DVC itself did not deliver it
        refused += refuses(root, name, check)
        (root / name).write_bytes(project.files[name])
    return refused


def test_what_was_altered_in_the_workspace_is_not_trained_on(
    project: Project, machine: Path
) -> None:
    env = environment(machine, project.s3.environment)
    checked_out(machine, env, project.files)
    succeed(machine, env, "dvc", "status")  # it takes note of times and sizes
    refused = 0
    for changes in rounds(project.files, TRIES["workspace"], SEED + 2):
        for name, content in changes.items():
            write_unnoticed(machine / name, content)
        status = succeed(machine, env, "dvc", "status")
        assert "up to date" in status, "DVC saw it by itself: nothing is proved"
        for name in changes:
            write_unnoticed(machine / name, project.files[name])
        refused += count_refused(machine, project, changes)
        checked_out(machine, env, project.files)
        succeed(machine, env, "dvc", "status")
    print(f"workspace: {refused} of {TRIES['workspace']} refused")
    assert refused == TRIES["workspace"]


def a_pixel_altered(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x40]) + content[middle + 1 :]


def read_without_manifest(folder: Path) -> list[bytes]:
    """As any program reads Arrow files: nothing in them vouches for their bytes."""
    tables = [pa.ipc.open_file(path).read_all() for path in sorted(folder.glob("*.arrow"))]
    return [b"".join(t.column("image").chunk(0).storage.buffers()[-1:]) for t in tables]


def test_without_both_walls_an_altered_object_would_be_trained_on(
    project: Project, tmp_path: Path
) -> None:
    """The guard of this file: DVC's default lets it pass, and only our manifest refuses it."""
    name = f"{STORE}/shard-00000.arrow"
    changes = {name: a_pixel_altered(project.files[name])}
    folder = tmp_path / "careless"
    env = project.another_machine(folder)
    succeed(folder, env, "dvc", "remote", "modify", "--local", REMOTE, "verify", "false")
    with altered_remote(project, changes):
        succeed(folder, env, "dvc", "pull")
    assert "up to date" in succeed(folder, env, "dvc", "status")
    assert (folder / name).read_bytes() == changes[name]
    assert read_without_manifest(folder / STORE) != read_without_manifest(project.folder / STORE)
    assert refuses(folder, name)
    assert not refuses(folder, name, read_without_manifest)
    assert count_refused(folder, project, changes) == 1
    assert count_refused(folder, project, changes, read_without_manifest) == 0


@pytest.mark.parametrize("where", [None, STORE, TASKS, PRETRAINED])
def test_the_real_stage_begins_only_on_what_was_hashed(
    where: str | None, project: Project, machine: Path
) -> None:
    """`None` is the control: with whole inputs the same command trains."""
    env = {
        **environment(machine, project.s3.environment),
        "PYTHONPATH": str(REPOSITORY),
        "METALOOM_TRACKING": "off",
        "METALOOM_NUM_WORKERS": "1",
    }
    checked_out(machine, env, project.files)
    if where is not None:
        names = [n for n in project.files if n.startswith(where) and "manifest" not in n]
        name = max(names, key=lambda n: len(project.files[n]))
        write_unnoticed(machine / name, a_pixel_altered(project.files[name]))
    done = attempt(machine, env, "python", "-m", "stages.meta_train")
    trained = (machine / "models/meta").exists()
    checkpoints = list(machine.glob(".metaloom/checkpoints/*/step-*"))
    for left in ("models/meta", ".metaloom/checkpoints"):
        shutil.rmtree(machine / left, ignore_errors=True)
    if where is None:
        assert done.returncode == 0 and trained, done.stderr[-3000:]
        return
    assert done.returncode != 0 and not trained and not checkpoints
    assert "was altered: its SHA-256 is not the recorded one" in done.stderr
    assert Path(name).name in done.stderr
    assert '"event": "meta-train' not in done.stderr
