"""Direct preference optimisation on TRL's DPOTrainer, and KTO for answers without a partner, with what TRL lacks: the
losses of `OWN_LOSSES`, soft labels, and a reference that is right for continued, stacked and merged adapters."""

from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from alignkit.errors import RecipeError
from alignkit.models.adapters import REFERENCE, START, TRAINED, activate, copy_adapter
from alignkit.recipe import Stage
from alignkit.recipe.methods import DpoOptions
from alignkit.recipe.words import OWN_LOSSES
from alignkit.runs.directory import RunDir
from alignkit.train import ranks
from alignkit.train.fit import fit
from alignkit.train.losses import PairLoss, Pairs, pick_loss, sequence_logps
from alignkit.train.setup import Setup, build_config, collator_for, open_rows
from alignkit.train.tables import shuffled_order
from alignkit.train.trainer import Guarded, switch_off_dropout


class _Referenced(Guarded):
    """The reference policy, for both trainers: adapter off, a frozen copy, or the frozen adapter of a stack."""

    def __init__(self, *args: Any, reference: str | None = None, **kwargs: Any) -> None:
        self.reference = reference
        model = kwargs["model"]
        if isinstance(model, PeftModel) and REFERENCE in model.peft_config:
            model.delete_adapter(REFERENCE)  # TRL makes its own copy, under the same name
        super().__init__(*args, **kwargs)
        if not isinstance(self.model, PeftModel):
            return
        self.model.delete_adapter(REFERENCE)  # TRL copies no vectors (VeRA, IA3)
        if reference in ("base_adapter", "ref_adapter"):  # else it is the base: TRL switches the adapter off
            copy_adapter(self.model, START if reference == "base_adapter" else TRAINED, REFERENCE)
            self.model.set_adapter(TRAINED)
            if self.args.disable_dropout:
                switch_off_dropout(self.model)  # the copy's
        if START in self.model.peft_config:
            activate(self.model, [START, TRAINED])  # TRL leaves one of a stack

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Tensor]) -> Any:
        logps = super().compute_ref_log_probs(model, inputs)
        if START in getattr(self.model, "peft_config", ()):
            activate(self.model, [START, TRAINED])  # TRL's context puts back one adapter; a stack has two
        return logps


class Dpo(_Referenced, DPOTrainer):
    """TRL's DPOTrainer behind our guard, with our losses beside TRL's."""

    precompute_ref_logps: bool
    _sft_scale: float | None = None  # None until a step's batches are known

    def __init__(self, *args: Any, own_loss: PairLoss | None = None, has_reference: bool = True, **kwargs: Any) -> None:
        self.own_loss, self.has_reference = own_loss, has_reference
        super().__init__(*args, **kwargs)
        if self.precompute_ref_logps:
            self.ref_model = None

    def weigh(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        chosen, rejected = (mask.sum() for mask in inputs["completion_mask"][:, 1:].chunk(2))
        tokens = {"entropy": chosen + rejected, "mean_token_accuracy": chosen, "loss/sft": chosen}
        return tokens | {"logits/chosen": chosen, "logits/rejected": rejected}

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False) -> Any:
        label_B = inputs.pop("label", None)
        if self.has_reference and "ref_chosen_logps" not in inputs:
            reference = self.model if self.ref_model is None else self.ref_model
            inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = self.compute_ref_log_probs(reference, inputs)
        if self.own_loss is not None:  # of all rows alike, or ranks would wait for each other's gathers
            return self._own_loss(self.own_loss, model, inputs, label_B)
        outputs: list[Any] = []

        def watched(**kwargs: Any) -> Any:
            outputs.append(model(**kwargs))
            return outputs[-1]

        with patch.object(self, "precompute_ref_logps", True):
            loss = super()._compute_loss(watched, inputs, False)
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
        """Make TRL's `sft` part, a mean over the chosen tokens of a micro batch, one over those of the whole step. Of
        held-out rows it is a metric, by which `evaluation_loop` takes its mean over all their tokens."""
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

    def _precompute_ref_logps(self, dataset: Any, *args: Any) -> Any:
        return super()._precompute_ref_logps(dataset, *args) if self.has_reference else dataset

    def _own_loss(self, loss: PairLoss, model: Any, inputs: dict[str, Tensor], label_B: Tensor | None) -> Tensor:
        """A loss of `OWN_LOSSES`; metrics have TRL's names, so that curves of different losses lie in one plot."""
        labels_BT = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**tokens, labels=labels_BT, use_cache=False, fused_lm_head=True)
        mask_BT = inputs["completion_mask"][:, 1:]
        chosen_B, rejected_B = sequence_logps(outputs.log_probs[:, 1 - labels_BT.size(1) :], mask_BT).chunk(2)
        ref_chosen_B, ref_rejected_B = (
            inputs[f"ref_{side}_logps"] if self.has_reference else 0.0 for side in ("chosen", "rejected")
        )
        label_B = torch.ones_like(chosen_B) if label_B is None else label_B.to(chosen_B)
        chosen_tokens_B, rejected_tokens_B = mask_BT.sum(dim=1).chunk(2)
        pairs = Pairs(chosen_B, rejected_B, chosen_tokens_B, rejected_tokens_B, label_B, ref_chosen_B, ref_rejected_B)
        chosen = self.beta * (chosen_B - ref_chosen_B).detach()
        rejected = self.beta * (rejected_B - ref_rejected_B).detach()
        found = {
            "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/margins": chosen - rejected,
            "rewards/accuracies": chosen > rejected, "logps/chosen": chosen_B, "logps/rejected": rejected_B,
        }  # fmt: skip
        self.note_metrics(found, num_tokens=inputs["attention_mask"].sum())
        weights = dict(zip(self.loss_types, self.loss_weights, strict=True))
        total = weights["sigmoid"] * loss(pairs).mean()  # as TRL knows it
        if "sft" in weights:
            likelihood = -weights["sft"] * chosen_B.sum() / chosen_tokens_B.sum()
            total = total + likelihood + self._sft_correction(outputs, inputs)
        return total


class Kto(_Referenced, KTOTrainer):
    """TRL's KTOTrainer behind our guard. Its KL term pairs each prompt with a neighbour's answer inside the micro
    batch, so rows are shuffled once, before."""

    def _order(self, table: Any, epoch: int, batch_size: int) -> Any:
        return np.arange(len(table))

    def weigh(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = inputs["completion_mask"][:, 1:]
        good = torch.as_tensor(inputs["label"], dtype=torch.bool, device=mask.device)
        weights = {"entropy": mask.sum()}
        for side, rows in (("chosen", good), ("rejected", ~good)):
            weights |= {f"logits/{side}": mask[rows].sum()}
            weights |= dict.fromkeys((f"rewards/{side}", f"logps/{side}"), rows.sum())
        return weights


def build(stage: Stage, run: RunDir) -> Setup:
    """Load policy, reference and rows and make a trainer that has not trained yet."""
    stage.expect(DpoOptions)
    setup = open_rows(stage, run)
    setup.load()
    if stage.is_unpaired:
        setup.trainer = _build_kto(setup)
        return setup
    tables, loaded = setup.tables, setup.loaded
    (own,) = {*stage.trainer.get("loss_type", ())} & OWN_LOSSES.keys() or (None,)
    is_soft = any((np.asarray(table["label"]) != 1).any() for table in (tables.train, tables.eval) if table)
    has_reference = own is None or OWN_LOSSES[own].has_reference
    names = ["sigmoid" if name == own else name for name in stage.trainer.get("loss_type", ["sigmoid"])]
    fixed: dict[str, Any] = {"loss_type": names} if own else {}
    if not has_reference:
        fixed["precompute_ref_log_probs"] = True  # TRL then holds no second model, and `Dpo` computes nothing
    config = build_config(stage, DPOConfig, setup.run.checkpoints, **fixed)
    loss = None
    if own or is_soft:  # a soft label on `sigmoid` is cdpo without smoothing
        smoothing = config.label_smoothing if own else 0.0
        loss = pick_loss(own or "cdpo", stage.trainer, beta=config.beta, label_smoothing=smoothing)
    # Precomputed log-probabilities come from the untouched policy: no second model is held. Under FSDP TRL wants one
    # until they are computed, and would load it by a name that not every policy has.
    needs_model = has_reference and (ranks.uses_fsdp() or not config.precompute_ref_log_probs)
    setup.trainer = Dpo(
        **setup.arguments(config), ref_model=setup.reference(config) if needs_model else None,
        data_collator=collator_for(stage, setup.chat.tokenizer), reference=loaded.reference if has_reference else None,
        own_loss=loss, has_reference=has_reference,
    )  # fmt: skip
    return setup


def _build_kto(setup: Setup) -> Kto:
    stage, loaded = setup.stage, setup.loaded
    if START in getattr(loaded.model, "peft_config", ()):
        what = "two adapters at work (adapter: stack; init_lora_weights: pissa, olora) are not for loss_type kto; use "
        raise RecipeError(f"{what}adapter: continue or merge", where=stage.where(f"{stage.name}.adapter"))
    (loss,) = stage.trainer["loss_type"]
    config = build_config(stage, KTOConfig, setup.run.checkpoints, loss_type=loss)

    def rotate(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Give each prompt its neighbour's answer, for KTO's estimate of the KL (arXiv 2402.01306, section 4)."""
        *before, last = rows["completion_ids"]
        return {"KL_completion_ids": [last, *before]}

    arguments = setup.arguments(config)
    # Neighbours are the rows of one forward pass of all processes, over which the KL term is averaged.
    widths = config.per_device_train_batch_size * ranks.world_size(), config.per_device_eval_batch_size
    for side, width in zip(("train_dataset", "eval_dataset"), widths, strict=True):
        if table := arguments[side]:
            order = shuffled_order(len(table), seed=stage.seed, epoch=0)
            arguments[side] = table.select(order).map(rotate, batched=True, batch_size=width)
    return Kto(**arguments, ref_model=setup.reference(config), reference=loaded.reference)


run = partial(fit, build)
