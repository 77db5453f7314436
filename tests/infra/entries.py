"""Entries that workers of these tests run."""

from __future__ import annotations

import pipeline
from pipeline.runtime.context import Context
from tests.distributed.entries import Plan


def where(plan: Plan, context: Context) -> str:
    """From which folder the code comes."""
    return str(pipeline.__file__)
