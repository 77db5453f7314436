"""What an API server refuses, in one sentence each that says how to mend it."""

from __future__ import annotations

from typing import Any

from pipeline.cluster.kube.kinds import Kind
from pipeline.core.errors import MachineError


class ApiError(MachineError):
    """A request came to nothing."""

    def __init__(self, message: str, *, code: int = 0, reason: str = "") -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


class MissingError(ApiError):
    """The object that was asked for does not exist."""


class ExistsError(ApiError):
    """An object of that name exists already."""


class ConflictError(ApiError):
    """Somebody else has changed the object since it was read."""


class ExpiredError(ApiError):
    """That part of the history is gone: list anew."""


class UnreachableError(ApiError):
    """The API server does not answer."""


class BusyError(ApiError):
    """The API server asks to be left alone for a while, or is not well; another try may do."""

    def __init__(self, message: str, *, code: int, wait_seconds: float | None) -> None:
        super().__init__(message, code=code)
        self.wait_seconds = wait_seconds


def refusal(
    code: int, status: dict[str, Any], verb: str, kind: Kind, name: str, namespace: str
) -> ApiError:
    """The error for an answer that is no success.

    Args:
        status: the `Status` object of the answer; empty where there was none.
        verb: of RBAC, such as `create`.
    """
    reason, words = status.get("reason", ""), status.get("message", "").strip()
    details = status.get("details") or {}
    where = f" in namespace {namespace}" if kind.namespaced else ""
    what = f"{kind.qualified} {name!r}" if name else kind.qualified
    if code == 401:
        text = (
            "the API server does not accept this login: its token or certificate is wrong or has "
            "expired. Log in again (as for kubectl), or choose another --context."
        )
        return ApiError(text, code=code, reason=reason)
    if code == 403:
        return _forbidden(words, verb, kind, where)
    if code == 404:
        return _missing(details, what, kind, where)
    if code == 409 and reason == "AlreadyExists":
        return ExistsError(f"{what} exists{where} already.", code=code, reason=reason)
    if code == 409:
        text = f"{what}{where} was changed by somebody else at the same time. Try again."
        return ConflictError(text, code=code, reason=reason)
    if code == 410:
        return ExpiredError(words, code=code, reason=reason)
    if code == 429 or code >= 500:
        wait = details.get("retryAfterSeconds")
        text = (
            f"the API server could not {verb} {what}{where} (status {code}: "
            f"{words or 'no words'}). Try again later."
        )
        return BusyError(text, code=code, wait_seconds=wait)
    text = f"the API server refuses to {verb} {what}{where}: {words or f'status {code}'}."
    return ApiError(text, code=code, reason=reason)


def _forbidden(words: str, verb: str, kind: Kind, where: str) -> ApiError:
    if "exceeded quota" in words:
        quota = words.partition("exceeded quota: ")[2]
        return ApiError(
            f"the quota{where} is used up: {quota}. Wait for other work to end, ask for less in "
            "infra/kubernetes, or have the ResourceQuota raised.",
            code=403,
            reason="Quota",
        )
    return ApiError(
        f"not allowed to {verb} {kind.qualified}{where}. Have a Role applied and bound to you that "
        f'holds apiGroups: ["{kind.group}"], resources: ["{kind.plural}"], verbs: ["{verb}"] '
        "(docs/kubernetes.md lists all that is needed)." + _own_words(words),
        code=403,
        reason="Forbidden",
    )


def _own_words(words: str) -> str:
    """Who was refused; or whatever else an admission controller had against it."""
    if "User " in words:
        return f" The server knows you as {words.partition('User ')[2].split(' cannot')[0]}."
    return f" The server says: {words}" if words else ""


def _missing(details: dict[str, Any], what: str, kind: Kind, where: str) -> ApiError:
    if details.get("kind") == "namespaces" and kind.plural != "namespaces":
        return MissingError(
            f"the namespace {details.get('name')!r} does not exist. Apply the manifests "
            "(kubectl apply -k infra/kubernetes/overlays/gpu), or name another --namespace.",
            code=404,
        )
    if details.get("name"):
        return MissingError(f"there is no {what}{where}.", code=404, reason="NotFound")
    return ApiError(
        f"the cluster does not know the resource {kind.plural} ({kind.api_version}): its "
        f"CustomResourceDefinition is missing. {install_hint(kind)}",
        code=404,
        reason="NoSuchKind",
    )


def install_hint(kind: Kind) -> str:
    """Who brings a resource that Kubernetes does not have by itself."""
    if kind.group == "ray.io":
        return "Install the KubeRay operator (its Helm chart kuberay-operator, 1.5.1 or later)."
    if kind.group.startswith("kueue"):
        return "Install Kueue, or take an overlay without it."
    return "Update the cluster: Kubernetes 1.32 or later is needed."
