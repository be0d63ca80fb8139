"""The metrics: a file each, named as `evaluate.metrics` and --metric name it, with one class `Metric`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

from alignkit.evaluate.intervals import Figure
from alignkit.recipe.schema import METRICS


class Metric(Protocol):
    """One metric of one evaluation; a new one is a file in this directory, and nothing else."""

    key: str | None  # the option that asks for it, as its name in `metrics` does
    optional: bool  # left out with a warning where its package is not installed, unless it was asked for

    def __init__(self, context: Any) -> None:
        """Find out what is wrong before anything is measured."""

    @staticmethod
    def why_not(context: Any) -> str | None:
        """Say why it cannot be measured, None where it can."""

    def measure(self) -> Sequence[Figure]:
        """Measure it."""


def load_metrics() -> dict[str, type[Metric]]:
    """Import every metric, by its name."""
    return {name: importlib.import_module(f"{__name__}.{name}").Metric for name in METRICS}
