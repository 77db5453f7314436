"""Own rules for Dockerfiles: what must hold of every image here, each with what to do about it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_COMPILERS = r"\b(gcc|g\+\+|clang|cc|make|cmake|build-essential|rustc|cargo|[a-z0-9.+-]+-dev)\b"
_SECRET = re.compile(r"(?i)(password|passwd|secret|token|api_?key|credential|private_?key)")
_BASE = re.compile(r"\$\{?BASE\}?|.+@sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile, continued lines joined."""

    line: int
    word: str
    rest: str

    @property
    def flags(self) -> list[str]:
        """`--chown=0:0` and its like."""
        return [part for part in self.rest.split() if part.startswith("--")]

    @property
    def arguments(self) -> list[str]:
        """Without the flags; the exec form (a JSON list) too."""
        text = self.rest.strip("[]").replace('", "', '" "')
        return [part for part in shlex.split(text) if not part.startswith("--")]


def parse(text: str) -> list[Instruction]:
    """Instructions in order; comments and empty lines are left out."""
    found, begun, start = [], "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or (not line.strip() and not begun):
            continue
        start = start if begun else number
        begun += line.removesuffix("\\").strip() + " "
        if not line.endswith("\\"):
            word, _, rest = begun.strip().partition(" ")
            found.append(Instruction(start, word.upper(), rest))
            begun = ""
    return found


def stages(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """One list for each FROM, which is its first."""
    found: list[list[Instruction]] = []
    for one in instructions:
        if one.word == "FROM":
            found.append([])
        if found:
            found[-1].append(one)
    return found


def complaints(text: str) -> list[str]:
    """Everything that is wrong, as `line: what, and what to do`."""
    instructions = parse(text)
    parts = stages(instructions)
    if not parts:
        return ["1: there is no FROM"]
    rules = (_bases, _arguments, _copies, _environment, _runs, _last_stage)
    return [said for rule in rules for said in rule(instructions, parts)]


def _bases(instructions: Sequence[Instruction], parts: list[list[Instruction]]) -> Iterator[str]:
    if len(parts) < 2:
        yield "1: one stage alone: build in a first one, and copy the result to a last one"
    names: set[str] = set()
    for part in parts:
        base, *rest = part[0].arguments
        if base not in names and not _BASE.fullmatch(base):
            yield f"{part[0].line}: base {base} has no digest: name it @sha256:..., or ${{BASE}}"
        if len(rest) == 2:
            names.add(rest[1])


def _arguments(
    instructions: Sequence[Instruction], parts: list[list[Instruction]]
) -> Iterator[str]:
    for one in instructions:
        name, given, _ = one.rest.partition("=")
        if one.word == "ARG" and name == "BASE" and given:
            yield f"{one.line}: BASE has a default, a digest that will be an old one: leave it out"
        if one.word == "ARG" and _SECRET.search(name):
            yield f"{one.line}: ARG {name} stays in the image's history: use a secret mount"


def _copies(instructions: Sequence[Instruction], parts: list[list[Instruction]]) -> Iterator[str]:
    for one in instructions:
        if one.word == "ADD":
            yield f"{one.line}: ADD fetches and unpacks: use COPY"
        if one.word != "COPY":
            continue
        if not any(re.fullmatch(r"--chown=\d+:\d+", flag) for flag in one.flags):
            yield f"{one.line}: COPY without --chown=UID:GID in numbers"
        if {".", "./", ".git", ".env"} & set(one.arguments[:-1]):
            yield f"{one.line}: COPY of {one.arguments[0]}: name the files that are needed"


def _environment(
    instructions: Sequence[Instruction], parts: list[list[Instruction]]
) -> Iterator[str]:
    for one in instructions:
        if one.word in ("ENV", "LABEL"):
            for name, value in re.findall(r"([\w.]+)=(\S+)", one.rest):
                if _SECRET.search(name) and value.strip("\"'"):
                    yield f"{one.line}: {name} is a secret by its name: pods get it from a Secret"


def _runs(instructions: Sequence[Instruction], parts: list[list[Instruction]]) -> Iterator[str]:
    for one in instructions:
        if one.word != "RUN":
            continue
        if re.search(r"\b(curl|wget)\b[^&|;]*(://|\|)", one.rest):
            yield f"{one.line}: RUN fetches from the network with no hash to hold it to"
        for command in re.split(r"&&|;|\|\|", one.rest):
            if re.search(r"\bpip3?\b.*\binstall\b", command) and not (
                "--require-hashes" in command
                or ("--no-deps" in command and "--no-build-isolation" in command)
            ):
                yield f"{one.line}: pip without --require-hashes: install the lock"
            if "apt-get install" in command and "--no-install-recommends" not in command:
                yield f"{one.line}: apt-get without --no-install-recommends"
        if re.search(r"\bsudo\b|chmod\s+(-R\s+)?(777|[ao]\+w)", one.rest):
            yield f"{one.line}: RUN gives away rights"


def _last_stage(
    instructions: Sequence[Instruction], parts: list[list[Instruction]]
) -> Iterator[str]:
    last = parts[-1]
    where = last[0].line
    users = [one for one in last if one.word == "USER"]
    if not users:
        yield f"{where}: the last stage has no USER: it runs as root"
    elif not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1].rest):
        yield (
            f"{users[-1].line}: USER {users[-1].rest}: Kubernetes cannot tell that it is not root; "
            "give a number above 0"
        )
    for one in last:
        if one.word == "RUN" and (found := re.search(_COMPILERS, one.rest)):
            yield f"{one.line}: {found[0]} in the last stage: build in the first one"
        if one.word == "RUN" and re.search(r"\bpip3?\b.*\binstall\b", one.rest):
            yield f"{one.line}: pip install in the last stage: copy what the first one installed"
        if one.word == "HEALTHCHECK" and one.rest != "NONE":
            yield f"{one.line}: HEALTHCHECK: Kubernetes does not look at it; write probes"
        if one.word in ("ENTRYPOINT", "CMD") and not one.rest.startswith("["):
            yield f"{one.line}: {one.word} by a shell, which keeps signals to itself: use a list"
    if not any(one.word == "ENTRYPOINT" for one in last):
        yield f"{where}: the last stage has no ENTRYPOINT"
    labels = " ".join(one.rest for one in last if one.word == "LABEL")
    if "org.opencontainers.image.revision" not in labels:
        yield f"{where}: no label org.opencontainers.image.revision"
