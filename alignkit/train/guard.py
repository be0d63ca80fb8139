"""What every trainer does the same way: read ready tables, refuse non-finite steps, save what can be trusted.

`Guarded` goes in front of a TRL trainer: `class Sft(Guarded, SFTTrainer)`. It holds no method's loss and decides
nothing about data. Upstream references are transformers 5.23 and TRL 1.16.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import Trainer

from alignkit.errors import DiskError, NonFiniteError, RunError
from alignkit.runs import checkpoints
from alignkit.runs.files import describe_bytes, disk_failures, free_bytes
from alignkit.train.samplers import EpochSampler, grouped_order, shuffled_order
from alignkit.train.signals import StopFlag

TRAINED_ADAPTER = "default"
_SETTINGS = frozenset({"weight_decay", "betas", "eps", "initial_lr"})  # of an optimizer's parameter group


@dataclass
class Watch:
    """What the guard needs to know beyond TRL's config; the fit loop fills it in before training."""

    keep_checkpoints: int = 2
    batching: str = "grouped"
    facts: dict[str, Any] = field(default_factory=dict)  # goes into every manifest: fingerprint, versions, seed
    stop: StopFlag = field(default_factory=StopFlag)
    num_tokens: int = 0  # trained in earlier sittings of this run


class Guarded(Trainer):
    """Mixin over transformers' Trainer; see the module docstring."""

    watch: Watch
    trained_adapters: tuple[str, ...] = (TRAINED_ADAPTER,)  # PEFT's names of those that may have gradients

    @property
    def may_stop(self) -> bool:
        """Whether a checkpoint can be written after this step; not so inside a rollout of ppo."""
        return True

    def ready_final(self) -> None:
        """Make the weights those that are to be published; called once, after training."""

    def __init__(self, *args: Any, watch: Watch | None = None, **kwargs: Any) -> None:
        self.watch = watch or Watch()
        loaded = {name: parameter.data for name, parameter in kwargs["model"].named_parameters()}
        super().__init__(*args, **kwargs)
        # TRL casts every trainable parameter of a quantised model to bfloat16, whatever the compute dtype is. We
        # chose the dtypes when we loaded the model, and a cast back would keep the rounding: put the tensors back.
        for name, parameter in self.model.named_parameters():
            if name in loaded and parameter.dtype != loaded[name].dtype:
                parameter.data = loaded[name]

    # ---- data: tokenised once, by us, before any trainer exists ----

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        table = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed

        def order(epoch: int) -> Any:
            if self.watch.batching == "grouped" and "length" in table.column_names:
                batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
                return grouped_order(table.with_format("numpy")["length"][:], batch_size=batch, seed=seed, epoch=epoch)
            return shuffled_order(len(table), seed=seed, epoch=epoch)

        # state.epoch is a whole number when an epoch starts and keeps its whole part when a resumed one does.
        return EpochSampler(len(table), order, lambda: int(self.state.epoch or 0))

    # ---- steps: nothing that is not finite reaches the optimizer ----

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._last_loss = loss
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        grad_norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        step = self.state.global_step + 1
        loss, norm = float(self._last_loss), float(grad_norm)
        # With float16 the scaler skips steps whose gradients overflow; that is its normal work.
        if not math.isfinite(loss) or (not math.isfinite(norm) and not self.args.fp16):
            kept = checkpoints.list_checkpoints(Path(self.args.output_dir))
            last = f"the last good checkpoint is {kept[0].name}" if kept else "no checkpoint was saved yet"
            raise NonFiniteError(
                f"step {step}: loss is {loss:g} and the gradient norm {norm:g}; stopped before the optimizer step, "
                f"{last}. Lower learning_rate or max_grad_norm, or look at the rows of this step"
            )
        return grad_norm

    # ---- checkpoints: upstream writes the files, we make them count ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save weights and tokenizer, without the frozen adapters and without `training_args.bin`, a pickle."""
        if not self.args.should_save:
            return
        # Checkpoints keep the names the model has in memory; `model/` gets the published ones (they differ for MoE).
        extra: dict[str, Any] = {"save_original_format": False}
        if isinstance(self.model, PeftModel):
            # "auto" would ask the hub whether the base's vocabulary has grown.
            extra = {"selected_adapters": [TRAINED_ADAPTER], "save_embedding_layers": False}
        self.model.save_pretrained(output_dir, state_dict=state_dict, **extra)
        self.processing_class.save_pretrained(output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        directory = Path(self.args.output_dir)
        checkpoint = directory / f"checkpoint-{self.state.global_step}"
        if (checkpoint / checkpoints.MANIFEST).exists():
            return  # this very step is sealed: an interrupt at a save step, or the last step of a resumed run
        self._require_room(directory)
        try:
            with disk_failures(directory, checkpoint.name):
                shutil.rmtree(checkpoint, ignore_errors=True)
                Trainer._save_checkpoint(self, model, trial)  # past TRL's, which writes a model card each time
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    checkpoints.seal(checkpoint, self._manifest_facts())
                    checkpoints.rotate(directory, keep=self.watch.keep_checkpoints)
        except DiskError:
            shutil.rmtree(checkpoint, ignore_errors=True)  # ours, unsealed, and in the way of everything else
            raise

    def _manifest_facts(self) -> dict[str, Any]:
        return {
            "step": self.state.global_step,
            "world_size": self.args.world_size,
            "dtypes": sorted({str(p.dtype) for p in self.model.parameters() if p.requires_grad}),
            "num_tokens": self.watch.num_tokens + self.num_trained_tokens,
            **self.watch.facts,
        }

    @property
    def num_trained_tokens(self) -> int:
        """Non-padding tokens seen in this sitting, over all ranks."""
        return int(getattr(self, "_total_train_tokens", 0))

    def _require_room(self, directory: Path) -> None:
        trainable = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        needed = checkpoints.expected_bytes(directory, first_guess=3 * trainable)
        free = free_bytes(directory)
        if free < needed:
            raise DiskError(
                f"{directory}: checkpoint-{self.state.global_step} needs about {describe_bytes(needed)} and "
                f"{describe_bytes(free)} are free; earlier checkpoints are untouched: make room and run the same "
                "command again"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the state, but keep this sitting's settings: a change that was allowed must have its effect."""
        if checkpoint is None or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        settings = [{key: group[key] for key in _SETTINGS & group.keys()} for group in self.optimizer.param_groups]
        base_lrs = list(getattr(self.lr_scheduler, "base_lrs", ()))
        super()._load_optimizer_and_scheduler(checkpoint)
        for group, given in zip(self.optimizer.param_groups, settings, strict=True):
            group |= given
        if base_lrs and base_lrs != self.lr_scheduler.base_lrs:
            self.lr_scheduler.base_lrs = base_lrs
            for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_lr(), strict=True):
                group["lr"] = rate
            self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _init_training_state(self, max_steps: int, *args: Any) -> Any:
        """Take how often to log, save and evaluate from the recipe: upstream takes it from the checkpoint."""
        found = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Copy the sealed weights into the model as it stands, so that dtypes and frozen parts stay what they are.

        Upstream reloads adapters through `load_adapter`, which changes bfloat16 ones to float32, and for full models
        only logs missing keys.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        directory = Path(resume_from_checkpoint)
        if isinstance(self.model, PeftModel):
            saved = load_file(directory / "adapter_model.safetensors")
            expected = set(
                get_peft_model_state_dict(self.model, adapter_name=TRAINED_ADAPTER, save_embedding_layers=False)
            )
            _require_same_keys(directory, expected, set(saved))
            set_peft_model_state_dict(self.model, saved, adapter_name=TRAINED_ADAPTER)
            return
        saved = {}
        for shard in sorted(directory.glob("model*.safetensors")):
            saved |= load_file(shard)
        tied = set(getattr(self.model, "_tied_weights_keys", None) or ())
        result = self.model.load_state_dict(saved, strict=False)
        _require_same_keys(directory, set(result.missing_keys) - tied, set(result.unexpected_keys))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: upstream's card names local paths, and the run directory says more."""


def _require_same_keys(directory: Path, expected: set[str], found: set[str]) -> None:
    if expected != found:
        names = sorted(expected ^ found)
        raise RunError(
            f"does not hold the parameters being trained ({len(names)} differ, first {names[0]}); "
            "start over with --force",
            where=str(directory),
        )
