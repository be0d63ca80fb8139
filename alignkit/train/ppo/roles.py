"""The four roles of PPO as adapters and heads on one base, or as models of their own.

With `lora:` policy, reference, a reward model of the same base and the critic share the base's weights; which adapter
acts is switched per forward pass.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignkit.models.adapters import REFERENCE, START, add_scoring_adapter, cast_adapters
from alignkit.models.files import find_model_dir, inspect_model_dir, is_builtin
from alignkit.models.heads import ScoreHead
from alignkit.models.load import Loaded
from alignkit.models.logprobs import Batch, pad_answers, run_trunk, sampled_logps
from alignkit.models.start import find_base, is_same_model

REWARD, CRITIC = "reward", "critic"  # adapter names beside those of the models room


def return_logps(model: Any, read: Callable[[Any, Tensor], Any] | None = None) -> None:
    """Let `model(..., batch=)` return `read(base, hidden states (N, H))` of a batch's answers instead of logits;
    without `read` log-probs (N,), entropies (N,) and hidden states, and with `hidden_only=True` the last alone.

    Part of the model's own forward, so that it works through the wrappers of PEFT, accelerate, DDP and FSDP; without
    `batch` the forward is what it was. TRL's `add_fused_lm_head` does the same and scores prompts too.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    original = base.forward

    @functools.wraps(type(base).forward)  # `generate` looks at the signature
    def forward(*args: Any, batch: Batch | None = None, hidden_only: bool = False, **kwargs: Any) -> Any:
        if batch is None:
            return original(*args, **kwargs)
        if read is not None:
            return read(base, batch.pick(base.base_model(**kwargs, use_cache=False).last_hidden_state))
        hidden_BLH, _ = run_trunk(original, base.get_output_embeddings(), **kwargs, use_cache=False)
        hidden_NH = batch.pick(hidden_BLH)
        return hidden_NH if hidden_only else (*sampled_logps(base, hidden_NH, batch), hidden_NH)

    base.forward = forward


def read_answers(model: Any, batch: Batch, **kwargs: Any) -> Any:
    """Call a model of `return_logps`, or its wrapper: log-probs (N,), entropies (N,) and hidden states (N, H)."""
    return model(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL, batch=batch, **kwargs)


class Roles:
    """Forward passes of the policy and its reference; the critic and a reward adapter share the policy's base."""

    def __init__(self, loaded: Loaded, *, reference: PreTrainedModel | None) -> None:
        """Take the models before any trainer wraps the policy; `reference` is None where adapters of it stand in."""
        self.policy, self.reference = loaded.model, reference
        adapters = {"ref_adapter": (REFERENCE,), "base_adapter": (START,)}
        self._reference_adapters = adapters.get(str(loaded.reference), ())  # none is the bare base
        self.reward_head: nn.Linear | None = None
        for model in (self.policy, reference):
            if model is not None:
                return_logps(model)

    @torch.no_grad()
    def reference_logps(self, batch: Batch) -> Tensor:
        """Log-probs of the reference, (N,)."""
        with nullcontext() if self.reference is not None else self.act_as(self._reference_adapters):
            logps_N: Tensor = read_answers(self.policy if self.reference is None else self.reference, batch)[0]
        return logps_N

    @contextmanager
    def act_as(self, names: Sequence[str]) -> Iterator[None]:
        """Let only the named adapters act on the shared base, without touching what is trained; none: the bare base.

        PEFT's own `set_adapter` also turns gradients on and off, which would lose the policy's while the critic
        computes.
        """
        before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in self._adapted()]
        for layer, *_ in before:
            layer._active_adapter, layer._disable_adapters = list(names), not names
        try:
            yield
        finally:
            for layer, active, disabled in before:
                layer._active_adapter, layer._disable_adapters = active, disabled

    def _adapted(self) -> list[Any]:
        assert isinstance(self.policy, PeftModel)
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        return [module for module in self.policy.modules() if isinstance(module, kinds)]

    def hidden_states(self, batch: Batch, adapters: Sequence[str]) -> Tensor:
        """Hidden states of the shared base with these adapters acting, (N, H)."""
        with self.act_as(adapters):
            hidden_NH: Tensor = read_answers(self.policy, batch, hidden_only=True)
        return hidden_NH

    @contextmanager
    def policy_kept(self) -> Iterator[None]:
        """Put back what acts and what trains after PEFT has added an adapter."""
        model: Any = self.policy
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        dtype = next(p.dtype for name, p in model.named_parameters() if name in trained and ".lora_" in name)
        active = list(model.active_adapters)
        yield
        if getattr(model.get_base_model(), "is_quantized", False):
            cast_adapters(model, dtype)
        for layer in self._adapted():
            layer._active_adapter, layer._disable_adapters = active, False
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)

    @torch.no_grad()
    def score_ids(self, sequences: Sequence[Sequence[int]], *, pad_id: int, batch_size: int) -> Tensor:
        """Score token sequences by the reward adapter, as `frozen.score_ids` does; (B,) float32 on the CPU.

        As in transformers' classifiers the score is read at the last token that is not the pad token. Where pad and
        eos are one token, no score sees the end of an answer.
        """
        assert self.reward_head is not None
        scores: list[Tensor] = []
        for start in range(0, len(sequences), batch_size):
            part = sequences[start : start + batch_size]
            lasts = [max((at for at, token in enumerate(ids) if token != pad_id), default=0) for ids in part]
            # The last token is the "answer", and the score is read at it, not before it.
            before, at_last = zip(*((ids[:n], ids[n : n + 1]) for ids, n in zip(part, lasts, strict=True)), strict=True)
            batch = pad_answers(before, at_last, pad_id=pad_id, device=self.policy.device)
            hidden_BH = self.hidden_states(replace(batch, columns_N=batch.columns_N + 1), (REWARD,))
            scores.append(self.reward_head(hidden_BH).squeeze(-1).cpu())
        return torch.cat(scores)


def hold_reward(roles: Roles, source: str, *, trust_code: bool) -> Path | None:
    """Hold a reward model of the policy's own base as an adapter and a head on it; its directory, else None."""
    directory = None if is_builtin(source) else find_model_dir(source)
    if not isinstance(roles.policy, PeftModel) or directory is None:
        return None
    files = inspect_model_dir(directory, trust_code=trust_code)
    # PEFT names both heads; other modules trained in full would not be the base's.
    own_modules = set(files.config.get("modules_to_save") or ()) - {"score", "classifier"}
    plain = files.config.get("peft_type") == "LORA" and not files.config.get("trainable_token_indices")
    if files.kind != "adapter" or not files.reward or own_modules or not plain:
        return None
    if not is_same_model(roles.policy.get_base_model().name_or_path, find_base(files)):
        return None
    with roles.policy_kept():
        weight = add_scoring_adapter(roles.policy, directory, REWARD)
    roles.reward_head = ScoreHead(weight.size(1), 1, bias=False, device=roles.policy.device).requires_grad_(False)
    roles.reward_head.weight.copy_(weight)
    return directory
