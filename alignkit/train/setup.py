"""Everything a stage trains with: its rows, tokenizer and weights, and the trainer that a method builds of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.data import Rejects, Row
from alignkit.models.chat import Chat
from alignkit.models.load import Loaded, load_policy
from alignkit.recipe import Stage
from alignkit.runs.directory import RunDir
from alignkit.train import ranks
from alignkit.train.tables import Tables, open_chat, share_tables

if TYPE_CHECKING:
    from alignkit.train.trainer import Guarded


@dataclass
class Setup:
    """A stage on its way to a first step: `open_rows` begins it, `load` adds the weights, a method its trainer."""

    stage: Stage
    run: RunDir
    chat: Chat
    rejects: Rejects
    tables: Tables
    loaded: Loaded = field(init=False)
    trainer: Guarded = field(init=False)
    is_reward: bool = False
    finish: Callable[[Path], dict[str, float]] | None = None  # measures and writes beside the model, before it counts
    # rewards of answers to rows, for samples
    score_answers: Callable[[Sequence[Row], Sequence[Sequence[int]]], list[dict[str, Any]]] | None = None
    ptx_data: str | None = None  # fingerprint of the pre-training rows that ppo mixes in
    record: dict[str, Any] = field(default_factory=dict)  # what the method adds to stage.json
    base_hash: str | None = None  # bytes of what adapters leave alone, before training

    def load(self, load: Callable[..., Loaded] = load_policy) -> Any:
        """Load the weights, rank 0 first, which may have to write them; returns the model."""
        self.loaded = ranks.first(lambda: load(self.stage, run_dir=self.run.path, tokenizer=self.chat.tokenizer))
        return self.loaded.model

    def arguments(self, config: Any) -> dict[str, Any]:
        """What every trainer is made of."""
        return {
            "model": self.loaded.model,
            "args": config,
            "train_dataset": self.tables.train,
            "eval_dataset": self.tables.eval,
            "processing_class": self.chat.tokenizer,
            "settings": self.stage.training,
        }


def open_rows(stage: Stage, run: RunDir) -> Setup:
    """Load the tokenizer and make the token tables of a stage: the head of every `build`."""
    chat, rejects = open_chat(stage, run), Rejects()
    return Setup(stage, run, chat, rejects, share_tables(stage, chat, run.cache, rejects=rejects))
