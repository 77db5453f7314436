"""Signatures of bundles by OpenSSF's `model-signing`, with a key of one's own and no network.

A signature is one file beside a bundle: a Sigstore bundle whose statement names every file with
its SHA-256. Records of promotions are signed with the same key, as statements of another type
(DSSE), so that neither can be taken for the other.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import ArtefactError, ConfigError, MachineError
from pipeline.core.files import MANIFEST, write_bytes
from pipeline.deploy.bundle import Bundle, load_bundle

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

KEY_VARIABLE = "METALOOM_SIGNING_KEY"
"""Path of the private key; where it is set, what is registered and promoted is signed."""
SIGNATURE = "bundle.sig"
"""Its name beside the bundle in the registry."""
MAX_SIGNATURE_BYTES = 100_000
"""One of a bundle's five files has 2,500."""
_RECORD_TYPE = "application/vnd.metaloom.promotion+json"
_MAKE_KEYS = "docs/serving.md says how to make a pair of keys"


class SignatureError(ArtefactError):
    """A signature is absent, not by the key, or not of this. A new one mends it; bytes need not."""


def signing_key() -> Path | None:
    """The private key of METALOOM_SIGNING_KEY; None where that is not set.

    Raises:
        ConfigError: it is no private key that can sign, or others can read it.
        MachineError: `model-signing` is not installed.
    """
    named = os.environ.get(KEY_VARIABLE)
    if not named:
        return None
    _require_extra()
    path = Path(named)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(
            f"{KEY_VARIABLE} names {path}, which cannot be read ({error.strerror}); {_MAKE_KEYS}."
        ) from None
    if not stat.S_ISREG(mode) or stat.S_IMODE(mode) & 0o077:
        raise ConfigError(
            f"{KEY_VARIABLE} names {path}, which others than its owner may read. "
            f"`chmod 600 {path}`, and make new keys if somebody may have read it."
        )
    _private_key(path)
    return path


def sign(folder: Path, private_key: Path) -> str:
    """Sign a bundle: the text of the signature, which belongs beside it.

    Raises:
        ArtefactError: it is not whole.
        ConfigError: the key cannot sign.
    """
    _require_extra()
    from model_signing import signing

    load_bundle(folder)
    _private_key(private_key)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / SIGNATURE
        config = signing.Config().set_hashing_config(_every_file())
        config.use_elliptic_key_signer(private_key=private_key).sign(folder, target)
        return target.read_text(encoding="utf-8")


def check_signature(folder: Path, signature: str | None, public_key: Path) -> str:
    """Whether a signature is by this key, and of exactly this folder; nothing else is parsed.

    Returns:
        The digest of the bundle that was signed, for `load_bundle`.

    Raises:
        SignatureError: it is not, or there is none.
        ArtefactError: the folder holds what no bundle holds.
        ConfigError: the public key cannot be used.
    """
    digest = check_claim(signature, public_key, what=str(folder))
    from model_signing import verifying

    # An empty folder has no hash, so the signature would not miss it.
    if odd := [p for p in _entries(folder) if p.is_symlink() or not p.is_file()]:
        raise ArtefactError(f"{odd[0]} is no plain file, and a bundle holds nothing else.")
    with tempfile.TemporaryDirectory() as scratch:
        (beside := Path(scratch) / SIGNATURE).write_text(signature or "", encoding="utf-8")
        config = verifying.Config().set_hashing_config(_every_file())
        with _refused(str(folder)):
            config.use_elliptic_key_verifier(public_key=public_key).verify(folder, beside)
    return digest


def check_claim(signature: str | None, public_key: Path, *, what: str) -> str:
    """What a signature says of itself: that it is by this key, and of which bundle.

    Nothing of it is proved. It tells what is plainly wrong before anything is downloaded.

    Args:
        what: names the bundle in errors.

    Raises:
        SignatureError: there is none, it is by another key, or it is of no bundle.
        ConfigError: the public key cannot be used.
    """
    key = read_public_key(public_key)
    if signature is None:
        raise SignatureError(
            f"{what} is not signed. Sign it: `{KEY_VARIABLE}=KEY.pem metaloom release`."
        )
    with _refused(what):
        told = json.loads(signature)
        hint = told["verificationMaterial"]["publicKey"]["hint"]
        statement = json.loads(base64.b64decode(told["dsseEnvelope"]["payload"]))
        files = {one["name"]: one["digest"] for one in statement["predicate"]["resources"]}
        digest = str(files[MANIFEST])
    if hint != hashlib.sha256(_pem(key)).hexdigest():
        raise SignatureError(
            f"{what} is signed by another key than {public_key}. Sign it with the key that belongs "
            f"to that: `{KEY_VARIABLE}=KEY.pem metaloom release`."
        )
    return digest


def open_signed(folder: Path, digest: str | None, public_key: Path | None) -> Bundle:
    """Open a bundle whose signature lies beside it; where no key is named, any whole one.

    Raises:
        SignatureError: the signature is absent, by another key or of another bundle.
        ArtefactError: the bundle is not whole, or not that of the digest.
    """
    if public_key is None:
        return load_bundle(folder, digest=digest)
    signed = check_signature(folder, read_signature(folder), public_key)
    _check_same(signed, digest, folder)
    return load_bundle(folder, digest=signed)


def check_is_of(signature: str | None, digest: str, public_key: Path, *, what: str) -> None:
    """Refuse what cannot be this bundle's signature, before the bundle is there.

    Raises:
        SignatureError: as `check_claim`, or it is of another bundle.
    """
    _check_same(check_claim(signature, public_key, what=what), digest, what)


def beside(folder: Path) -> Path:
    """Where the signature of a bundle on a disk is: `<folder>.sig`."""
    return folder.with_name(folder.name + ".sig")


def read_signature(folder: Path) -> str | None:
    """The signature beside a bundle; None where there is none, or what cannot be one."""
    path = beside(folder)
    if not path.is_file() or path.stat().st_size > MAX_SIGNATURE_BYTES:
        return None
    return path.read_bytes().decode(errors="replace")


def keep_signature(folder: Path, signature: str) -> None:
    """Lay a signature beside its bundle."""
    write_bytes(beside(folder), signature.encode())


def sign_record(content: bytes, private_key: Path) -> str:
    """Sign what a record of a promotion says; base64, for a tag.

    Raises:
        ConfigError: the key cannot sign.
    """
    from cryptography.hazmat.primitives.asymmetric import ec

    key = _private_key(private_key)
    signed = key.sign(_as_dsse(content), ec.ECDSA(_hash_for(key.public_key())))
    return base64.b64encode(signed).decode()


def is_signed_record(content: bytes, signature: str, public_key: Path) -> bool:
    """Whether a record of a promotion was signed by the key that belongs to this one."""
    return _holds(content, signature, read_public_key(public_key))


def was_signed_with(content: bytes, signature: str, private_key: Path) -> bool:
    """Whether a record of a promotion was signed by this key."""
    return _holds(content, signature, _private_key(private_key).public_key())


def _holds(content: bytes, signature: str, key: EllipticCurvePublicKey) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key.verify(base64.b64decode(signature), _as_dsse(content), ec.ECDSA(_hash_for(key)))
        return True
    except (InvalidSignature, ValueError):
        return False


def read_public_key(path: Path) -> EllipticCurvePublicKey:
    """The public key that a service trusts.

    Raises:
        ConfigError: it is none of the kind that `model-signing` takes.
        MachineError: `model-signing` is not installed.
    """
    _require_extra()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{path} is no public key (PEM): {type(error).__name__}; {_MAKE_KEYS}."
        ) from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{path} is no public key of an elliptic curve; {_MAKE_KEYS}.")
    _check_curve(key, path)
    return key


def _private_key(path: Path) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, TypeError, ValueError, UnsupportedAlgorithm) as error:
        # Not the reason's own words: they may quote the file.
        raise ConfigError(
            f"{path} is no private key (PEM, without a password): {type(error).__name__}; "
            f"{_MAKE_KEYS}."
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is no private key of an elliptic curve; {_MAKE_KEYS}.")
    _check_curve(key.public_key(), path)
    return key


def _check_curve(key: EllipticCurvePublicKey, path: Path) -> None:
    if key.curve.name not in _HASHES:
        raise ConfigError(f"{path} is of the curve {key.curve.name}; {_MAKE_KEYS}.")


_HASHES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
"""As `model-signing` pairs them."""


def _hash_for(key: EllipticCurvePublicKey) -> Any:
    from cryptography.hazmat.primitives import hashes

    return getattr(hashes, _HASHES[key.curve.name])()


def _pem(key: EllipticCurvePublicKey) -> bytes:
    from cryptography.hazmat.primitives import serialization as kinds

    return key.public_bytes(kinds.Encoding.PEM, kinds.PublicFormat.SubjectPublicKeyInfo)


def _as_dsse(content: bytes) -> bytes:
    """Pre-authentication encoding of DSSE v1: the type is signed together with the content."""
    head = f"DSSEv1 {len(_RECORD_TYPE)} {_RECORD_TYPE} {len(content)} "
    return head.encode() + content


def _every_file() -> Any:
    """How files are hashed: SHA-256, no links, and git's own files are not passed over."""
    from model_signing import hashing

    return hashing.Config().set_ignored_paths(paths=[], ignore_git_paths=False)


def _entries(folder: Path) -> list[Path]:
    if folder.is_symlink() or not folder.is_dir():
        raise ArtefactError(f"{folder} is not the folder of a bundle. Register the model again.")
    return list(folder.iterdir())


def _check_same(signed: str, digest: str | None, what: Path | str) -> None:
    if digest is not None and signed != digest:
        raise SignatureError(
            f"the signature of {what} is of another bundle ({signed[:12]}…, and this one is "
            f"{digest[:12]}…). Sign this one: `{KEY_VARIABLE}=KEY.pem metaloom release`."
        )


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Whatever a library says of a signature that it does not accept, it is not accepted."""
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise SignatureError(
            f"the signature of {what} does not hold ({reason}). If nobody has altered the bundle, "
            f"sign it again: `{KEY_VARIABLE}=KEY.pem metaloom release`."
        ) from None


def _require_extra() -> None:
    lost = [n for n in ("model_signing", "OpenSSL") if importlib.util.find_spec(n) is None]
    if lost:
        raise MachineError(
            f"{', '.join(lost)} not installed, and signatures are asked for. "
            "Install it: pip install 'metaloom[sign]'."
        )
