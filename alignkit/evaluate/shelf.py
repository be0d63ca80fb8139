"""What all models of an evaluation share: the device, the cache, the warnings, and the room for one of them at a time.

It loads nothing itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from alignkit.evaluate.cache import Cache


class Holder(Protocol):
    """Something that holds weights."""

    def release(self) -> None:
        """Let go of them."""


def collect_memory() -> None:
    """Give back what a model that was let go of has held."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class Shelf:
    """Who holds weights now: asking another model lets go of them, so that no more than one is in memory."""

    device: str = "auto"
    batch_size: int = 16
    trust_code: bool = False
    cache: Cache = field(default_factory=Cache)
    warnings: list[str] = field(default_factory=list)
    holder: Holder | None = None

    def take(self, user: Holder) -> None:
        """Let `user` hold weights and the one before it let go of its own."""
        if self.holder is not None and self.holder is not user:
            self.holder.release()
        self.holder = user

    def warn(self, message: str) -> None:
        """Keep a warning once."""
        if message not in self.warnings:
            self.warnings.append(message)
