"""Direct preference optimisation on TRL's DPOTrainer, and KTO for answers without a partner.

Adds what TRL lacks: conservative DPO, soft labels, IPO on summed log-probabilities, and a reference that is right for
continued, stacked and merged adapters. No model is loaded here but through the models room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from alignkit.data import Rejects
from alignkit.errors import RecipeError
from alignkit.models.adapters import REFERENCE, START, TRAINED, activate, add_reference_adapter
from alignkit.models.load import Loaded, load_policy, load_reference
from alignkit.recipe import Stage
from alignkit.recipe.schema import DpoOptions
from alignkit.recipe.trl_fields import OWN_LOSSES
from alignkit.runs.directory import Result, RunDir
from alignkit.train import ranks
from alignkit.train.arguments import build_config, micro_batch_size
from alignkit.train.built import Built
from alignkit.train.fit import fit, watch_for
from alignkit.train.guarded import Guarded, switch_off_dropout
from alignkit.train.losses import cdpo_loss, ipo_sum_loss, sequence_logps
from alignkit.train.tables import Tables, open_chat, share_tables, shuffled_order


@dataclass
class LabelledCollator:
    """TRL's preference collator, with each pair's soft label P(chosen preferred) kept beside the tokens, (B,)."""

    inner: DataCollatorForPreference

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        batch = self.inner(rows)
        batch["label"] = torch.tensor([row.get("label", 1.0) for row in rows], dtype=torch.float)
        return batch


class _Referenced(Guarded):
    """The reference policy, for both trainers: adapter off, a frozen copy, or the frozen adapter of a stack."""

    def __init__(self, *args: Any, reference: str | None = None, **kwargs: Any) -> None:
        self.reference = reference
        model = kwargs["model"]
        if isinstance(model, PeftModel) and REFERENCE in model.peft_config:
            model.delete_adapter(REFERENCE)  # TRL makes its own copy, under the same name
        super().__init__(*args, **kwargs)
        if not isinstance(self.model, PeftModel) or reference == "ref_adapter":
            return
        self.model.delete_adapter(REFERENCE)
        if reference == "base_adapter":  # otherwise the reference is the base: TRL switches the adapter off
            add_reference_adapter(self.model, of=START)
            if self.args.disable_dropout:
                switch_off_dropout(self.model)  # the copy's
            activate(self.model, [START, TRAINED])

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> Any:
        logps = super().compute_ref_log_probs(model, inputs)
        if self.reference == "base_adapter":
            activate(self.model, [START, TRAINED])  # TRL's context puts back one adapter; a stack has two
        return logps


class Dpo(_Referenced, DPOTrainer):
    """TRL's DPOTrainer behind our guard, with our losses beside TRL's."""

    precompute_ref_logps: bool
    _sft_scale: float | None = None  # None until a step's batches are known

    def __init__(self, *args: Any, own_loss: str | None = None, is_soft: bool = False, **kwargs: Any) -> None:
        self.own_loss, self.is_soft = own_loss, is_soft
        super().__init__(*args, **kwargs)
        if self.precompute_ref_logps:
            self.ref_model = None

    def weigh(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        chosen, rejected = (mask.sum() for mask in inputs["completion_mask"][:, 1:].chunk(2))
        tokens = {"entropy": chosen + rejected, "mean_token_accuracy": chosen, "loss/sft": chosen}
        return tokens | {"logits/chosen": chosen, "logits/rejected": rejected}

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False) -> Any:
        label_B = inputs.pop("label", None)
        if "ref_chosen_logps" not in inputs:
            reference = self.model if self.ref_model is None else self.ref_model
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = self.compute_ref_log_probs(reference, inputs)
        if self.own_loss or self.is_soft:  # of all rows alike, or ranks would wait for each other's gathers
            return self._own_loss(model, inputs, label_B)
        before = self.precompute_ref_logps
        self.precompute_ref_logps = True
        outputs: list[Any] = []

        def watched(**kwargs: Any) -> Any:
            outputs.append(model(**kwargs))
            return outputs[-1]

        try:
            loss = super()._compute_loss(watched, inputs, False)
        finally:
            self.precompute_ref_logps = before
        return loss + self._sft_correction(outputs[0], inputs)

    def get_batch_samples(self, *args: Any) -> Any:
        batches, num_items = super().get_batch_samples(*args)
        counts = [int(batch["completion_mask"][:, 1:].chunk(2)[0].sum()) for batch in batches]
        total = sum(map(sum, ranks.gather(counts))) if "sft" in self.loss_types else 0
        # What a micro batch's mean over its chosen tokens must be multiplied by so that the mean over micro batches
        # and ranks is the mean over the tokens of the step.
        self._sft_scale = len(batches) * self.args.world_size / total if total else 0.0
        return batches, num_items

    def _sft_correction(self, outputs: Any, inputs: dict[str, Tensor]) -> Tensor | float:
        """Make TRL's `sft` part, a mean over the chosen tokens of a micro batch, one over those of the whole step.

        Of held-out rows it is a metric, by which `evaluation_loop` takes its mean over all their tokens.
        """
        weight = sum(weight for name, weight in zip(self.loss_types, self.loss_weights, strict=True) if name == "sft")
        if not weight or self.use_weighting:
            return 0.0
        mask_BT = inputs["completion_mask"][:, 1:].chunk(2)[0].bool()
        logps_BT = outputs.log_probs[:, -mask_BT.size(1) :].chunk(2)[0]
        total, num_tokens = -weight * logps_BT[mask_BT].sum(), int(mask_BT.sum())
        if not self.model.training:
            self._metrics["eval"]["loss/sft"].append(float(total) / num_tokens)
            return 0.0
        return 0.0 if self._sft_scale is None else total * (self._sft_scale - 1 / num_tokens)

    def _own_loss(self, model: Any, inputs: dict[str, Tensor], label_B: Tensor | None) -> Tensor:
        labels_BT = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=labels_BT,
            use_cache=False,
            fused_lm_head=True,
        )
        token_logps_BT = outputs.log_probs[:, 1 - labels_BT.size(1) :]
        chosen_B, rejected_B = sequence_logps(token_logps_BT, inputs["completion_mask"][:, 1:]).chunk(2)
        chosen_ratio_B = chosen_B - inputs["ref_chosen_logps"]
        rejected_ratio_B = rejected_B - inputs["ref_rejected_logps"]
        margins_B = chosen_ratio_B - rejected_ratio_B
        if self.own_loss == "ipo_sum":
            losses_B = ipo_sum_loss(margins_B, beta=self.beta)
        else:
            # A pair whose label is wrong with probability eps, and whose soft label says p, is preferred with
            # probability p (1 - eps) + (1 - p) eps.
            label_B = torch.ones_like(margins_B) if label_B is None else label_B.to(margins_B)
            smoothing = self.label_smoothing if self.own_loss == "cdpo" else 0.0
            wrong_B = 1 - (label_B * (1 - smoothing) + (1 - label_B) * smoothing)
            losses_B = cdpo_loss(margins_B, beta=self.beta, label_smoothing=wrong_B)
        self._record(inputs, chosen_ratio_B.detach(), rejected_ratio_B.detach(), chosen_B, rejected_B)
        return losses_B.mean()

    def _record(self, inputs: dict[str, Tensor], chosen_ratio: Tensor, rejected_ratio: Tensor, *logps: Tensor) -> None:
        """Log under the names TRL uses, so that curves of different losses lie in one plot."""
        mode = "train" if self.model.training else "eval"
        gather, metrics = self.accelerator.gather, self._metrics[mode]
        if mode == "train":
            self._total_train_tokens += int(gather(inputs["attention_mask"].sum()).sum())
        metrics["num_tokens"] = [self._total_train_tokens]
        chosen, rejected = self.beta * chosen_ratio, self.beta * rejected_ratio
        for name, value in (
            ("rewards/chosen", chosen),
            ("rewards/rejected", rejected),
            ("rewards/accuracies", (chosen > rejected).float()),
            ("rewards/margins", chosen - rejected),
            ("logps/chosen", logps[0].detach()),
            ("logps/rejected", logps[1].detach()),
        ):
            metrics[name].append(gather(value).mean().item())


class Kto(_Referenced, KTOTrainer):
    """TRL's KTOTrainer behind our guard.

    Its KL term pairs each prompt with a neighbour's answer inside the micro batch, so rows are shuffled once, before.
    """

    def _order(self, table: Any, batch_size: int, *, seed: int, epoch: int) -> Any:
        return np.arange(len(table))

    def weigh(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = inputs["completion_mask"][:, 1:]
        good = torch.as_tensor(inputs["label"], dtype=torch.bool, device=mask.device)
        weights = {"entropy": mask.sum()}
        for side, rows in (("chosen", good), ("rejected", ~good)):
            weights |= {f"logits/{side}": mask[rows].sum()}
            weights |= dict.fromkeys((f"rewards/{side}", f"logps/{side}"), rows.sum())
        return weights


def build(stage: Stage, run: RunDir) -> Built:
    """Load policy, reference and rows and return a trainer that has not trained yet."""
    stage.expect(DpoOptions)
    chat = open_chat(stage, run)
    tokenizer = chat.tokenizer
    rejects = Rejects()
    tables = share_tables(stage, chat, run.cache, rejects=rejects)
    loaded = ranks.first(lambda: load_policy(stage, run_dir=run.path, tokenizer=tokenizer))
    make = _build_kto if stage.is_unpaired else _build_dpo
    trainer = make(stage, run, tables, loaded, tokenizer)
    return Built(trainer, tables, chat, loaded, rejects)


def _build_dpo(stage: Stage, run: RunDir, tables: Tables, loaded: Loaded, tokenizer: Any) -> Dpo:
    own = next((name for name in stage.trainer.get("loss_type", ()) if name in OWN_LOSSES), None)
    config = build_config(stage, DPOConfig, run.checkpoints, **({"loss_type": ["sigmoid"]} if own else {}))
    collator = DataCollatorForPreference(
        pad_token_id=tokenizer.pad_token_id,
        max_length=config.max_length,
        truncation_mode=config.truncation_mode,
        pad_to_multiple_of=config.pad_to_multiple_of,
    )
    return Dpo(
        model=loaded.model,
        # Precomputed log-probabilities come from the untouched policy: no second model is held. Under FSDP TRL wants
        # one until they are computed, and would load it by a name that not every policy has.
        ref_model=load_reference(stage, loaded) if ranks.uses_fsdp() or not config.precompute_ref_log_probs else None,
        args=config,
        data_collator=LabelledCollator(collator),
        train_dataset=tables.train,
        eval_dataset=tables.eval,
        processing_class=tokenizer,
        watch=watch_for(stage),
        reference=loaded.reference,
        own_loss=own,
        is_soft=any((np.asarray(table["label"]) != 1).any() for table in (tables.train, tables.eval) if table),
    )


def _build_kto(stage: Stage, run: RunDir, tables: Tables, loaded: Loaded, tokenizer: Any) -> Kto:
    if loaded.reference == "base_adapter":
        raise RecipeError(
            "adapter: stack does not work with loss_type kto; use continue or merge",
            where=stage.where(f"{stage.name}.adapter"),
        )
    (loss,) = stage.trainer["loss_type"]
    config = build_config(stage, KTOConfig, run.checkpoints, loss_type=loss)
    # Neighbours are the rows of one forward pass of all processes, over which the KL term is averaged.
    width = micro_batch_size(stage) * ranks.world_size()

    def with_neighbours(table: Any, width: int) -> Any:
        order = shuffled_order(len(table), seed=stage.seed, epoch=0)
        return table.select(order).map(_rotate_answers, batched=True, batch_size=width)

    return Kto(
        model=loaded.model,
        ref_model=load_reference(stage, loaded),
        args=config,
        train_dataset=with_neighbours(tables.train, width),
        eval_dataset=with_neighbours(tables.eval, config.per_device_eval_batch_size) if tables.eval else None,
        processing_class=tokenizer,
        watch=watch_for(stage),
        reference=loaded.reference,
    )


def _rotate_answers(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Give each prompt of a micro batch its neighbour's answer, for KTO's estimate of the KL (arXiv 2402.01306, 4)."""
    answers = rows["completion_ids"]
    return {"KL_completion_ids": [answers[-1], *answers[:-1]]}


def run(stage: Stage, run_dir: Path, *, allow_change: tuple[str, ...] = ()) -> Result:
    """Train the stage in its run directory, going on where an earlier sitting stopped."""
    return fit(stage, run_dir, build, allow_change=allow_change)
