"""Token ids as padded batches, and log-probabilities of given tokens under a causal language model.

PPO, evaluation and the local judge all ask here. Only positions that predict a wanted token go through the LM head,
tile by tile: prompts and padding cost no logits.

Legend: B sequences of a batch, L tokens of the longest, T of the longest answer, N answer tokens in all, H hidden size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from alignkit.models.kernels import head_logps

_VOCABULARY_TILE = 8192
_ROW_TILE = 512  # tokens whose logits are held at a time where they must be sorted


@dataclass(frozen=True)
class Sampling:
    """How answers are sampled, as far as their log-probabilities must know it."""

    temperature: float = 1.0
    min_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens


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

    def pick(self, hidden_BLH: Tensor) -> Tensor:
        """Take the hidden state before every answer token, (N, H)."""
        return hidden_BLH[self.rows_N.to(hidden_BLH.device), self.columns_N.to(hidden_BLH.device)]

    def spread(self, values_N: Tensor) -> Tensor:
        """Lay values out as (B, T): at the answers' tokens, 0 elsewhere."""
        spread = torch.zeros(self.mask_BT.shape, dtype=values_N.dtype, device=values_N.device)
        return spread.masked_scatter(self.mask_BT, values_N)


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, *, left: bool = False, multiple_of: int = 1
) -> tuple[Tensor, Tensor]:
    """Pad rows of token ids, some of them empty, to one width: ids and mask, int64 (B, L) on the CPU."""
    width = -(-max(map(len, rows)) // multiple_of) * multiple_of
    ids_BL = torch.full((len(rows), width), pad_id)
    mask_BL = torch.zeros_like(ids_BL)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids_BL[number, place] = torch.tensor(row, dtype=torch.long)
        mask_BL[number, place] = 1
    return ids_BL, mask_BL


def pad_answers(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, pad_id: int,
    device: torch.device | str = "cpu", num_columns: int | None = None, sampling: Sampling = Sampling(),
) -> Batch:  # fmt: skip
    """Pad prompts with their answers on the right; `num_columns` is T where it is not the longest answer."""
    whole = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    input_ids, attention_mask = pad(whole, pad_id)
    starts = torch.tensor([len(prompt) for prompt in prompts])
    sizes = torch.tensor([len(answer) for answer in answers])
    mask_BT = torch.arange(num_columns or int(sizes.max())) < sizes[:, None]
    rows_N, steps_N = mask_BT.nonzero(as_tuple=True)
    columns_N = starts[rows_N] + steps_N - 1
    return Batch(
        input_ids_BL=input_ids.to(device), attention_mask_BL=attention_mask.to(device), mask_BT=mask_BT.to(device),
        rows_N=rows_N.to(device), columns_N=columns_N.to(device), targets_N=input_ids[rows_N, columns_N + 1].to(device),
        sampling=sampling, early_N=(steps_N < sampling.min_new_tokens).to(device) if sampling.min_new_tokens else None,
    )  # fmt: skip


def run_trunk(
    forward: Callable[..., Any], head: Any, *, reads: tuple[Tensor, ...] | None = None, **inputs: Any
) -> tuple[Tensor, Any]:
    """Run a causal language model up to its LM head: what the head is given, (B, L, H), and the model's output.
    Where only the rows and columns `reads`, row by row, are looked at, others may be 0 (`leave_out_unread`).
    Taken where the head takes it, for some architectures (ModernBERT's decoder) have layers between trunk and head."""
    given: list[Tensor] = []

    def keep(_: Any, arguments: tuple[Tensor, ...]) -> Tensor:
        given.append(arguments[0])
        return arguments[0][:, :0]  # no logits

    if reads is not None and getattr(forward, "takes_reads", False):
        inputs["reads"] = reads
    hook = head.register_forward_pre_hook(keep)
    try:
        output = forward(**inputs)
    finally:
        hook.remove()
    return given[0], output


def token_logps(base: Any, hidden_NH: Tensor, targets_N: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `targets_N` after hidden states and entropies, in nats, float32 (N,); no PEFT wrapper."""
    weight, bias, *bound_and_scale = _read_head(base)
    hidden_NH, targets_N = hidden_NH.to(weight.device), targets_N.to(weight.device)
    options: Any = (temperature, _VOCABULARY_TILE, *bound_and_scale, ("entropy",))
    logps_N, entropy_N, *_ = head_logps(hidden_NH, weight, bias, targets_N, *options)
    return logps_N, entropy_N.detach()


def _read_head(base: Any) -> tuple[Tensor, Tensor | None, float | None, float]:
    """Weight and bias of the LM head, and what its logits are bounded (softcap) and multiplied by."""
    config, head = base.config.get_text_config(), base.get_output_embeddings()
    # FSDP gives a layer its whole weights in that layer's own forward, which is not called here.
    weight, bias = (p.full_tensor() if isinstance(p, DTensor) else p for p in (head.weight, head.bias))
    if isinstance(head, BaseTunerLayer):  # somebody else's adapter: ours leave the head alone
        weight = weight + sum(head.get_delta_weight(name) for name in head.active_adapters)
    # What the architecture multiplies its logits by, by any of the names in use (TRL's `add_fused_lm_head`).
    scale = 1.0
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        scale = float(divisor if config.model_type == "hyperclovax" else 1 / divisor)
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier")
    scale = next((float(value) for name in names if (value := getattr(config, name, None)) is not None), scale)
    return weight, bias, getattr(config, "final_logit_softcapping", None), scale or 1.0


def keep_likeliest(logits_NV: Tensor, *, top_p: float, top_k: int, always_N: Tensor | None = None) -> Tensor:
    """Set all but the `top_k` likeliest logits, and of these the fewest that hold `top_p`, to -inf; `always_N` stay."""
    kept_NV = torch.ones_like(logits_NV, dtype=torch.bool)
    if 0 < top_k < logits_NV.size(1):
        kept_NV = logits_NV >= logits_NV.topk(top_k).values[:, -1:]
    if top_p < 1:
        sorted_NV, order_NV = logits_NV.masked_fill(~kept_NV, -torch.inf).sort(descending=True, stable=True)
        p_NV = sorted_NV.softmax(dim=-1)
        kept_NV = kept_NV & (p_NV.cumsum(dim=-1) - p_NV < top_p).gather(1, order_NV.argsort())
    if always_N is not None:
        kept_NV = kept_NV.scatter(1, always_N[:, None], True)
    return logits_NV.masked_fill(~kept_NV, -torch.inf)


def sampled_logps(base: Any, hidden_NH: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of a batch's answers as they were sampled, float32 (N,).
    With top_p or top_k of the likeliest tokens alone, which the one that was drawn belongs to: of those that a policy
    would draw from now, not of those that it drew from; with min_new_tokens without the stop tokens, where none may
    come. The entropy stays that of the whole distribution."""
    sampling, stops = batch.sampling, list(batch.sampling.stop_ids)
    if sampling.top_p == 1 and not sampling.top_k and batch.early_N is None:
        return token_logps(base, hidden_NH, batch.targets_N, sampling.temperature)
    weight, bias, softcap, scale = _read_head(base)

    def read(hidden_MH: Tensor, targets_M: Tensor, early_M: Tensor | None) -> tuple[Tensor, Tensor]:
        logits_MV = scale * torch.nn.functional.linear(hidden_MH, weight, bias).float()
        if softcap is not None:
            logits_MV = softcap * (logits_MV / softcap).tanh()
        logits_MV = logits_MV / sampling.temperature
        whole_MV = logits_MV.detach().log_softmax(dim=-1)
        if early_M is not None and stops:
            forbidden_MV = torch.zeros_like(logits_MV, dtype=torch.bool)
            forbidden_MV[:, stops] = early_M[:, None]
            logits_MV = logits_MV.masked_fill(forbidden_MV, -torch.inf)
        kept_MV = keep_likeliest(logits_MV, top_p=sampling.top_p, top_k=sampling.top_k, always_N=targets_M)
        entropy_M = -(whole_MV.exp() * whole_MV).sum(dim=-1)
        return kept_MV.log_softmax(dim=-1).gather(1, targets_M[:, None])[:, 0], entropy_M

    tiles: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(hidden_NH), _ROW_TILE):
        rows = slice(start, start + _ROW_TILE)
        early_M = None if batch.early_N is None else batch.early_N[rows]
        arguments = hidden_NH[rows].to(weight), batch.targets_N[rows].to(weight.device), early_M
        tiles.append(checkpoint(read, *arguments, use_reentrant=False))
    logps, entropies = zip(*tiles, strict=True)
    return torch.cat(logps), torch.cat(entropies)
