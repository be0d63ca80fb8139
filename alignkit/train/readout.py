"""What a model says about sampled answers, token by token: log-probabilities, entropies and hidden states.

Answers are padded once, on the right; only the positions that predict a token of an answer go through the LM head, so
that prompts and padding cost no logits. Nothing here knows rewards or losses.

Legend: B answers, L tokens of the longest prompt with its answer, T of the longest answer, N answer tokens in all, H
the hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from trl.kernels import ChunkedLogProbFunction

from alignkit.models.logprobs import pad

_VOCABULARY_TILE = 8192


@dataclass(frozen=True)
class Sampling:
    """How the policy is sampled, as far as its log-probabilities must know it."""

    temperature: float = 1.0
    min_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Answers ready for a forward pass; everything lies on one device."""

    input_ids_BL: Tensor
    attention_mask_BL: Tensor
    mask_BT: Tensor  # bool, the tokens of each answer
    rows_N: Tensor
    columns_N: Tensor  # the position before each answer token, which predicts it
    targets_N: Tensor
    sampling: Sampling
    early_N: Tensor | None = None  # where min_new_tokens forbids the stop tokens

    def spread(self, values_N: Tensor) -> Tensor:
        """Return (B, T) with the values at the answers' tokens, 0 elsewhere."""
        spread = torch.zeros(self.mask_BT.shape, dtype=values_N.dtype, device=values_N.device)
        return spread.masked_scatter(self.mask_BT, values_N)


def pad_answers(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    pad_id: int,
    device: torch.device | str = "cpu",
    num_columns: int | None = None,
    sampling: Sampling = Sampling(),
) -> Batch:
    """Pad prompts with their answers on the right; `num_columns` is T where it is not the longest answer."""
    whole = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    input_ids, attention_mask = pad(whole, pad_id)
    starts = torch.tensor([len(prompt) for prompt in prompts])
    sizes = torch.tensor([len(answer) for answer in answers])
    longest = num_columns or int(sizes.max())
    mask_BT = torch.arange(longest) < sizes[:, None]
    rows_N, steps_N = mask_BT.nonzero(as_tuple=True)
    columns_N = starts[rows_N] + steps_N - 1
    return Batch(
        input_ids_BL=input_ids.to(device),
        attention_mask_BL=attention_mask.to(device),
        mask_BT=mask_BT.to(device),
        rows_N=rows_N.to(device),
        columns_N=columns_N.to(device),
        targets_N=input_ids[rows_N, columns_N + 1].to(device),
        sampling=sampling,
        early_N=(steps_N < sampling.min_new_tokens).to(device) if sampling.min_new_tokens else None,
    )


Read = Callable[[Any, Tensor, Batch], Any]  # what is made of a model's hidden states


def install_readout(model: Any, read: Read | None = None) -> None:
    """Let `model(..., readout=batch)` return `read(base, hidden states (N, H), batch)`, without it log-probs (N,),
    entropies (N,) and hidden states; with `hidden_only=True` it returns the hidden states alone.

    Part of the model's own forward, so that it works through the wrappers of PEFT, accelerate, DDP and FSDP; without
    `readout` the forward is what it was. TRL's `add_fused_lm_head` does the same and scores prompts too.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    original = base.forward

    @functools.wraps(type(base).forward)  # `generate` looks at the signature
    def forward(*args: Any, readout: Batch | None = None, hidden_only: bool = False, **kwargs: Any) -> Any:
        if readout is None:
            return original(*args, **kwargs)
        hidden_NH = _hidden_states(base, readout, **kwargs)
        return hidden_NH if hidden_only else (read or _read_logps)(base, hidden_NH, readout)

    base.forward = forward


def read_out(model: Any, batch: Batch, **kwargs: Any) -> Any:
    """Call a model that has a readout; `model` may be its wrapper."""
    return model(input_ids=batch.input_ids_BL, attention_mask=batch.attention_mask_BL, readout=batch, **kwargs)


def _hidden_states(base: Any, batch: Batch, **kwargs: Any) -> Tensor:
    """Return the trunk's last hidden state before every answer token, (N, H)."""
    hidden_BLH = base.base_model(**(kwargs | {"use_cache": False})).last_hidden_state
    return hidden_BLH[batch.rows_N.to(hidden_BLH.device), batch.columns_N.to(hidden_BLH.device)]


def _read_logps(base: Any, hidden_NH: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    return (*_token_logps(base, hidden_NH, batch), hidden_NH)


def _token_logps(base: Any, hidden_NH: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies at the sampling temperature, float32 (N,).

    The logits are never held whole: TRL's kernel folds them tile by tile.
    """
    sampling = batch.sampling
    logps_N, entropy_N = _fold_logits(base, hidden_NH, batch.targets_N, sampling.temperature)
    if batch.early_N is not None:
        # Where sampling cannot stop, the other tokens share the stop tokens' mass: p' = p / (1 - p_stop). The logged
        # entropy stays that of the whole distribution.
        early_MH = hidden_NH[batch.early_N]
        stops_MS = [
            _fold_logits(base, early_MH, torch.full_like(batch.targets_N[batch.early_N], stop), sampling.temperature)[0]
            for stop in sampling.stop_ids
        ]
        rest_M = torch.log1p(-torch.stack(stops_MS).exp().sum(dim=0).clamp(max=1 - 1e-6))
        logps_N = logps_N.index_add(0, batch.early_N.nonzero().squeeze(1), -rest_M)
    return logps_N, entropy_N.detach()


def _fold_logits(base: Any, hidden_NH: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    config = base.config.get_text_config()
    head = base.get_output_embeddings()
    # FSDP gives a layer its whole weights in that layer's own forward, which is not called here.
    weight, bias = (p.full_tensor() if isinstance(p, DTensor) else p for p in (head.weight, head.bias))
    logps_N, entropy_N, *_ = ChunkedLogProbFunction.apply(
        hidden_NH.to(weight.device),
        weight,
        bias,
        targets_N.to(weight.device),
        temperature,
        _VOCABULARY_TILE,
        getattr(config, "final_logit_softcapping", None),
        _logit_scale(config),
        ("log_probs", "entropy"),
    )
    return logps_N, entropy_N


def _logit_scale(config: Any) -> float:
    """Return what the architecture multiplies its logits by, by any of the names in use (TRL's `add_fused_lm_head`)."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling if config.model_type == "hyperclovax" else 1 / scaling)
