"""What a method hands to `fit`; data only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # who only reads a result does not wait for the libraries
    from alignkit.data import Rejects, Row
    from alignkit.models.chat import Chat
    from alignkit.models.load import Loaded
    from alignkit.train.guarded import Guarded
    from alignkit.train.tables import Tables


@dataclass
class Built:
    """A trainer that is ready to train, and what came with it."""

    trainer: Guarded
    tables: Tables
    chat: Chat
    loaded: Loaded
    rejects: Rejects
    is_reward: bool = False
    finish: Callable[[Path], dict[str, float]] | None = None  # measures and writes beside the model, before it counts
    # rewards of answers to rows, for samples
    score_answers: Callable[[Sequence[Row], Sequence[Sequence[int]]], list[dict[str, Any]]] | None = None
    ptx_data: str | None = None  # fingerprint of the pre-training rows that ppo mixes in
    record: dict[str, Any] = field(default_factory=dict)  # what the method adds to stage.json
    base_hash: str | None = None  # bytes of what adapters leave alone, before training
