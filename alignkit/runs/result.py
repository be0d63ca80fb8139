"""How a stage ended, as every method says it; data only."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alignkit.errors import RunError
from alignkit.runs.files import read_json


@dataclass
class Result:
    """How a stage ended; result.json holds the same.

    `tokens` counts all sittings of the run, and so does `wall_seconds` where it trains, as far as they were saved;
    `tokens_per_second` and the peak are of the last one.
    """

    stage: str
    status: str
    step: int  # optimizer steps; rows written, where a stage makes data
    model_dir: str  # empty where a stage makes data
    metrics: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    wall_seconds: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def read_result(path: Path) -> Result:
    """Read result.json; raises RunError where a field is missing or of another type."""
    data = read_json(path)
    if missing := [key for key in Result.__dataclass_fields__ if data.get(key) is None]:
        raise RunError(f"has no {missing[0]}; put the file back as it was, or start over with --force", where=str(path))
    return Result(**{key: data[key] for key in Result.__dataclass_fields__})
