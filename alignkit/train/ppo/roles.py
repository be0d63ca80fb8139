"""The four roles of PPO as adapters and heads on one base, or as models of their own.

With `lora:` policy, reference, a reward model of the same base and the critic share the base's weights; which adapter
acts is switched per forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignkit.models.adapters import REFERENCE, START, TRAINED, add_scoring_adapter, cast_adapters
from alignkit.models.classifier import cut_at_score
from alignkit.models.files import ModelFiles, find_model_dir, fingerprint_weights, inspect_model_dir, is_builtin
from alignkit.models.load import Loaded, load_reference
from alignkit.models.logprobs import Batch, pad_answers, run_trunk, sampled_logps
from alignkit.models.parameters import describe_parameters
from alignkit.models.start import find_base

REWARD, CRITIC = "reward", "critic"  # adapter names beside those of the models room


def return_logps(model: Any, read: Callable[[Any, Tensor, Batch], Any] | None = None) -> None:
    """Let `model(..., batch=)` return `read(base, hidden states (N, H), batch)` of a batch's answers instead of logits;
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
            return read(base, batch.pick(base.base_model(**kwargs, use_cache=False).last_hidden_state), batch)
        hidden_BLH, _ = run_trunk(original, base.get_output_embeddings(), **kwargs, use_cache=False)
        hidden_NH = batch.pick(hidden_BLH)
        return hidden_NH if hidden_only else (*sampled_logps(base, hidden_NH, batch), hidden_NH)

    base.forward = forward


def read_answers(model: Any, batch: Batch, **kwargs: Any) -> Any:
    """Call a model of `return_logps`; `model` may be its wrapper."""
    return model(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL, batch=batch, **kwargs)


@dataclass(frozen=True)
class Part:
    """One thing held in memory: `what` is base, adapter, head or model."""

    what: str
    roles: tuple[str, ...]
    num_bytes: int


class AdapterSwitch:
    """Choose which adapters of a PeftModel act, without touching what is trained.

    PEFT's own `set_adapter` also turns gradients on and off, which would lose the policy's while the critic computes.
    """

    def __init__(self, model: PeftModel) -> None:
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        self._layers = [module for module in model.modules() if isinstance(module, kinds)]

    @contextmanager
    def acting(self, names: Sequence[str]) -> Iterator[None]:
        """Let only the named adapters act; none is the bare base."""
        before = [(layer, layer._active_adapter, layer._disable_adapters) for layer in self._layers]
        for layer in self._layers:
            layer._active_adapter, layer._disable_adapters = list(names), not names
        try:
            yield
        finally:
            for layer, active, disabled in before:
                layer._active_adapter, layer._disable_adapters = active, disabled


class Roles:
    """Forward passes of the policy and its reference; the critic and a reward adapter use the same switch."""

    def __init__(self, loaded: Loaded, *, reference: PreTrainedModel | None) -> None:
        self.policy = loaded.model
        self.reference = reference
        self.switch = AdapterSwitch(loaded.model) if isinstance(loaded.model, PeftModel) else None
        self._reference_adapters = {"adapter_off": (), "ref_adapter": (REFERENCE,), "base_adapter": (START,)}.get(
            str(loaded.reference), ()
        )
        self.reward_head: nn.Linear | None = None
        return_logps(self.policy)
        if reference is not None:
            return_logps(reference)

    def policy_logps(self, model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return log-probs (N,), entropies (N,) and hidden states (N, H) of the policy; `model` may be its wrapper."""
        logps_N, entropy_N, hidden_NH = read_answers(model, batch)
        return logps_N, entropy_N, hidden_NH

    @torch.no_grad()
    def reference_logps(self, batch: Batch) -> Tensor:
        """Return log-probs of the reference, (N,)."""
        if self.reference is not None:
            return self.policy_logps(self.reference, batch)[0]
        with self.act_as(self._reference_adapters):
            return self.policy_logps(self.policy, batch)[0]

    @contextmanager
    def act_as(self, names: Sequence[str]) -> Iterator[None]:
        """Let other adapters than the policy's act on the shared base."""
        assert self.switch is not None
        with self.switch.acting(names):
            yield

    def hidden_states(self, batch: Batch, adapters: Sequence[str]) -> Tensor:
        """Return the shared base's hidden states with these adapters acting, (N, H)."""
        with self.act_as(adapters):
            hidden_NH: Tensor = read_answers(self.policy, batch, hidden_only=True)
        return hidden_NH

    def trunk(self) -> Any:
        """Return the shared base: a causal language model without its adapters' wrapper."""
        return self.policy.get_base_model()

    def add_reward(self, directory: Path) -> None:
        """Hold a reward model of the policy's own base as an adapter and a head on it."""
        assert isinstance(self.policy, PeftModel)
        with self.policy_kept():
            weight = add_scoring_adapter(self.policy, directory, REWARD)
        self.reward_head = nn.Linear(weight.size(1), 1, bias=False, device=self.policy.device)
        self.reward_head.weight.data.copy_(weight)
        self.reward_head.requires_grad_(False)

    @contextmanager
    def policy_kept(self) -> Iterator[None]:
        """Put back what acts and what trains after PEFT has added an adapter."""
        model = self.policy
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        dtype = next(p.dtype for name, p in model.named_parameters() if name in trained and ".lora_" in name)
        active = list(model.active_adapters)
        yield
        if getattr(self.trunk(), "is_quantized", False):
            cast_adapters(model, dtype)
        self.switch = AdapterSwitch(model)
        for layer in self.switch._layers:
            layer._active_adapter, layer._disable_adapters = active, False
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)

    @torch.no_grad()
    def score_ids(self, sequences: Sequence[Sequence[int]], *, pad_id: int, batch_size: int) -> Tensor:
        """Score whole token sequences by the reward adapter, as `scoring.score_ids` does; (B,) float32 on the CPU."""
        assert self.reward_head is not None
        scores: list[Tensor] = []
        for start in range(0, len(sequences), batch_size):
            part = [cut_at_score(ids, pad_id) for ids in sequences[start : start + batch_size]]
            # The last token is the "answer", and the score is read at it, not before it.
            batch = pad_answers(
                [ids[:-1] for ids in part], [ids[-1:] for ids in part], pad_id=pad_id, device=self.policy.device
            )
            hidden_BH = self.hidden_states(replace(batch, columns_N=batch.columns_N + 1), (REWARD,))
            scores.append(self.reward_head(hidden_BH.to(self.reward_head.weight.dtype)).squeeze(-1).float().cpu())
        return torch.cat(scores)


def build_roles(stage: Any, loaded: Loaded) -> Roles:
    """Return policy and reference, before any trainer wraps the policy."""
    return Roles(loaded, reference=load_reference(stage, loaded))


def find_reward_on_base(roles: Roles, source: str, *, trust_code: bool) -> Path | None:
    """Return the directory of a reward model that is an adapter on the very base of the policy, else None."""
    if not isinstance(roles.policy, PeftModel) or is_builtin(source):
        return None
    directory = find_model_dir(source)
    if directory is None:
        return None
    files = inspect_model_dir(directory, trust_code=trust_code)
    # PEFT names both heads; other modules trained in full would not be the base's.
    own_modules = set(files.config.get("modules_to_save") or ()) - {"score", "classifier"}
    if files.kind != "adapter" or not files.reward or own_modules:
        return None
    return directory if _same_base(roles.trunk(), files) else None


def _same_base(base: Any, files: ModelFiles) -> bool:
    mine, other = base.name_or_path, find_base(files)
    if mine == other:
        return True
    here, there = find_model_dir(mine), find_model_dir(other)
    if here is None or there is None:
        return False
    return here.resolve() == there.resolve() or fingerprint_weights(here) == fingerprint_weights(there)


def list_parts(
    roles: Roles, heads: Sequence[tuple[str, nn.Module]], models: Sequence[tuple[str, nn.Module]]
) -> list[Part]:
    """Return what is held in memory for the four roles: the bases, then adapters and heads."""
    parts: list[Part] = []
    if not isinstance(roles.policy, PeftModel):
        parts.append(Part("model", ("policy",), _bytes(roles.policy)))
        if roles.reference is not None:
            parts.append(Part("model", ("reference",), _bytes(roles.reference)))
    else:
        names = list(roles.policy.peft_config)
        sizes = {name: _adapter_bytes(roles.policy, name) for name in names}
        base = _bytes(roles.policy) - sum(sizes.values())
        shared = ["policy", "reference"] + [REWARD] * (REWARD in names) + [CRITIC] * (CRITIC in names)
        if any(name == CRITIC for name, _ in heads) and CRITIC not in shared:
            shared.append(CRITIC)
        parts.append(Part("base", tuple(shared), base))
        role_of = {TRAINED: "policy", START: "policy, reference", REFERENCE: "reference"}
        parts += [Part("adapter", (role_of.get(name, name),), sizes[name]) for name in names]
    parts += [Part("head", (role,), _bytes(head)) for role, head in heads]
    parts += [Part("model", (role,), _bytes(model)) for role, model in models]
    return parts


def _bytes(module: nn.Module) -> int:
    return int(describe_parameters(module)["bytes"])


def _adapter_bytes(model: nn.Module, name: str) -> int:
    own = (p for key, p in model.named_parameters() if f".{name}" in key and "lora_" in key)
    return sum(p.numel() * p.element_size() for p in own)
