"""Supervised fine-tuning and language-model pre-training on TRL's SFTTrainer."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from trl import SFTConfig, SFTTrainer

from alignkit.data.load import streams
from alignkit.errors import ModelError
from alignkit.recipe import Stage
from alignkit.recipe.schema import SftOptions
from alignkit.runs.directory import RunDir
from alignkit.train import classifier
from alignkit.train.encode import IGNORED
from alignkit.train.fit import fit
from alignkit.train.setup import Setup, build_config, collator_for, open_rows
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


class Seq2Seq(Sft):
    """The same for an encoder-decoder model: the mean loss over all target tokens of a step, none of them shifted."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs, self._loss_shifts_labels = True, False  # how transformers counts the tokens

    def weigh(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict.fromkeys(("loss", "entropy", "mean_token_accuracy"), (inputs["labels"] != IGNORED).sum())

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs, use_cache=False)
        labels_N, logits_NV = inputs["labels"].flatten(), outputs.logits.flatten(0, 1).float()
        kept_N = labels_N != IGNORED
        loss = cross_entropy(logits_NV, labels_N, reduction="sum", label_smoothing=self.args.label_smoothing_factor) / (
            kept_N.sum() if num_items_in_batch is None else num_items_in_batch
        )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # which averages the gradients of all ranks
        with torch.no_grad():
            logps_NV = logits_NV[kept_N].log_softmax(dim=-1)
            right = (logps_NV.argmax(dim=-1) == labels_N[kept_N]).sum()
            tokens = inputs["attention_mask"].sum() + inputs["decoder_attention_mask"].sum()
            sums = torch.stack([-(logps_NV.exp() * logps_NV).sum(), right, kept_N.sum(), tokens])
            entropy, num_right, count, num_tokens = self.accelerator.gather(sums[None]).sum(dim=0).tolist()
        found = self._metrics["train" if self.model.training else "eval"]
        found["entropy"].append(entropy / count)
        found["mean_token_accuracy"].append(num_right / count)
        self._total_train_tokens += int(num_tokens) if self.model.training else 0
        found["num_tokens"] = [self._total_train_tokens]
        return (loss, outputs) if return_outputs else loss


def build(stage: Stage, run: RunDir) -> Setup:
    """Load model and rows and make a trainer that has not trained yet."""
    stage.expect(SftOptions)
    if stage.task is not None:
        return classifier.build(stage, run)
    setup = open_rows(stage, run)
    setup.load()
    recomputes = setup.loaded.model.supports_gradient_checkpointing
    if stage.trainer.get("gradient_checkpointing") and not recomputes:
        raise ModelError(
            f"{stage.name}.gradient_checkpointing is true, and this architecture has nothing to recompute; take it out",
            where=stage.where(f"{stage.name}.gradient_checkpointing"),
        )
    packs = stage.trainer.get("packing") or stage.trainer.get("eval_packing")
    config = build_config(
        stage,
        SFTConfig,
        run.checkpoints,
        # The tables carry their labels; these two would make TRL look for columns that are no longer there.
        assistant_only_loss=False,
        completion_only_loss=False,
        max_length=stage.trainer.get("max_length") if packs else None,
        **({} if recomputes else {"gradient_checkpointing": False}),
    )
    arguments = setup.arguments(config)
    trainer = Sft
    if stage.objective == "seq2seq":
        trainer, arguments["data_collator"] = Seq2Seq, collator_for(stage, setup.chat.tokenizer)
    setup.trainer = trainer(**arguments)
    if streams(stage):
        setup.trainer.train_dataset = open_stream(stage, setup.chat)  # TRL's constructor takes a Dataset alone
    return setup


run = partial(fit, build)
