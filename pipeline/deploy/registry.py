"""The model registry: versions, their evidence, and the aliases that say which one serves."""

from __future__ import annotations

import importlib.util
import re
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.core.errors import ArtefactError, MachineError, RegistryError
from pipeline.deploy import signing
from pipeline.deploy.artefacts import download, log_model, signature_at
from pipeline.deploy.bundle import Bundle, load_bundle
from pipeline.deploy.champions import CHALLENGER, CHAMPION, PREVIOUS, Champions
from pipeline.deploy.packing import ARTEFACT
from pipeline.deploy.patience import (
    DEFAULT_PATIENCE,
    Patience,
    Persistent,
    code_of,
    explained,
    state_said,
)
from pipeline.deploy.promotions import NOBODY, Record, Standing
from pipeline.deploy.runs import makers_of, own_run
from pipeline.deploy.versions import (
    BUNDLE_TAG,
    DAMAGED_TAG,
    PASSED,
    SMOKE_TAG,
    TOKEN_TAG,
    WEIGHTS_TAG,
    Version,
    as_version,
)
from pipeline.runtime.mlflow_tracker import connect, shown_uri, tracking_uri

_LONGEST_TAG = 50_000
"""Half of what MLflow takes. The gate's rules have 5,000 characters and more, in four settings."""
_COPIED = re.compile(r"models:/([^/]+)/(\d+)")


class Registry:
    """The versions of one registered model in MLflow; its aliases say what serves."""

    def __init__(self, root: Path, name: str, patience: Patience = DEFAULT_PATIENCE) -> None:
        if importlib.util.find_spec("mlflow") is None:
            raise MachineError(
                "MLflow is not installed. Install it: pip install 'metaloom[track]'."
            )
        self.name = name
        self.uri = tracking_uri(root)
        self.shown = shown_uri(root)
        self._root = root
        self._client = connect(root)
        self._ask = Persistent(self.shown, patience)
        self._champions = Champions(self._client, name, self._ask)

    def find(self, digest: str) -> Version | None:
        """The version that holds this bundle, if it is registered and not known to be damaged."""
        with explained(self.shown):
            found = self._holding(digest)
        numbers = sorted(int(one.version) for one in found if DAMAGED_TAG not in one.tags)
        return self.version(numbers[0]) if numbers else None

    def versions(self) -> list[Version]:
        """All versions, oldest first."""
        found: list[Version] = []
        search = partial(
            self._client.search_model_versions,
            f"name = '{self.name}'",
            order_by=["version_number ASC"],
        )
        token: str | None = None
        with explained(self.shown):
            while token != "":
                page = self._ask(partial(search, page_token=token))
                found += [as_version(self.name, one) for one in page]
                token = page.token or ""
        return found

    def register(
        self,
        bundle: Bundle,
        example: Any,
        *,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> tuple[Version, bool]:
        """Register a bundle unless it is registered; returns the version and whether it is new.

        A version comes to be with all its tags, in one transaction, after its files have been read
        back; one of this bundle whose files are damaged is marked and passed over.

        Args:
            example: a request, kept as the model's input example.
            run_id: the run that it belongs to; without one a run is made for it.
            tags: of the version; set together with it, not afterwards.

        Where METALOOM_SIGNING_KEY is set the bundle is signed, before its version appears.
        """
        signing.signing_key()  # one that cannot be used is told of before anything is written
        again = "Run `dvc repro deploy` again when the registry is back: what is there is found."
        with state_said(f"Nothing of this bundle serves that did not before. {again}"):
            if known := self._whole(bundle.digest):
                self.sign(known)
                return known, False
            with explained(self.shown):
                digest = bundle.digest
                run = run_id or self._ask(lambda: own_run(self._client, self._root, digest))
                model = self._ask(lambda: log_model(self._client, self.name, bundle, example, run))
                self._ask(lambda: self._read_back(model.artifact_path, bundle.digest))
                self._ask(lambda: self._put_signature(model.model_id, bundle))
                own = {BUNDLE_TAG: bundle.digest, WEIGHTS_TAG: bundle.weights_digest}
                made, new = self._create_version(
                    {**(tags or {}), **own},
                    source=model.model_uri,
                    run_id=model.run_id,
                    description=bundle.card,
                    model_id=model.model_id,
                )
                if run_id is None:
                    self._ask(lambda: self._client.set_terminated(run))
        return made, new

    def copy(self, original: Version, tags: Mapping[str, str]) -> tuple[Version, bool]:
        """Make another model's version one of this model too; returns it and whether it is new.

        It has the same files, run and card, and these tags, all in one transaction. A whole version
        of the same bundle that is here already is taken instead.

        Args:
            tags: all that the copy is to have; its bundle's digest among them.
        """
        with state_said("Run the same command again when the registry is back: it is done once."):
            if known := self._whole(original.digest):
                return known, False
            number = str(original.number)
            with explained(self.shown):
                get = partial(self._client.get_model_version, original.name, number)
                found = self._ask(get)
                return self._create_version(
                    tags,
                    source=original.uri,  # as MLflow's own copies have it: its page links there
                    run_id=found.run_id,
                    run_link=found.run_link,
                    description=found.description,
                    model_id=found.model_id,
                )

    def version(self, number: int) -> Version:
        """One version.

        Raises:
            RegistryError: there is none of this number, or the registry does not answer.
        """
        with explained(self.shown):
            try:
                found = self._ask(lambda: self._client.get_model_version(self.name, str(number)))
            except Exception as error:
                if code_of(error) != "RESOURCE_DOES_NOT_EXIST":
                    raise
                raise RegistryError(
                    f"{self.name} has no version {number} (MLflow at {self.shown}). "
                    "`metaloom ui` shows those it has."
                ) from None
        return as_version(self.name, found)

    def aliases(self) -> dict[str, int]:
        """Version number by alias; empty when nothing is registered."""
        with explained(self.shown):
            return self._champions.aliases()

    def standing(self) -> Standing:
        """Who is champion, as a promotion must know it: record and alias are brought together."""
        with explained(self.shown):
            return self._champions.settle()

    def champion(self) -> Version | None:
        """The version that serves, whoever made it so; for those who may only read, the alias's."""
        with explained(self.shown):
            try:
                number = self._champions.settle().champion
            except Exception as error:
                if code_of(error) != "PERMISSION_DENIED":
                    raise
                number = self._champions.aliases().get(CHAMPION, NOBODY)
        return None if number == NOBODY else self.version(number)

    def sign(self, version: Version) -> bool:
        """Sign a version's bundle, if METALOOM_SIGNING_KEY is set; returns whether it is."""
        if signing.signing_key() is None:
            return False
        with tempfile.TemporaryDirectory() as scratch, explained(self.shown):
            bundle = self.fetch(version, Path(scratch) / ARTEFACT)
            source = version.source
            while found := _COPIED.fullmatch(source):  # a copy names the version that it is one of
                get = partial(self._client.get_model_version, found[1], found[2])
                source = self._ask(get).source
            self._ask(lambda: self._put_signature(source.removeprefix("models:/"), bundle))
        return True

    def fetch(self, version: Version, target: Path, signed_by: Path | None = None) -> Bundle:
        """Download a version's bundle, and only that, and open it verified.

        Args:
            signed_by: a public key; then the signature must be by it, and is laid beside `target`.

        Raises:
            ArtefactError: it is not the bundle that was registered, or not signed by that key.
            RegistryError: the version is not one of ours, or cannot be downloaded.
        """
        if not version.digest:
            raise RegistryError(
                f"version {version.number} of {self.name} was not registered by metaloom (it "
                f"has no tag {BUNDLE_TAG}): nothing vouches for it. "
                "Register models with `dvc repro deploy`."
            )
        number = str(version.number)
        with explained(self.shown, f"version {number} of {self.name} cannot be downloaded"):
            base = self._ask(lambda: self._client.get_model_version_download_uri(self.name, number))
            if signed_by is not None:
                signature = self._ask(lambda: signature_at(base))
                what = f"version {number} of {self.name}"
                signing.check_is_of(signature, version.digest, signed_by, what=what)
                signing.keep_signature(target, signature or "")
            self._ask(lambda: download(base, target))
        return signing.open_signed(target, version.digest, signed_by)

    def promotions(self) -> Sequence[Record]:
        """Every change of the champion, in order."""
        with explained(self.shown):
            return self._champions.standing().changes

    def makers(self, path: str, digest: str) -> tuple[str, ...]:
        """The newest finished run that left this content at this path, and the run above it."""
        with explained(self.shown):
            return self._ask(lambda: makers_of(self._client, self._root, path, digest))

    def tag(self, version: Version, tags: Mapping[str, str]) -> Version:
        """Set tags of a version."""
        with explained(self.shown):
            for key, value in tags.items():
                number = str(version.number)
                set_tag = self._client.set_model_version_tag
                self._ask(partial(set_tag, self.name, number, key, value[:_LONGEST_TAG]))
        return self.version(version.number)

    def untag(self, version: Version, key: str) -> None:
        """Remove a tag of a version, if it had it when it was looked at."""
        if key in version.tags:
            remove = self._client.delete_model_version_tag
            with explained(self.shown):
                self._ask(partial(remove, self.name, str(version.number), key))

    def promote(
        self, version: Version, *, since: Standing | None = None, reason: str = "a person's choice"
    ) -> Version | None:
        """Make a version the champion and the champion `previous`; returns the old champion.

        Args:
            since: the standing on which this was decided; by default that of now.

        Raises:
            RegistryError: the version has not passed the smoke test, or somebody else changed the
                champion since.
            ArtefactError: its files are not those that were registered.
        """
        if version.tags.get(SMOKE_TAG) != PASSED:
            raise RegistryError(
                f"version {version.number} of {self.name} has not passed the smoke test "
                f"({version.tags.get(SMOKE_TAG, 'it never ran')}), so it may not serve. "
                "Run `dvc repro deploy` to test it."
            )
        self._check_whole(version)
        since = since or self.standing()
        if since.champion == version.number and not self._champions.is_unsigned(since):
            return None
        with explained(self.shown):
            number, bundle = version.number, version.digest
            self._champions.change("promote", number, since, reason, bundle=bundle)
        old = since.champion
        return None if old in (NOBODY, version.number) else self.version(old)

    def challenge(self, version: Version) -> None:
        """Mark a version as the one that waits for a person's decision."""
        with explained(self.shown):
            self._champions.move(CHALLENGER, version.number)

    def rollback(
        self, *, reason: str = "a person's choice", only: int | None = None
    ) -> tuple[Version, Version]:
        """Make the champion before this one serve again; returns (new champion, dropped one).

        Args:
            only: the version that is to go.

        Raises:
            RegistryError: there is no earlier champion, somebody else changed it meanwhile, or it
                is another one than is to go.
            ArtefactError: the earlier one is no longer whole.
        """
        since = self.standing()
        if since.champion == NOBODY:
            raise RegistryError(f"{self.name} has no champion, so there is nothing to roll back.")
        if only not in (None, since.champion):
            raise RegistryError(f"version {only} of {self.name} is champion no more.")
        earlier = self.aliases().get(PREVIOUS)
        if earlier is None:
            raise RegistryError(
                f"version {since.champion} is the first champion of {self.name}; nothing was "
                "before it. Name the version that should serve: `metaloom promote VERSION`."
            )
        target, current = self.version(earlier), self.version(since.champion)
        self._check_whole(target)
        with explained(self.shown):
            bundle = target.digest
            self._champions.change("rollback", target.number, since, reason, bundle=bundle)
        return target, self.version(current.number)

    def _check_whole(self, version: Version) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            self.fetch(version, Path(scratch) / "bundle")

    def _whole(self, digest: str) -> Version | None:
        """A version of this bundle whose files are all there; damaged ones are marked so."""
        while known := self.find(digest):
            try:
                self._check_whole(known)
                return known
            except ArtefactError as error:
                self.tag(known, {DAMAGED_TAG: str(error)})
        return None

    def _create_version(self, tags: Mapping[str, str], **values: Any) -> tuple[Version, bool]:
        """Once: an earlier try may have come through though its answer did not.

        If somebody else registers the same bundle meanwhile, the first version of it stays.
        """
        digest, token = tags[BUNDLE_TAG], uuid.uuid4().hex
        values |= {"tags": {**tags, TOKEN_TAG: token}, "await_creation_for": 0}

        def create() -> None:
            if self.find(digest) is None:
                self._client.create_model_version(self.name, **values)

        self._ask(self._ensure_registered_model)
        self._ask(create)
        made = self.find(digest)
        if made is None:
            raise RegistryError(f"{self.name} lost a version while it was made. Try it again.")
        for one in self._holding(digest):
            if one.tags.get(TOKEN_TAG) == token and int(one.version) != made.number:
                self._ask(partial(self._client.delete_model_version, self.name, one.version))
        return made, made.tags.get(TOKEN_TAG) == token

    def _holding(self, digest: str) -> list[Any]:
        condition = f"name = '{self.name}' and tags.`{BUNDLE_TAG}` = '{digest}'"
        return list(self._ask(lambda: self._client.search_model_versions(condition)))

    def _read_back(self, base: str, digest: str) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            download(base, Path(scratch) / "bundle")
            load_bundle(Path(scratch) / "bundle", digest=digest)

    def _put_signature(self, model_id: str, bundle: Bundle) -> None:
        """Beside the bundle of a logged model, for a bundle holds no other files."""
        if (key := signing.signing_key()) is not None:
            with tempfile.TemporaryDirectory() as scratch:
                (path := Path(scratch) / signing.SIGNATURE).write_text(
                    signing.sign(bundle.folder, key)
                )
                self._client.log_model_artifact(model_id, str(path))

    def _ensure_registered_model(self) -> None:
        try:
            self._client.create_registered_model(
                self.name, description="Few-shot learner by Metaloom."
            )
        except Exception as error:
            if code_of(error) != "RESOURCE_ALREADY_EXISTS":
                raise
