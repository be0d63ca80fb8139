"""How much disk a stage needs and whether it is there, from the number of trained parameters alone.

An estimate from above: it takes every optimizer for AdamW, whose state is two values per trained parameter.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from alignkit.errors import EnvironmentProblem

_GIB = 2**30
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def checkpoint_bytes(num_trained: int, *, dtype: str) -> int:
    """Return the size of a checkpoint: the trained weights and two optimizer values for each, in one dtype."""
    return 3 * num_trained * _BYTES[dtype]


def require_space(run_dir: Path, needed_bytes: int, *, num_checkpoints: int) -> int:
    """Return the free bytes where the run will be written.

    Raises EnvironmentProblem when fewer than `needed_bytes` are free there.
    """
    existing = next(place for place in (run_dir.absolute(), *run_dir.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise EnvironmentProblem(
            f"{existing} has {free / _GIB:.2f} GiB free; {num_checkpoints} checkpoints and the final model need about "
            f"{needed_bytes / _GIB:.2f} GiB; free some, lower keep_checkpoints, or choose another --out"
        )
    return free
