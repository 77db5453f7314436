"""Trying again, within a bound, when the registry's server or its database is gone for a while."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import TypeVar

from pipeline.core.errors import PipelineError, RegistryError
from pipeline.runtime.logs import warn

Result = TypeVar("Result")

_TRANSIENT_CODES = {
    *("TEMPORARILY_UNAVAILABLE", "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED"),
    *("DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "ABORTED"),
}
_SAID = {"TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}
_CUT_CONNECTIONS = (
    *("connection already closed", "server closed the connection", "terminating connection"),
    *("Can't reconnect until invalid transaction", "connection is closed"),
)
"""What the database layer says of a connection that a restart has cut; MLflow calls some of these
a bad request."""
_INSERTS = ("INSERT INTO model_version_tags", "INSERT INTO registered_model_aliases")
"""MLflow looks for a tag or alias and then writes it: of two that set a new one at once, the second
meets the first's row, which the database layer calls a breach of integrity. Once more, it finds it.
"""
_LOWEST_SERVER_ERROR = 500


class UnansweredError(RegistryError):
    """The registry did not answer for as long as we try."""

    state_is_said = False


@dataclass(frozen=True)
class Patience:
    """How long a call is tried, in seconds."""

    seconds: float = 60.0
    """Once the registry has answered: then a restart is what it most likely is."""
    unreached_seconds: float = 3.0
    """Before its first answer: then the address may be wrong."""
    first_wait: float = 0.2
    longest_wait: float = 5.0


DEFAULT_PATIENCE = Patience()


class Persistent:
    """Calls that are repeated while their faults are transient; the calls must bear it."""

    def __init__(self, shown: str, patience: Patience = DEFAULT_PATIENCE) -> None:
        self._shown = shown
        self._patience = patience
        self._answered = False

    def __call__(self, call: Callable[[], Result]) -> Result:
        """The call's result; any fault that waiting does not mend is raised as it is.

        Raises:
            UnansweredError: the patience is spent.
        """
        wait, told, begin = self._patience.first_wait, False, 0.0
        while True:
            try:
                result = call()
                self._answered = True
                return result
            except Exception as error:
                if isinstance(error, PipelineError) or not is_transient(error):
                    raise
                fault = error
                self._answered = self._answered or _is_answer(error)
                begin = begin or time.monotonic()  # an upload may have gone well for long
            patience = (
                self._patience.seconds if self._answered else self._patience.unreached_seconds
            )
            if time.monotonic() - begin + wait > patience:
                raise UnansweredError(
                    f"the registry at {self._shown} does not answer: {_reason(fault)}. Start its "
                    "server, or set MLFLOW_TRACKING_URI right; `metaloom doctor` looks into it."
                ) from None
            if not told and self._answered and not _is_overtaken(fault):
                warn(
                    f"the registry does not answer ({_reason(fault)[:100]}); trying again for "
                    f"{patience:.0f} s."
                )
                told = True
            time.sleep(wait)
            wait = min(2 * wait, self._patience.longest_wait)


def is_transient(error: Exception) -> bool:
    """Whether the same call may succeed a little later: no answer, or a fault of the server's own.

    Known by shape, since this module does without MLflow and its HTTP and database libraries.
    """
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    response = getattr(error, "response", None)
    if response is not None:  # of `requests`: an artefact's upload or download
        return int(response.status_code) >= _LOWEST_SERVER_ERROR or response.status_code == 429
    if type(error).__module__.partition(".")[0] in {"requests", "urllib3"}:
        return True
    code = getattr(error, "error_code", None)
    cut = code is not None and any(text in str(error) for text in _CUT_CONNECTIONS)
    return code in _TRANSIENT_CODES or cut or _is_overtaken(error)


def _is_overtaken(error: Exception) -> bool:
    told = str(error)  # SQLite and MySQL say the one, PostgreSQL the other
    refused = "IntegrityError" in told or "UniqueViolation" in told
    return refused and any(insert in told for insert in _INSERTS)


def _is_answer(fault: Exception) -> bool:
    """Whether a server said it: the address is right then, however ill the server is."""
    status = getattr(getattr(fault, "response", None), "status_code", None)
    return status is not None or "error responses" in str(fault) or code_of(fault) in _SAID


@contextmanager
def state_said(state: str) -> Iterator[None]:
    """Add to the error of spent patience what state things are in, unless one within did."""
    try:
        yield
    except UnansweredError as error:
        if error.state_is_said:
            raise
        told = UnansweredError(f"{error}\n{state}")
        told.state_is_said = True
        raise told from None


def _reason(error: Exception) -> str:
    # Of an HTTP client's message the end tells, not the address with its query.
    lines = str(error).rpartition("(Caused by ")[2].strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def code_of(error: Exception) -> str:
    """MLflow's own name of a fault; empty for faults of other kinds."""
    return str(getattr(error, "error_code", ""))


def is_absent(error: Exception) -> bool:
    """Whether MLflow, or its store of artefacts, says that there is no such thing."""
    response = getattr(error, "response", None)
    return (
        isinstance(error, FileNotFoundError)
        or code_of(error) in {"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "ENDPOINT_NOT_FOUND"}
        or (response is not None and response.status_code == HTTPStatus.NOT_FOUND)
    )


@contextmanager
def explained(uri: str, what: str = "the registry refused") -> Iterator[None]:
    """Turn MLflow's faults into ours."""
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:  # MLflow, its HTTP client, its database layer and the disk
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        raise RegistryError(
            f"{what} (MLflow at {uri}: {reason}). `metaloom doctor` looks into it."
        ) from None
