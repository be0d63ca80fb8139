"""WEIGHTS and tokens: loading, adapters and their lineage, tokenizers, templates and masks, probes."""

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name in ("builtin", "tokens"):  # both are in start.py now; scripts outside this tree still name them
        return import_module("alignkit.models.start")
    raise AttributeError(f"module {__name__} has no attribute {name}")
