"""Supervised fine-tuning and language-model pre-training on TRL's SFTTrainer.

Reads tables that `encode` has tokenised and masked; chooses nothing about data or weights.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor
from trl import SFTConfig, SFTTrainer

from alignkit.data import Rejects
from alignkit.data.load import streams
from alignkit.models.load import load_policy
from alignkit.recipe import Stage
from alignkit.recipe.schema import SftOptions
from alignkit.runs.directory import Result, RunDir
from alignkit.train import ranks
from alignkit.train.arguments import build_config
from alignkit.train.built import Built
from alignkit.train.encode import IGNORED
from alignkit.train.fit import fit, watch_for
from alignkit.train.guarded import Guarded
from alignkit.train.tables import open_chat, open_stream, share_tables


class Sft(Guarded, SFTTrainer):
    """TRL's SFTTrainer behind our guard; TRL still packs when `packing:` asks for it."""

    def weigh(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens = (inputs["labels"][..., 1:] != IGNORED).sum()
        return dict.fromkeys(("loss", "entropy", "mean_token_accuracy"), tokens)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):  # type: ignore[no-untyped-def]
        if not packing:
            return dataset
        dataset = dataset.select_columns(["input_ids", "labels"])
        return SFTTrainer._prepare_dataset(
            self, dataset, processing_class, args, packing, formatting_func, dataset_name
        )


def build(stage: Stage, run: RunDir) -> Built:
    """Load model and rows and return a trainer that has not trained yet."""
    stage.expect(SftOptions)
    chat = open_chat(stage, run)
    tokenizer = chat.tokenizer
    rejects = Rejects()
    tables = share_tables(stage, chat, run.cache, rejects=rejects)
    loaded = ranks.first(lambda: load_policy(stage, run_dir=run.path, tokenizer=tokenizer))
    packs = stage.trainer.get("packing") or stage.trainer.get("eval_packing")
    config = build_config(
        stage,
        SFTConfig,
        run.checkpoints,
        # The tables carry their labels; these two would make TRL look for columns that are no longer there.
        assistant_only_loss=False,
        completion_only_loss=False,
        max_length=stage.trainer.get("max_length") if packs else None,
    )
    trainer = Sft(
        model=loaded.model,
        args=config,
        train_dataset=tables.train,
        eval_dataset=tables.eval,
        processing_class=tokenizer,
        watch=watch_for(stage),
    )
    if streams(stage):
        trainer.train_dataset = open_stream(stage, chat)  # TRL's constructor takes a Dataset alone
    return Built(trainer, tables, chat, loaded, rejects)


def run(stage: Stage, run_dir: Path, *, allow_change: tuple[str, ...] = ()) -> Result:
    """Train the stage in its run directory, going on where an earlier sitting stopped."""
    return fit(stage, run_dir, build, allow_change=allow_change)
