"""A bundle is opened only when every byte is the sealed one, and nothing in it ever runs."""

from __future__ import annotations

import io
import json
import marshal
import os
import pickle
import random
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.core.errors import ArtefactError, DataError
from pipeline.core.files import MANIFEST, canonical_json, new_folder, read_json, write_json
from pipeline.deploy.bundle import CARD, EVIDENCE, FILES, load_bundle, make_bundle
from pipeline.deploy.request import MAX_QUERIES, EpisodeRequest, answer, parse_request
from pipeline.engine.learner import DESCRIPTION, WEIGHTS
from tests.unit.tiny_learner import (
    NUMBERS,
    SHAPE,
    base64_png,
    picture,
    save,
    tiny_bundle,
    tiny_learner,
)

REPOSITORY = Path(__file__).resolve().parents[2]
NUM_MUTATIONS = 1000
HEADER = {"kind": "metaloom bundle", "format_version": 2}


def test_the_same_learner_and_numbers_make_the_same_bundle(tmp_path: Path) -> None:
    first, second = tiny_bundle(tmp_path), None
    learner = tmp_path / "learner-0"
    second = make_bundle(tmp_path / "again", learner, NUMBERS, domain="toy", card="# A card\n")
    other = make_bundle(tmp_path / "other", learner, NUMBERS, domain="toy", card="# Another\n")
    assert first.digest == second.digest != other.digest
    assert first.weights_digest == other.weights_digest


def test_a_bundle_predicts_what_its_learner_predicts(tmp_path: Path) -> None:
    learner, bundle = tiny_learner(), tiny_bundle(tmp_path)
    support = np.stack([picture(i)[None] for i in range(6)])
    query = np.stack([picture(10 + i)[None] for i in range(4)])
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    expected = learner.predict(learner.adapt(support, labels, 3), query)
    opened = bundle.learner
    assert torch.equal(opened.predict(opened.adapt(support, labels, 3), query), expected)
    assert (bundle.domain, bundle.evaluation) == ("toy", NUMBERS)


def _flip(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice(sorted(FILES | {MANIFEST}))
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _cut(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice(sorted(FILES | {MANIFEST}))
    os.truncate(path, rng.randrange(path.stat().st_size))


def _append(folder: Path, rng: random.Random) -> None:
    with (folder / rng.choice(sorted(FILES | {MANIFEST}))).open("ab") as file:
        file.write(rng.randbytes(rng.randint(1, 8)))


def _add(folder: Path, rng: random.Random) -> None:
    name = rng.choice(
        ["extra.bin", ".hidden", "data.pkl", f"sub/{MANIFEST}", "sub/", "__init__.py"]
    )
    if name.endswith("/"):
        (folder / name).mkdir()
        return
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(rng.randbytes(rng.randrange(8)))


def _remove(folder: Path, rng: random.Random) -> None:
    (folder / rng.choice(sorted(FILES | {MANIFEST}))).unlink()


def _rename(folder: Path, rng: random.Random) -> None:
    first, second = rng.sample(sorted(FILES | {MANIFEST}), 2)
    (folder / first).rename(folder / rng.choice([second, f"{first}.old", first.upper(), "x"]))


def _swap(folder: Path, rng: random.Random) -> None:
    first, second = rng.sample(sorted(FILES), 2)
    (folder / first).rename(folder / "x")
    (folder / second).rename(folder / first)
    (folder / "x").rename(folder / second)


def _link(folder: Path, rng: random.Random) -> None:
    """Even a link to the very same bytes: what it points at can change after the check."""
    path = folder / rng.choice(sorted(FILES | {MANIFEST}))
    outside = folder.with_name(f"{folder.name}-{path.name}")
    shutil.move(path, outside)
    path.symlink_to(outside)


def _edit_manifest(folder: Path, rng: random.Random) -> None:
    manifest = read_json(folder / MANIFEST)
    entry = manifest["files"][rng.choice(sorted(FILES))]
    edits: list[Callable[[], Any]] = [
        lambda: manifest.update(format_version=rng.choice([0, 1, 3, 2.5, None])),
        lambda: manifest.update(note="x"),
        lambda: manifest.pop("kind"),
        lambda: entry.update(bytes=entry["bytes"] + 1),
        lambda: entry.update(bytes=float(entry["bytes"])),
        lambda: entry.update(note="x"),
        lambda: entry.pop("sha256"),
        lambda: manifest["files"].pop(rng.choice(sorted(FILES))),
        lambda: manifest["files"].update({"../outside": entry}),
        lambda: manifest.update(files=[]),
    ]
    rng.choice(edits)()
    write_json(folder / MANIFEST, manifest)


MUTATIONS = [_flip, _cut, _append, _add, _remove, _rename, _swap, _link, _edit_manifest]


def test_no_mutation_is_accepted(tmp_path: Path) -> None:
    """Without the recorded digest: the folder alone gives every change away."""
    sealed = tiny_bundle(tmp_path).folder
    accepted, kinds = [], Counter[str]()
    for seed in range(NUM_MUTATIONS):
        rng = random.Random(seed)
        folder = tmp_path / f"mutant-{seed}"
        shutil.copytree(sealed, folder)
        mutate = rng.choice(MUTATIONS)
        mutate(folder, rng)
        kinds[mutate.__name__] += 1
        try:
            load_bundle(folder)
            accepted.append((seed, mutate.__name__))
        except ArtefactError:
            shutil.rmtree(folder)
    assert (accepted, kinds.total()) == ([], NUM_MUTATIONS)
    assert len(kinds) == len(MUTATIONS)
    load_bundle(sealed)


def test_a_resealed_change_is_refused_by_the_recorded_digest(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    learner = save(tmp_path / "other", tiny_learner(seed=5))
    forged = make_bundle(tmp_path / "forged", learner, NUMBERS, domain="toy", card=bundle.card)
    load_bundle(bundle.folder, digest=bundle.digest)
    with pytest.raises(ArtefactError, match="not the bundle that was registered"):
        load_bundle(forged.folder, digest=bundle.digest)


FIT = {"temperature": 1.25, "split": "val"}


def resealed(target: Path, sealed: Path, *, version: int, evidence: dict[str, Any]) -> Path:
    """A bundle's files under another header and with other evidence."""
    with new_folder(target, **{**HEADER, "format_version": version}) as building:
        for name in FILES:
            shutil.copyfile(sealed / name, building / name)
        (building / EVIDENCE).write_text(canonical_json(evidence))
    return target


def test_the_temperature_comes_with_the_bundle(tmp_path: Path) -> None:
    learner = save(tmp_path / "learner", tiny_learner())
    spoilt = {"setting": "5w1s", "severities": {}}
    target = tmp_path / "bundle"
    made = make_bundle(
        target, learner, NUMBERS, domain="toy", card="#", calibration=FIT, robustness=spoilt
    )
    assert (made.temperature, made.calibration, made.robustness) == (1.25, FIT, spoilt)
    assert made.weights_bytes == (learner / WEIGHTS).stat().st_size
    assert tiny_bundle(tmp_path).temperature == 1.0, "none was fitted"


def test_a_bundle_of_the_first_format_still_serves_and_has_temperature_one(tmp_path: Path) -> None:
    """A champion of before the update must not go dark; each format holds exactly its own."""
    sealed = tiny_bundle(tmp_path).folder
    new = read_json(sealed / EVIDENCE)
    old = {key: new[key] for key in ("domain", "settings")}
    opened = load_bundle(resealed(tmp_path / "old", sealed, version=1, evidence=old))
    assert (opened.temperature, opened.evaluation) == (1.0, NUMBERS)
    for version, evidence in ((1, new), (2, old), (2, {**new, "note": 1})):
        mixed = resealed(tmp_path / "mixed", sealed, version=version, evidence=evidence)
        with pytest.raises(ArtefactError, match=f"of format {version} holds"):
            load_bundle(mixed)
        shutil.rmtree(mixed)
    with pytest.raises(ArtefactError, match="no bundle of format 1 or 2"):
        load_bundle(resealed(tmp_path / "later", sealed, version=3, evidence=new))


@pytest.mark.parametrize("temperature", [0, -1.5, "1.0", None, float("inf"), [1.0], True])
def test_a_temperature_that_cannot_divide_is_refused(tmp_path: Path, temperature: Any) -> None:
    sealed = tiny_bundle(tmp_path).folder
    evidence = {**read_json(sealed / EVIDENCE), "calibration": {"temperature": temperature}}
    target = tmp_path / "bad"
    with new_folder(target, **HEADER) as building:
        for name in FILES:
            shutil.copyfile(sealed / name, building / name)
        (building / EVIDENCE).write_text(json.dumps(evidence))
    with pytest.raises(ArtefactError):
        load_bundle(target)


class Touch:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._canary}",)


def payloads(canary: Path) -> dict[str, bytes]:
    """Bytes that run code in one reader or another."""
    touch = Touch(canary)
    python = f"import os; os.system('touch {canary}')\n"
    pickled = {f"pickle-{p}": pickle.dumps(touch, protocol=p) for p in (0, 2, 5)}
    code = marshal.dumps(compile(python, "x", "exec"))
    saved, legacy, array = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save(touch, saved)
    torch.save(touch, legacy, _use_new_zipfile_serialization=False)
    np.save(array, np.array([touch], dtype=object), allow_pickle=True)
    pt2 = io.BytesIO()
    with zipfile.ZipFile(pt2, "w") as archive:
        archive.writestr("archive/version", "1")
        archive.writestr("archive/serialized_exported_program.json", "{}")
        archive.writestr("archive/serialized_state_dict.pt", pickled["pickle-2"])
        archive.writestr("archive/data.pkl", pickled["pickle-2"])
    return {
        **pickled,
        "torch": saved.getvalue(),
        "torch-legacy": legacy.getvalue(),
        "numpy": array.getvalue(),
        "pt2": pt2.getvalue(),
        "python": python.encode(),
        "yaml": f"!!python/object/apply:os.system ['touch {canary}']\n".encode(),
        "pyc": code,
    }


EXTRA_NAMES = {
    "torch": "model.pt",
    "pt2": "model.pt2",
    "pickle-0": ".metadata",
    "pickle-2": "__0_0.distcp",
    "pickle-5": "python_model.pkl",
    "python": "mlflow_model.py",
    "yaml": "MLmodel",
    "numpy": "weights.npy",
    "torch-legacy": "pytorch_model.bin",
    "pyc": "sitecustomize.pyc",
}
DESCRIPTIONS: list[dict[str, Any]] = [
    {"algorithm": "os.system"},
    {"algorithm": "__import__('os').system"},
    {"backbone": {"name": "pipeline.cli.main", "settings": {}, "image_shape": [1, 12, 12]}},
    {"backbone": {"name": "mlp", "settings": {"loader_module": "x"}, "image_shape": [1, 12, 12]}},
    {"settings": {"loss": "os.system"}},
    {"settings": {"metric": {"__reduce__": ["os.system", "x"]}}},
    {"format_version": 99},
    {"loader_module": "evil"},
]
MLMODEL = """flavors:
  python_function:
    loader_module: evil
    code: code
    data: .
"""


def hostile_folders(root: Path, sealed: Path, canary: Path) -> Iterator[Path]:
    """Sealed like real bundles, with the payload as each part, or beside them."""
    for kind, content in payloads(canary).items():
        for name in (WEIGHTS, DESCRIPTION, EVIDENCE):
            yield _variant(root / f"{kind}-as-{name}", sealed, {name: content})
        yield _variant(root / f"{kind}-beside", sealed, {EXTRA_NAMES[kind]: content})
        plain = _variant(root / f"{kind}-as-manifest", sealed, {})
        (plain / MANIFEST).write_bytes(content)
        yield plain
    for i, change in enumerate(DESCRIPTIONS):
        text = canonical_json({**read_json(sealed / DESCRIPTION), **change})
        yield _variant(root / f"description-{i}", sealed, {DESCRIPTION: text.encode()})
    evil = f"import os; os.system('touch {canary}')\ndef _load_pyfunc(path): return None\n"
    files = {"MLmodel": MLMODEL.encode(), "code/evil.py": evil.encode(), "evil.py": evil.encode()}
    yield _variant(root / "foreign-loader-module", sealed, files)
    yield _variant(root / "deep-json", sealed, {EVIDENCE: b"[" * 100_000})


def _variant(folder: Path, sealed: Path, files: dict[str, bytes]) -> Path:
    with new_folder(folder, **HEADER) as building:
        for name in FILES:
            shutil.copyfile(sealed / name, building / name)
        for name, content in files.items():
            (building / name).parent.mkdir(exist_ok=True)
            (building / name).write_bytes(content)
    return folder


OPEN_THEM = """
import json, pickle, sys
from pathlib import Path
from pipeline.core.errors import ArtefactError
from pipeline.deploy.bundle import load_bundle

good, canary, payload, *hostile = sys.argv[1:]
load_bundle(Path(good))
FORBIDDEN = {"pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork",
             "subprocess.Popen", "ctypes.dlopen"}
FROM_THERE = {"exec", "compile", "import"}
seen, current = [], None

def hook(event, arguments):
    if current is None:
        return
    text = repr(arguments)
    if event in FORBIDDEN or event in FROM_THERE and (current in text or canary in text):
        seen.append([current, event])

sys.addaudithook(hook)
accepted = []
for folder in hostile:
    current = folder
    try:
        load_bundle(Path(folder))
        accepted.append(folder)
    except ArtefactError:
        pass
current = None
ran = Path(canary).exists()
current = "control"
pickle.loads(Path(payload).read_bytes())
current = None
control = [event for folder, event in seen if folder == "control"]
seen = [entry for entry in seen if entry[0] != "control"]
print(json.dumps({"accepted": accepted, "seen": seen, "ran": ran,
                  "control": control, "control_ran": Path(canary).exists()}))
"""


def test_opening_hostile_artefacts_runs_nothing(tmp_path: Path) -> None:
    """With a control: the same payload does run, and is seen, where it is unpickled."""
    sealed, canary = tiny_bundle(tmp_path).folder, tmp_path / "canary"
    hostile = list(hostile_folders(tmp_path / "hostile", sealed, canary))
    payload = tmp_path / "payload"
    payload.write_bytes(payloads(canary)["pickle-2"])
    assert len(hostile) >= 50
    arguments = [str(path) for path in (sealed, canary, payload, *hostile)]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(OPEN_THEM), *arguments],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    assert (result["accepted"], result["seen"], result["ran"]) == ([], [], False)
    assert result["control_ran"] and {"pickle.find_class", "os.system"} <= set(result["control"])


def episode(num_ways: int, num_shots: int, num_queries: int, labels: list[Any]) -> EpisodeRequest:
    support = [
        {"image": base64_png(picture(100 * way + shot)), "label": labels[way]}
        for shot in range(num_shots)
        for way in range(num_ways)
    ]
    return parse_request(
        {"support": support, "query": [base64_png(picture(9000 + i)) for i in range(num_queries)]}
    )


@pytest.mark.parametrize(("num_ways", "num_shots"), [(2, 1), (5, 1), (7, 3), (30, 2)])
def test_any_ways_and_shots_with_labels_as_given(
    tmp_path: Path, num_ways: int, num_shots: int
) -> None:
    """Against the learner asked directly; labels are text and integers mixed."""
    learner = tiny_learner()
    labels: list[Any] = [i if i % 2 else f"class {i}" for i in range(num_ways)]
    request = episode(num_ways, num_shots, 3, labels)
    told = answer(learner, request)
    support = np.stack(
        [picture(100 * w + s)[None] for s in range(num_shots) for w in range(num_ways)]
    )
    query = np.stack([picture(9000 + i)[None] for i in range(3)])
    adapted = learner.adapt(support, torch.arange(num_ways).repeat(num_shots), num_ways)
    expected = learner.predict(adapted, query)
    assert told.classes == labels
    np.testing.assert_array_equal(np.float32(told.probabilities), expected.numpy())
    assert told.labels == [labels[i] for i in expected.argmax(dim=1).tolist()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": []}, "holds 0 queries"),
        ({"query": ["eA=="] * (MAX_QUERIES + 1)}, f"1 to {MAX_QUERIES} are allowed"),
        ({"support": [{"image": "eA==", "label": "a"}]}, "holds 1 different labels"),
        ({"query": ["not base64!"]}, r"query\[0\]: the image is not base64"),
        ({"query": [base64_png(picture(0))[:40]]}, r"query\[0\]: the picture was refused"),
        ({"support": [{"image": "eA=="}]}, r"support\[0\].label: Field required"),
        ({"support": [{"image": "eA==", "label": 1.5}]}, r"support\[0\].label"),
        ({"sopport": []}, "sopport: Extra inputs"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(change: dict[str, Any], message: str) -> None:
    request = episode(2, 1, 1, ["a", "b"]).model_dump()
    with pytest.raises(DataError, match=message):
        answer(tiny_learner(), parse_request({**request, **change}))


def test_pictures_of_any_size_and_a_data_url_are_taken() -> None:
    """A browser's data URL is the same picture; a larger one is resized to the learner's."""
    request = episode(2, 1, 1, ["a", "b"])
    url = request.model_copy(update={"query": [f"data:image/png;base64,{request.query[0]}"]})
    learner = tiny_learner()
    assert answer(learner, url) == answer(learner, request)
    large = np.kron(picture(9000), np.ones((SHAPE[1], SHAPE[2]), dtype=np.uint8))
    resized = request.model_copy(update={"query": [base64_png(large.astype(np.uint8))]})
    (row,) = answer(learner, resized).probabilities
    assert sum(row) == pytest.approx(1, abs=1e-6)


def test_the_card_is_part_of_what_is_sealed(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    (bundle.folder / CARD).write_text("# Much better\n")
    with pytest.raises(ArtefactError, match=r"altered|size"):
        load_bundle(bundle.folder)
