"""Signed bundles: 1,000 alterations and 0 of them accepted (M2); whose signature it is (M3)."""

from __future__ import annotations

import base64
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("model_signing", reason="the extra `sign` is not installed")

from pipeline.core.errors import ArtefactError, ConfigError, MachineError
from pipeline.core.files import MANIFEST, seal
from pipeline.deploy import signing
from pipeline.deploy.bundle import FILES, Bundle
from pipeline.deploy.promotions import Record, as_tags, from_tags, signed_content
from pipeline.deploy.signing import (
    KEY_VARIABLE,
    SignatureError,
    check_signature,
    is_signed_record,
    keep_signature,
    open_signed,
    read_public_key,
    sign,
    sign_record,
    signing_key,
    was_signed_with,
)
from tests.unit.signing_keys import Keys, make_keys
from tests.unit.tiny_learner import tiny_bundle

NUM_ALTERATIONS = 1000
NAMES = sorted(FILES | {MANIFEST})


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return make_keys(tmp_path_factory.mktemp("keys"), "other")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("signed"), 0)


@pytest.fixture(scope="module")
def signature(bundle: Bundle, keys: Keys) -> str:
    return sign(bundle.folder, keys.private)


def flip(folder: Path, chance: random.Random) -> None:
    path = folder / chance.choice(NAMES)
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def cut(folder: Path, chance: random.Random) -> None:
    path = folder / chance.choice(NAMES)
    os.truncate(path, chance.randrange(path.stat().st_size))


def append(folder: Path, chance: random.Random) -> None:
    with (folder / chance.choice(NAMES)).open("ab") as file:
        file.write(chance.randbytes(chance.randint(1, 9)))


def add(folder: Path, chance: random.Random) -> None:
    names = ["more.py", ".gitignore", ".gitattributes", "model.sig", f"x{chance.random()}"]
    (folder / chance.choice(names)).write_bytes(chance.randbytes(chance.randint(0, 9)))


def add_folder(folder: Path, chance: random.Random) -> None:
    made = folder / chance.choice([".git", ".github", "empty"])
    made.mkdir()
    if chance.random() < 0.5:
        (made / "hook").write_text("x")


def remove(folder: Path, chance: random.Random) -> None:
    (folder / chance.choice(NAMES)).unlink()


def rename(folder: Path, chance: random.Random) -> None:
    path = folder / chance.choice(NAMES)
    path.rename(folder / chance.choice([path.name + "x", path.name.upper(), "." + path.name]))


def swap(folder: Path, chance: random.Random) -> None:
    one, other = (folder / name for name in chance.sample(NAMES, 2))
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)


def link(folder: Path, chance: random.Random) -> None:
    """To the very same bytes, or to nothing."""
    path = folder / chance.choice(NAMES)
    kept = folder.parent / "kept"
    shutil.move(path, kept)
    path.symlink_to(kept if chance.random() < 0.7 else folder.parent / "nothing")


def reseal(folder: Path, chance: random.Random) -> None:
    """Altered and sealed anew, so that it is whole by its own manifest."""
    (folder / "card.md").write_text(f"# Another card {chance.random()}\n")
    (folder / MANIFEST).unlink()
    seal(folder, kind="metaloom bundle", format_version=2)


ALTERATIONS: tuple[Callable[[Path, random.Random], None], ...] = (
    *(flip, cut, append, add, add_folder, remove, rename, swap, link, reseal),
)


def altered(bundle: Bundle, folder: Path, number: int) -> tuple[Path, str]:
    """A copy with one alteration, and which kind it is; number i is always the same."""
    shutil.rmtree(folder, ignore_errors=True)
    copy = Path(shutil.copytree(bundle.folder, folder / "bundle"))
    alter = ALTERATIONS[number % len(ALTERATIONS)]
    alter(copy, random.Random(number))
    return copy, alter.__name__


def test_no_alteration_of_a_signed_bundle_is_accepted(
    bundle: Bundle, signature: str, keys: Keys, tmp_path: Path
) -> None:
    assert check_signature(bundle.folder, signature, keys.public) == bundle.digest
    refused: Counter[str] = Counter()
    for number in range(NUM_ALTERATIONS):
        copy, kind = altered(bundle, tmp_path / "altered", number)
        with pytest.raises(ArtefactError):
            check_signature(copy, signature, keys.public)
        refused[kind] += 1
    assert refused.total() == NUM_ALTERATIONS
    assert set(refused) == {one.__name__ for one in ALTERATIONS}


def test_without_the_check_an_altered_bundle_would_be_opened(
    bundle: Bundle, signature: str, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above can fail: its own manifest vouches for what was sealed anew."""
    copy, kind = altered(bundle, tmp_path / "altered", ALTERATIONS.index(reseal))
    assert kind == "reseal"
    keep_signature(copy, signature)
    with pytest.raises(SignatureError, match="does not hold .*Hash mismatch"):
        open_signed(copy, None, keys.public)
    assert open_signed(copy, None, None).digest != bundle.digest
    monkeypatch.setattr(signing, "check_signature", lambda *_: None)
    assert open_signed(copy, None, keys.public).digest != bundle.digest


def test_alterations_of_the_signature_are_not_accepted(
    bundle: Bundle, signature: str, keys: Keys
) -> None:
    """What says the same by other bytes (a space) may be; its statement is still the signed one."""
    chance, refused = random.Random(0), 0
    for _ in range(300):
        at = chance.randrange(len(signature))
        bad = (
            signature[:at]
            + chr(ord(signature[at]) ^ (1 << chance.randrange(7)))
            + signature[at + 1 :]
        )
        try:
            assert check_signature(bundle.folder, bad, keys.public) == bundle.digest
        except SignatureError:
            refused += 1
    assert refused > 270


@pytest.mark.parametrize("bad", [None, "", "{}", "[]", "null", "\x00", "{" * 10_000, '"x"'])
def test_what_is_no_signature_is_refused(bad: str | None, bundle: Bundle, keys: Keys) -> None:
    with pytest.raises(SignatureError, match="not signed|does not hold"):
        check_signature(bundle.folder, bad, keys.public)


def test_a_signature_by_another_key_is_refused(
    bundle: Bundle, keys: Keys, others: Keys, signature: str
) -> None:
    theirs = sign(bundle.folder, others.private)
    check_signature(bundle.folder, theirs, others.public)
    with pytest.raises(SignatureError, match=r"by another key than .*METALOOM_SIGNING_KEY="):
        check_signature(bundle.folder, theirs, keys.public)
    told = json.loads(theirs)  # it says that it is by the right one
    told["verificationMaterial"] = json.loads(signature)["verificationMaterial"]
    with pytest.raises(SignatureError, match="does not hold"):
        check_signature(bundle.folder, json.dumps(told), keys.public)


def test_a_stale_or_swapped_signature_is_refused(
    bundle: Bundle, signature: str, keys: Keys, tmp_path: Path
) -> None:
    later = tiny_bundle(tmp_path, 1)
    with pytest.raises(SignatureError, match="does not hold"):
        check_signature(later.folder, signature, keys.public)
    keep_signature(later.folder, signature)
    with pytest.raises(SignatureError):
        open_signed(later.folder, later.digest, keys.public)
    # A whole other bundle with its own good signature is not the one that was asked for.
    keep_signature(later.folder, sign(later.folder, keys.private))
    assert open_signed(later.folder, later.digest, keys.public).digest == later.digest
    with pytest.raises(SignatureError, match="of another bundle"):
        open_signed(later.folder, bundle.digest, keys.public)


@pytest.mark.parametrize("curve", ["P-384", "P-521"])
def test_longer_keys_work_as_well(curve: str, bundle: Bundle, tmp_path: Path) -> None:
    long = make_keys(tmp_path, "long", curve)
    assert check_signature(bundle.folder, sign(bundle.folder, long.private), long.public)
    assert is_signed_record(b"said", sign_record(b"said", long.private), long.public)


def test_the_tool_of_openssf_agrees(
    bundle: Bundle, signature: str, keys: Keys, tmp_path: Path
) -> None:
    """Ours is good for it, and what it signs is good for us."""
    ours, theirs = tmp_path / "ours.sig", tmp_path / "theirs.sig"
    ours.write_text(signature)
    tool = [sys.executable, "-m", "model_signing"]
    place = ["--signature", str(ours), "--public_key", str(keys.public), str(bundle.folder)]
    subprocess.run([*tool, "verify", "key", *place], check=True, capture_output=True)
    place = ["--signature", str(theirs), "--private_key", str(keys.private), str(bundle.folder)]
    subprocess.run([*tool, "sign", "key", *place], check=True, capture_output=True)
    assert check_signature(bundle.folder, theirs.read_text(), keys.public) == bundle.digest


def test_the_private_key_is_the_owner_s_alone(
    keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert signing_key() is None
    monkeypatch.setenv(KEY_VARIABLE, str(keys.private))
    assert signing_key() == keys.private
    open_to_all = Path(shutil.copy(keys.private, tmp_path / "open.pem"))
    open_to_all.chmod(0o640)
    monkeypatch.setenv(KEY_VARIABLE, str(open_to_all))
    with pytest.raises(ConfigError, match="others than its owner may read.*chmod 600"):
        signing_key()
    monkeypatch.setenv(KEY_VARIABLE, str(tmp_path / "none.pem"))
    with pytest.raises(ConfigError, match="cannot be read .No such file"):
        signing_key()


def test_what_is_no_key_is_named_and_not_quoted(keys: Keys, tmp_path: Path) -> None:
    (secret := tmp_path / "secret.pem").write_text("a secret of another kind")
    secret.chmod(0o600)
    for read in (read_public_key, lambda path: sign_record(b"", path)):
        with pytest.raises(ConfigError, match="no (public|private) key") as told:
            read(secret)
        assert "secret of" not in str(told.value)
    with pytest.raises(ConfigError, match="no public key"):
        read_public_key(keys.private)
    curve = make_keys(tmp_path, "curve", "secp256k1")
    with pytest.raises(ConfigError, match="of the curve secp256k1"):
        read_public_key(curve.public)
    edwards = tmp_path / "ed.pem"
    subprocess.run(
        ["openssl", "genpkey", "-algorithm", "ed25519", "-out", str(edwards)], check=True
    )
    with pytest.raises(ConfigError, match="of an elliptic curve"):
        sign_record(b"", edwards)


RECORD = Record(
    number=7, kind="promote", champion=3, before=2, after=6, token="t", by="me", at="now",
    reason="good\n", bundle="b" * 64,
)  # fmt: skip


@pytest.mark.parametrize("tag", [*as_tags(RECORD), "model"])
def test_a_signature_of_a_record_covers_all_that_it_says(
    tag: str, keys: Keys, others: Keys
) -> None:
    signed = sign_record(signed_content(RECORD, "tiny"), keys.private)
    tags = {**as_tags(RECORD), "signature": signed, "alias": "done"}

    def holds(tags: dict[str, str], model: str = "tiny") -> bool:
        read = from_tags(99, tags, 1.0)
        assert read is not None
        content = signed_content(read, model)
        assert not is_signed_record(content, read.signature, others.public)
        assert was_signed_with(content, read.signature, keys.private) == is_signed_record(
            content, read.signature, keys.public
        )
        return is_signed_record(content, read.signature, keys.public)

    assert holds(tags), "the alias's mark and the record's number are set later"
    if tag == "model":
        assert not holds(tags, "other")
        return
    changed = {"kind": "rollback"}.get(tag, "1" if tags[tag].isdecimal() else "changed")
    assert not holds({**tags, tag: changed})
    assert not holds({**tags, "signature": ""}) and not holds({**tags, "signature": "%%"})


def test_a_signature_of_a_bundle_is_none_of_a_record(signature: str, keys: Keys) -> None:
    envelope = json.loads(signature)["dsseEnvelope"]
    payload = base64.b64decode(envelope["payload"])
    assert not is_signed_record(payload, envelope["signatures"][0]["sig"], keys.public)


def test_without_the_extra_whoever_asks_for_signatures_is_told(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv(KEY_VARIABLE, str(keys.private))
    for ask in (signing_key, lambda: read_public_key(keys.public)):
        with pytest.raises(MachineError, match=r"pip install 'metaloom\[sign\]'"):
            ask()
    monkeypatch.delenv(KEY_VARIABLE)
    assert signing_key() is None
