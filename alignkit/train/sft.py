"""Supervised fine-tuning and language-model pre-training on TRL's SFTTrainer."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from trl import SFTConfig, SFTTrainer

from alignkit.data.load import streams
from alignkit.recipe import Stage
from alignkit.recipe.schema import SftOptions
from alignkit.runs.directory import RunDir
from alignkit.train.encode import IGNORED
from alignkit.train.fit import fit
from alignkit.train.setup import Setup, build_config, open_rows
from alignkit.train.tables import open_stream
from alignkit.train.trainer import Guarded


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


def build(stage: Stage, run: RunDir) -> Setup:
    """Load model and rows and make a trainer that has not trained yet."""
    stage.expect(SftOptions)
    setup = open_rows(stage, run)
    setup.load()
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
    setup.trainer = Sft(**setup.arguments(config))
    if streams(stage):
        setup.trainer.train_dataset = open_stream(stage, setup.chat)  # TRL's constructor takes a Dataset alone
    return setup


run = partial(fit, build)
