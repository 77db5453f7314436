"""An entry whose module takes long to import: a wish to stop may come before any of it has run."""

from __future__ import annotations

import os
import time
from pathlib import Path

from pipeline.training.meta_train import run

__all__ = ["BEGUN", "run"]

BEGUN = "METALOOM_TEST_BEGUN"
"""Environment: made as soon as the import has begun"""

if BEGUN in os.environ:
    Path(os.environ[BEGUN]).touch()
    time.sleep(2)
