"""Telling a webhook how a retraining ended."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from pipeline.cluster.retrain.policy import WORTH_TELLING
from pipeline.cluster.retrain.report import title
from pipeline.core.errors import ConfigError

ADDRESS = "METALOOM_WEBHOOK"
_TRIES, _SECONDS, _PAUSE_SECONDS = 3, 10.0, 2.0
_LOOPBACK = ("127.0.0.1", "localhost")


def webhook(configured: str) -> str:
    """The address that is told, or nothing; the environment's wins.

    Raises:
        ConfigError: it is neither https nor this machine's own.
    """
    address = os.environ.get(ADDRESS) or configured
    if address and not _is_safe(address):
        raise ConfigError(
            f"{ADDRESS} is no https address: what a run says would travel in the clear. Write "
            "https://..., or unset it to tell nobody."
        )
    return address


def _is_safe(address: str) -> bool:
    """https, or this machine itself; an address with a name before an @ may look like either."""
    if not address.isascii() or not address.isprintable() or " " in address:
        return False
    try:
        parts = urlsplit(address)
        host = parts.hostname
    except ValueError:
        return False
    here = parts.scheme == "http" and host in _LOOPBACK
    return bool(host) and "@" not in parts.netloc and (parts.scheme == "https" or here)


def tell(address: str, record: dict[str, Any]) -> str | None:
    """Post a record as JSON; why that failed, or None. It never fails a run."""
    if not address or record["state"] not in WORTH_TELLING:
        return None
    body = {"text": f"{title(record)}. {record['reason']}", "retraining": record}
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    problem = None
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE_SECONDS * attempt)
        try:
            with _open(request) as answer:
                answer.read(1)
            return None
        except urllib.error.HTTPError as error:
            problem = f"the webhook answered {error.code}"
            if error.code < 500 and error.code != 429:  # asking again changes nothing
                break
        except (OSError, HTTPException, ValueError) as error:
            # Its kind alone: the words of some hold the address, which may hold a secret.
            kind = type(getattr(error, "reason", error)).__name__
            problem = f"the webhook cannot be reached ({kind})"
    return problem


def _open(request: urllib.request.Request) -> Any:
    """Without following to another place: an https address must not lead into the clear."""

    class _Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:
            return None

    return urllib.request.build_opener(_Stay).open(request, timeout=_SECONDS)
