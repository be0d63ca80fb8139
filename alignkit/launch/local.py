"""Run a stage in this process: environment, run directory and lock around the method's `run`.

It deliberately starts no process and knows no method's details.
"""

from __future__ import annotations

import importlib
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from alignkit.recipe import Stage
from alignkit.runs.layout import open_run

if TYPE_CHECKING:
    from alignkit.train.fit import Result


def launch_stage(stage: Stage, *, force: bool = False, allow_change: tuple[str, ...] = ()) -> Result:
    """Train a stage in its run directory and return how it ended.

    Raises what `fit` raises, and RunError when another process holds the directory.
    """
    _prepare_environment()
    run, lock = open_run(Path(stage.run_dir), force=force)
    try:
        method = importlib.import_module(f"alignkit.train.{stage.method}")
        return method.run(stage, run.path, allow_change=allow_change)
    finally:
        lock.release()


def _prepare_environment() -> None:
    """Set what the libraries read when they are imported; what the user has set stays."""
    defaults = {
        "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL pings once per trainer; alignkit sends nothing anywhere by itself
        "TOKENIZERS_PARALLELISM": "true",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "BITSANDBYTES_NOWELCOME": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if "ALIGNKIT_DEBUG" not in os.environ:
        warnings.simplefilter("ignore")  # upstream deprecations are ours to mend, not the user's
