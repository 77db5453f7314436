"""Variables, commands and settings are those that the code knows."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from infra.manifests.documents import (
    Documents,
    Finding,
    find,
    look,
    mapping,
    named,
    of_kind,
    sequence,
    title,
)
from infra.manifests.pods import Pod, environment, pods
from pipeline.deploy.serve.settings import ServeSettings

_REPOSITORY = Path(__file__).parents[3]
OF_OTHERS: Mapping[str, str] = {
    "HOME": "every program",
    "USER": "every program",
    "PYTHONPATH": "Python",
    "DVC_SITE_CACHE_DIR": "dvc",
    "GIT_CONFIG_GLOBAL": "git",
    "PGSERVICEFILE": "libpq",
    "AWS_SHARED_CREDENTIALS_FILE": "the clients of S3",
    "AWS_CA_BUNDLE": "the clients of S3",
    "AWS_EC2_METADATA_DISABLED": "the clients of S3",
    "SSL_CERT_FILE": "OpenSSL",
    "OMP_NUM_THREADS": "torch",
    "DO_NOT_TRACK": "ray, dvc and others",
    "RAY_USAGE_STATS_ENABLED": "ray",
    "RAY_AUTH_MODE": "ray",
}
"""Which are not read by our code, but by that of others."""
AS_ARGUMENTS = ("METALOOM_REPOSITORY", "METALOOM_COMMIT", "METALOOM_BECAUSE")
"""Only for `$(NAME)` in a command."""
_NAME = re.compile(r"\b(?:METALOOM|MLFLOW|AWS|RAY|OTEL|DVC|NCCL|GLOO)_[A-Z0-9_]+\b")
_VARIABLE = re.compile(r"\$\(([^)]*)\)")
_LAUNCHERS = ("local", "torchrun", "ray_train", "kubernetes")
_GRACE_SECONDS = 20
"""That the service gives to requests in work, after preStop and drain_seconds."""


def variables_known(documents: Documents) -> list[Finding]:
    """A variable that nobody reads is a spelling mistake."""
    found = []
    uses = [
        (f"{c.where}.env[{mapping(e).get('name')}]", str(mapping(e).get("name")))
        for pod in pods(documents)
        for c in pod.containers
        for e in sequence(c.value.get("env"))
    ]
    config = named(documents, "ConfigMap", "metaloom-settings")
    uses += [(f"ConfigMap/metaloom-settings: data.{k}", k) for k in mapping(look(config, "data"))]
    for where, name in uses:
        if name not in OF_OTHERS and name not in AS_ARGUMENTS and name not in _read_by_code():
            mend = "Correct the name; docs/cluster.md lists those that there are."
            found.append(Finding(where, f"nobody reads {name}", mend))
    for pod in pods(documents):
        for c in pod.containers:
            for e in find(c.value, "env[]", c.where):
                value = e.value.get("value")
                if e.value.get("name") == "METALOOM_LAUNCHER" and value not in _LAUNCHERS:
                    mend = f"Known: {', '.join(_LAUNCHERS)}."
                    found.append(Finding(e.where, f"there is no launcher {value!r}", mend))
    return found


@cache
def _read_by_code() -> frozenset[str]:
    """Names in the code of `pipeline` and `stages`."""
    files = [p for top in ("pipeline", "stages") for p in (_REPOSITORY / top).rglob("*.py")]
    return frozenset(name for path in files for name in _NAME.findall(path.read_text()))


def commands(documents: Documents) -> list[Finding]:
    """Commands are of `metaloom`, with options and choices that it has, or are our modules."""
    found = []
    for pod in pods(documents):
        for where, container in pod.containers:
            parts = (*sequence(container.get("command")), *sequence(container.get("args")))
            seen = environment(container, documents, pod.namespace)
            words = [_filled_in(str(part), seen) for part in parts]
            if words[:1] == ["metaloom"]:
                found += [Finding(where, *wrong) for wrong in _of_metaloom(words[1:])]
            found += _of_python(where, words)
    for one in of_kind(documents, "RayJob"):
        words = str(look(one, "spec.entrypoint", "")).split()
        found += _of_python(f"{title(one)}: spec.entrypoint", words)
    return found


def _of_python(where: str, words: list[str]) -> list[Finding]:
    if words[:2] != ["python", "-m"] or (len(words) > 2 and _is_module(words[2])):
        return []
    return [Finding(where, f"there is no module {' '.join(words[2:3])}", "Correct the name.")]


def _filled_in(word: str, seen: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda found: seen.get(found[1], found[0]), word)


def _of_metaloom(words: list[str]) -> Iterator[tuple[str, str]]:
    """What is wrong with a command line, and how to mend it."""
    name = next(iter(words), "")
    known = _options(name)
    if known is None:
        yield f"there is no `metaloom {name}`", "Look at `metaloom --help`."
        return
    for word, value in zip(words[1:], [*words[2:], ""], strict=True):
        if word.startswith("--") and word not in known:
            yield f"`metaloom {name}` has no {word}", f"Known: {', '.join(sorted(known))}."
        elif (choices := known.get(word)) and value not in choices:
            yield f"{word} {value} is no choice", f"Choose of {', '.join(choices)}."


@cache
def _options(command: str) -> Mapping[str, tuple[str, ...]] | None:
    """Of one of `metaloom`'s commands, with their choices; None if there is no such command."""
    import typer

    from pipeline.cli import app

    known = getattr(typer.main.get_command(app), "commands", {}).get(command)
    if known is None:
        return None
    return {
        option: _choices(one.type_descriptor.annotation)
        for one in known.params
        for option in (*one.opts, *one.secondary_opts)
        if option.startswith("--")
    }


def _choices(annotation: Any) -> tuple[str, ...]:
    """Of an option that takes only some words; none where it takes any."""
    is_enum = isinstance(annotation, type) and issubclass(annotation, Enum)
    return tuple(str(one.value) for one in annotation) if is_enum else ()


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def service_settings(documents: Documents) -> list[Finding]:
    """The service's settings can be read, and go with the number of services."""
    found = []
    for config in of_kind(documents, "ConfigMap"):
        for name, text in mapping(config.get("data")).items():
            if name != "serve.yaml":
                continue
            where = f"{title(config)}: data.{name}"
            settings = _settings(str(text))
            if isinstance(settings, str):
                found.append(Finding(where, settings, "docs/serving.md lists the settings."))
            elif settings.database.startswith("sqlite") and (many := _several(documents)):
                what = f"{many} keeps several services, and SQLite is a file for one"
                found.append(Finding(where, what, "Use PostgreSQL, or replicas: 1 and Recreate."))
    return found


def _settings(text: str) -> ServeSettings | str:
    """Or what is wrong with them."""
    try:
        section = mapping(yaml.safe_load(text)).get("serve")
        return ServeSettings.model_validate(section)
    except yaml.YAMLError as error:
        return f"it is no YAML: {str(error).splitlines()[0]}"
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'serve'}: {first['msg']}"


def _several(documents: Documents) -> str:
    for one in of_kind(documents, "Deployment", "RayService", "HorizontalPodAutoscaler"):
        recreated = look(one, "spec.strategy.type") == "Recreate"
        if one["kind"] != "Deployment" or not (recreated and look(one, "spec.replicas") == 1):
            return title(one)
    return ""


def grace(documents: Documents) -> list[Finding]:
    """A service has time to finish what it has begun before it is killed."""
    found = []
    for pod in pods(documents):
        if pod.kind != "Deployment":
            continue
        drain = _drain_seconds(documents, pod)
        for where, container in pod.containers:
            waits = look(container, "lifecycle.preStop.sleep.seconds")
            if not waits:
                what = "requests still come when it has begun to stop"
                mend = "Set lifecycle.preStop.sleep.seconds."
                found.append(Finding(f"{where}.lifecycle", what, mend))
            needed = (waits or 0) + drain + _GRACE_SECONDS
            given = pod.spec.get("terminationGracePeriodSeconds", 30)
            if given <= needed:
                what = f"it has {given} s, and needs {needed:g} s (preStop, drain_seconds, 20 s)"
                at = f"{pod.where}.terminationGracePeriodSeconds"
                found.append(Finding(at, what, "Raise it."))
    return found


def _drain_seconds(documents: Documents, pod: Pod) -> float:
    for place in find(pod.spec, "volumes[].configMap.name"):
        config = named(documents, "ConfigMap", place.value, pod.namespace)
        settings = _settings(str(mapping(look(config, "data")).get("serve.yaml", "serve: {}")))
        if isinstance(settings, ServeSettings):
            return settings.drain_seconds
    return 0.0
