"""What a write must satisfy: schemas, and the rules of the real server that no schema holds."""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry
from referencing import Resource as Document

from tests.conftest import REPOSITORY
from tests.infra.api_server.kinds import Resource
from tests.infra.api_server.status import bad_request, invalid

CRDS = REPOSITORY.parent / "shared" / "data" / "crds"
_CRD_FILES = {"RayJob": "ray.io_rayjobs.yaml"}
_DNS_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_RFC_1123 = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.'"
)


@cache
def _schema_folder(strict: bool) -> Path | None:
    try:
        import kubernetes_validate
    except ImportError:
        return None
    schemas = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    suffix = "-local-strict" if strict else "-local"
    found = list(schemas.glob(f"v*{suffix}"))
    return max(found, key=lambda p: [int(n) for n in re.findall(r"\d+", p.name)])


@cache
def _validator(kind: str, api_version: str, strict: bool) -> Any:
    """Of the newest Kubernetes that kubernetes-validate knows; None for kinds without a schema."""
    folder = _schema_folder(strict)
    name = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    if folder is None or not (folder / f"{kind.lower()}-{name}.json").exists():
        return None
    schema = json.loads((folder / f"{kind.lower()}-{name}.json").read_text())
    registry = _definitions(strict)
    return Draft202012Validator(schema, registry=registry)


@cache
def _definitions(strict: bool) -> Any:
    folder = _schema_folder(strict)
    assert folder is not None
    definitions = Document.from_contents(json.loads((folder / "_definitions.json").read_text()))
    return definitions @ Registry()


@cache
def _custom_validator(kind: str) -> Any:
    """Of the CRD's own schema; None where ../shared/data/crds is absent."""
    path = CRDS / _CRD_FILES.get(kind, "none")
    if not path.exists():
        return None
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    definition = yaml.load(path.read_text(), Loader=loader)
    version = next(v for v in definition["spec"]["versions"] if v["name"] == "v1")
    return Draft202012Validator(_closed(version["schema"]["openAPIV3Schema"], top=True))


def _closed(schema: Any, *, top: bool = False) -> Any:
    """Unknown fields are errors, as with fieldValidation=Strict; int-or-string as Kubernetes has it."""
    if not isinstance(schema, dict):
        return schema
    result = {k: v for k, v in schema.items() if k not in ("properties", "items")}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if "properties" in schema:
        result["properties"] = {k: _closed(v) for k, v in schema["properties"].items()}
        if (
            "additionalProperties" not in schema
            and not top
            and not schema.get("x-kubernetes-preserve-unknown-fields")
        ):
            result["additionalProperties"] = False
    if "items" in schema:
        result["items"] = _closed(schema["items"])
    return result


def check_write(resource: Resource, item: dict[str, Any], *, strict: bool) -> None:
    """Refuse with 400 or 422 what the real server would."""
    metadata = item["metadata"]
    name = metadata.get("name", "")
    if len(name) > 253 or not _DNS_NAME.fullmatch(name):
        raise invalid(resource, name, [("metadata.name", f'Invalid value: "{name}": {_RFC_1123}')])
    _check_labels(resource, name, metadata.get("labels") or {})
    validator = (
        _custom_validator(resource.kind)
        if "." in resource.group and not resource.group.endswith("k8s.io")
        else _validator(resource.kind, resource.api_version, strict)
    )
    if validator is not None:
        _check_schema(validator, resource, name, item, strict)
    own = {"CronJob": _check_cron_job, "Job": _check_job}.get(resource.kind)
    causes = own(item["spec"]) if own else []
    if causes:
        raise invalid(resource, name, causes)


def _check_schema(
    validator: Any, resource: Resource, name: str, item: dict[str, Any], strict: bool
) -> None:
    causes = []
    for error in sorted(validator.iter_errors(item), key=lambda e: list(map(str, e.path))):
        field = ".".join(str(part) for part in error.absolute_path)
        if error.validator == "additionalProperties":
            if not strict:
                continue
            unknown = sorted(set(error.instance) - set(error.schema.get("properties", {})))
            told = ", ".join(f'unknown field "{field}{"." if field else ""}{u}"' for u in unknown)
            raise bad_request(f"strict decoding error: {told}")
        causes.append((_required_field(error, field), _words(error)))
    if causes:
        raise invalid(resource, name, causes)


def _required_field(error: ValidationError, field: str) -> str:
    if error.validator != "required":
        return field
    missing = error.message.split("'")[1]
    return f"{field}.{missing}" if field else missing


def _words(error: ValidationError) -> str:
    if error.validator == "required":
        return "Required value"
    return f"Invalid value: {json.dumps(error.instance)[:80]}: {error.message[:160]}"


def _check_labels(resource: Resource, name: str, labels: dict[str, Any]) -> None:
    for key, value in labels.items():
        good = re.fullmatch(r"([\w.-]{1,253}/)?\w([\w.-]{0,61}\w)?", key)
        fine = isinstance(value, str) and re.fullmatch(r"(\w([\w.-]{0,61}\w)?)?", value)
        if not good or not fine:
            words = f'Invalid value: "{value}": a valid label must be an empty string or consist of'
            raise invalid(resource, name, [("metadata.labels", words)])


def _check_cron_job(spec: dict[str, Any]) -> list[tuple[str, str]]:
    causes = []
    schedule = spec.get("schedule", "")
    if not _is_cron(schedule):
        causes.append(("spec.schedule", f'Invalid value: "{schedule}": not a cron schedule'))
    zone = spec.get("timeZone")
    if zone is not None:
        from zoneinfo import available_timezones

        if zone not in available_timezones():
            causes.append(("spec.timeZone", f'Invalid value: "{zone}": unknown time zone {zone}'))
    if spec.get("concurrencyPolicy", "Allow") not in ("Allow", "Forbid", "Replace"):
        causes.append(("spec.concurrencyPolicy", "Unsupported value"))
    return causes + _check_job(spec["jobTemplate"]["spec"], "spec.jobTemplate.spec")


_LIMITS = [(0, 59), (0, 23), (1, 31), (1, 12), (0, 6)]
_NAMES = {3: "jan feb mar apr may jun jul aug sep oct nov dec", 4: "sun mon tue wed thu fri sat"}


def _is_cron(text: str) -> bool:
    if text.startswith("@"):
        return text in (
            "@yearly",
            "@annually",
            "@monthly",
            "@weekly",
            "@daily",
            "@midnight",
            "@hourly",
        ) or bool(re.fullmatch(r"@every \d+[hms]", text))
    fields = text.split()
    return len(fields) == 5 and all(_is_cron_field(f, i) for i, f in enumerate(fields))


def _is_cron_field(field: str, index: int) -> bool:
    low, high = _LIMITS[index]
    names = _NAMES.get(index, "").split()

    def number(text: str) -> int:
        if text.lower() in names:
            return names.index(text.lower()) + low
        return int(text) if text.isdecimal() else -1

    for part in field.split(","):
        found = re.fullmatch(r"(\*|\?|\w+)(?:-(\w+))?(?:/(\d+))?", part)
        if not found or found[3] == "0":
            return False
        if found[1] in "*?":
            if found[2]:
                return False
            continue
        first, last = number(found[1]), number(found[2] or found[1])
        if not low <= first <= last <= high:
            return False
    return True


def _check_job(spec: dict[str, Any], where: str = "spec") -> list[tuple[str, str]]:
    pod = spec["template"].get("spec") or {}
    causes = []
    if pod.get("restartPolicy") not in ("Never", "OnFailure"):
        words = (
            f'Required value: valid values: "OnFailure", "Never"; got {pod.get("restartPolicy")!r}'
        )
        causes.append((f"{where}.template.spec.restartPolicy", words))
    if not pod.get("containers"):
        causes.append((f"{where}.template.spec.containers", "Required value"))
    for field in ("backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"):
        value = spec.get(field)
        if isinstance(value, int) and value < 0:
            words = f"Invalid value: {value}: must be greater than or equal to 0"
            causes.append((f"{where}.{field}", words))
    return causes


def check_update(resource: Resource, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Fields that may not change."""
    if resource.kind != "Job":
        return
    name = new["metadata"]["name"]
    for field in ("template", "selector", "completions", "completionMode"):
        if new["spec"].get(field) != old["spec"].get(field):
            words = f"Invalid value: {json.dumps(new['spec'].get(field))[:60]}: field is immutable"
            raise invalid(resource, name, [(f"spec.{field}", words)])


def with_defaults(resource: Resource, item: dict[str, Any]) -> dict[str, Any]:
    """As the real server fills in what was left out."""
    item = copy.deepcopy(item)
    if resource.kind == "Job":
        _default_job(item)
    if resource.kind == "CronJob":
        spec = item["spec"]
        for key, value in {
            "concurrencyPolicy": "Allow",
            "suspend": False,
            "successfulJobsHistoryLimit": 3,
            "failedJobsHistoryLimit": 1,
        }.items():
            spec.setdefault(key, value)
        item.setdefault("status", {})
    if resource.kind == "Pod":
        item["spec"].setdefault("restartPolicy", "Always")
        item.setdefault("status", {"phase": "Pending"})
    return item


def _default_job(item: dict[str, Any]) -> None:
    spec, uid, name = item["spec"], item["metadata"]["uid"], item["metadata"]["name"]
    for key, value in {
        "backoffLimit": 6,
        "completions": 1,
        "parallelism": 1,
        "suspend": False,
        "completionMode": "NonIndexed",
    }.items():
        spec.setdefault(key, value)
    if "selector" not in spec:
        own = {
            "batch.kubernetes.io/controller-uid": uid,
            "controller-uid": uid,
            "batch.kubernetes.io/job-name": name,
            "job-name": name,
        }
        labels = spec["template"].setdefault("metadata", {}).setdefault("labels", {})
        if any(labels.get(key, own[key]) != own[key] for key in own):
            raise invalid(
                Resource("batch", "v1", "jobs", "Job"),
                name,
                [("spec.template.metadata.labels", "Invalid value: must be the Job's own")],
            )
        labels.update(own)
        spec["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}
    item.setdefault("status", {})
