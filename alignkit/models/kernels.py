"""What makes a step faster and leaves its numbers as they are: an LM head, rows without padding, memory used again."""

import ctypes
import math
import os
import platform
from collections.abc import Sequence
from copy import copy
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import embedding, linear
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from alignkit.models.files import KNOWN

_LARGEST = 2**25  # logits in one piece: 128 MiB
_WORTH_SHARING = 8  # tokens that two rows begin with alike
_WORTH_PACKING = 0.95  # of the places of a padded batch, when tokens fill no more of them
_ROOM = 32  # tokens that a buffer of keys and values has more room for
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one, which the system would fill with zeros again each time."""
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the largest that it takes
        library.mallopt(_M_TRIM_THRESHOLD, 512 * 2**20)


def _pads_right(given: dict[str, Any]) -> bool:
    """Whether a call reads rows from their beginning, keeps no cache, and has all of its padding on the right."""
    mask_BT: Any = given.get("attention_mask")
    is_plain = isinstance(mask_BT, Tensor) and mask_BT.dim() == 2 and not torch.compiler.is_compiling()
    begins = given.get("use_cache") is False and given.get("past_key_values") is None
    return is_plain and begins and bool(mask_BT[:, 0].all() and (mask_BT[:, 1:] <= mask_BT[:, :-1]).all())


def _is_plain(model: Any) -> bool:
    """Whether no token of a model sees a later one, and its attention is transformers' sdpa."""
    causal = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    reads_on = all(causal) and getattr(model.config, "is_causal", True)
    return bool(causal) and reads_on and model.config._attn_implementation == "sdpa"


def leave_out_masks(model: Any) -> None:
    """Take the mask away where all padding is on the right: no real token of a causal model can see it there.
    Attention then takes the kernel that reads half of the pairs. Generation, whose padding is on the left, keeps it."""
    if not _is_plain(model):
        return

    def leave_out(_: Any, arguments: Any, given: dict[str, Any]) -> Any:
        return arguments, given | {"attention_mask": None} if _pads_right(given) else given

    base: Any = model.base_model
    base.register_forward_pre_hook(leave_out, with_kwargs=True)
    # GPT-2 warns of pad tokens that come without a mask, as they do from here.
    base.warn_if_padding_and_no_attention_mask = lambda *_: None


def lay_out(rows: Sequence[list[int]]) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """Lay rows of token ids behind each other, sorted; what one begins with as the row before it does lies there once.
    Give the place of each row's tokens, and, in the order of places, how many tokens each shares and adds."""
    places, parts, before, found, total = [list[int]() for _ in rows], [], list[int](), list[int](), 0
    for number in sorted(range(len(rows)), key=rows.__getitem__):
        row = rows[number]
        shared = min(len(os.path.commonprefix([before, row])), len(row) - 1)
        shared = shared if shared >= _WORTH_SHARING else 0
        places[number] = found = [*found[:shared], *range(total, total + len(row) - shared)]
        parts.append((shared, len(row) - shared))
        before, total = row, total + len(row) - shared
    return places, parts


class _Unread:
    """Hooks that leave out what is not read: hidden states of the last layer, and on the CPU padding and repeats."""

    reads: tuple[Tensor, ...] | None = None  # rows and columns, (N,), row by row; None: all
    columns_BR: Tensor | None = None  # the same by row, where they are few; the first column stands for those it lacks

    places_BT: Tensor | None = None  # of tokens that are packed in one row, as `lay_out` has it; None: they are not

    def __init__(self, base: Any, attention: Any) -> None:
        self.base, self.attention = base, attention

    def drops(self) -> bool:
        """Whether dropout is at work: its random numbers are drawn for all positions."""
        rates = (module.p for module in self.base.modules() if isinstance(module, nn.Dropout) and module.training)
        return any(rates) or (self.base.training and bool(getattr(self.attention, "attention_dropout", 0.0)))

    def choose(self, _: Any, __: Any, given: dict[str, Any]) -> None:
        asked = given.pop("reads", None)
        ids, labels, batch = given.get("input_ids"), given.get("labels"), given.get("batch")
        recomputes = getattr(self.base, "is_gradient_checkpointing", False) and torch.is_grad_enabled()
        drops = self.drops()
        self.reads = self.columns_BR = None
        if ids is None or recomputes or drops or given.get("output_hidden_states") or torch.compiler.is_compiling():
            return
        if asked is not None:
            self.reads, rows_N = asked, asked[0]
            counts_B = rows_N.bincount(minlength=len(ids))
            if 2 * (most := int(counts_B.max())) <= ids.size(1):
                self.columns_BR = ids.new_zeros(len(ids), most)
                numbers_N = torch.arange(len(rows_N), device=ids.device) - (counts_B.cumsum(0) - counts_B)[rows_N]
                self.columns_BR[rows_N, numbers_N] = asked[1]
        elif batch is not None:
            self.reads = batch.rows_N, batch.columns_N
        elif hasattr(self.base, "score") and self.base.get_output_embeddings() is None:
            rows_B, places_T = (torch.arange(size, device=ids.device) for size in ids.shape)
            # As transformers' classifiers have it: the last token that is not the pad token.
            self.reads = rows_B, (places_T * (ids != self.base.config.pad_token_id)).argmax(dim=1)
            self.columns_BR = self.reads[1][:, None]
        elif labels is not None and given.get("fused_lm_head") and given.get("shift_labels") is None:
            from trl.trainer import utils

            self.reads = (labels[:, 1:] != -100).nonzero(as_tuple=True) if utils._use_triton(labels.device) else None

    def forget(self, *_: Any) -> None:
        self.reads = self.columns_BR = None

    def pack(self, trunk: Any, arguments: Any, given: dict[str, Any]) -> Any:
        """Make one row of all tokens that a call must read, where that leaves out something worth it."""
        if len(arguments) == 1 and "input_ids" not in given:  # as GPT-2's heads call it
            arguments, given = (), given | {"input_ids": arguments[0]}
        ids_BT, mask_BT, self.places_BT = given.get("input_ids"), cast(Tensor, given.get("attention_mask")), None
        noisy = trunk.training and hasattr(trunk.get_input_embeddings(), "neftune_noise_alpha")  # by the size of a row
        if ids_BT is None or ids_BT.device.type != "cpu" or not _pads_right(given) or self.drops() or noisy:
            return None
        tensors = {name for name, value in given.items() if isinstance(value, Tensor)}
        wants_all = any(given.get(name) for name in ("output_hidden_states", "output_attentions"))
        window = getattr(trunk.config, "sliding_window", None) or math.inf
        lengths = mask_BT.sum(dim=1).tolist()
        if arguments or tensors != {"input_ids", "attention_mask"} or wants_all or max(lengths) > window:
            return None
        places, parts = lay_out([row[:length] for row, length in zip(ids_BT.tolist(), lengths, strict=True)])
        if sum(own for _, own in parts) > _WORTH_PACKING * ids_BT.numel():
            return None
        tokens = mask_BT.nonzero(as_tuple=True)
        places_N = torch.tensor([place for row in places for place in row])
        self.places_BT = torch.zeros_like(ids_BT).index_put(tokens, places_N)
        if self.reads is not None:  # each place once: what is put back is put there, and not added
            kept_N = self.places_BT[self.reads].unique()
            self.reads, self.columns_BR = (torch.zeros_like(kept_N), kept_N), None
        laid_2N = torch.zeros(2, sum(own for _, own in parts), dtype=torch.long)
        laid_2N[:, places_N] = torch.stack([ids_BT[tokens], tokens[1]])
        # Models take a mask of four dimensions as it is; `_attend_packed` does not look at it.
        names = {"input_ids": laid_2N[:1], "position_ids": laid_2N[1:], "attention_mask": mask_BT[:1, None, None, :1]}
        return arguments, given | names | {"packed": parts}

    def unpack(self, _: Any, __: Any, outputs: Any) -> None:
        if self.places_BT is not None:  # `embedding` adds up gradients faster than indexing does
            outputs.last_hidden_state = embedding(self.places_BT, outputs.last_hidden_state[0])

    def gather(self, _: Any, arguments: tuple[Tensor, ...]) -> Any:
        if self.reads is not None:
            self.shape = arguments[0].shape
            return (arguments[0][self.reads][None], *arguments[1:])

    def scatter(self, _: Any, __: Any, found_1NH: Tensor) -> Any:
        return None if self.reads is None else found_1NH.new_zeros(self.shape).index_put(self.reads, found_1NH[0])


def _attend_from_reads(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:
    """Attention of transformers' sdpa, (B, heads, T, D) to (B, T, heads, D), from the few places that are read."""
    columns_BR = module.unread.columns_BR if hasattr(module, "unread") else None
    if columns_BR is None or given.get("dropout"):
        return sdpa_attention_forward(module, query, key, value, mask, **given)
    rows_B1 = torch.arange(len(query), device=query.device)[:, None]
    if mask is None:  # causal, after what a cache holds
        seen_BRS = torch.arange(key.size(2), device=key.device) <= columns_BR[..., None] + key.size(2) - query.size(2)
    else:
        seen_BRS = mask.expand(len(query), *mask.shape[1:])[rows_B1, 0, columns_BR]
    few = query[rows_B1, :, columns_BR].transpose(1, 2)
    found, weights = sdpa_attention_forward(module, few, key, value, seen_BRS[:, None], **given | {"is_causal": False})
    whole = found.new_zeros(len(found), query.size(2), *found.shape[2:])
    return whole.index_put((rows_B1, columns_BR), found), weights


def _attend_packed(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *, packed: Any = None, **given: Any
) -> Any:
    """Attention of transformers' sdpa, (B, heads, T, D) to (B, T, heads, D), row by row where rows are packed."""
    if packed is None:
        return _attend_from_reads(module, query, key, value, mask, **given)
    sizes, found, k, v = [own for _, own in packed], [], key, value
    parts = zip(packed, *(whole.split(sizes, dim=2) for whole in (query, key, value)), strict=True)
    for (shared, own), q, own_k, own_v in parts:
        seen = torch.ones(own, shared + own, dtype=torch.bool).tril(shared)[None, None] if shared else None
        k, v = (torch.cat([past[:, :, :shared], new], 2) if shared else new for past, new in ((k, own_k), (v, own_v)))
        found.append(sdpa_attention_forward(module, q, k, v, seen, **given)[0])
    return torch.cat(found, dim=1), None


def leave_out_unread(model: Any) -> None:
    """Run the last layer's feed-forward for those positions alone whose hidden state is read, and on the CPU all layers
    for tokens alone: no padding, and what several rows begin with, such as the prompt of two answers, once.
    A classifier reads the last token, TRL's fused head the labelled ones, PPO its `batch`, others what they name as
    `reads`. Positions meet in attention only, which sees what it saw, so that no number that is read is another one."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    name = KNOWN["feed_forward_norms"].get(base.config.model_type)
    if name is None or not _is_plain(base):
        return
    trunk = base.base_model
    layers = getattr(trunk, "layers", None) or trunk.h
    attentions = [getattr(layer, "self_attn", None) or layer.attn for layer in layers]
    unread = attentions[-1].unread = _Unread(base, attentions[-1])
    model.takes_reads = True
    model.register_forward_pre_hook(unread.choose, with_kwargs=True)
    model.register_forward_hook(unread.forget, always_call=True)
    trunk.register_forward_pre_hook(unread.pack, with_kwargs=True, prepend=True)  # before its mask is taken away
    trunk.register_forward_hook(unread.unpack)
    getattr(layers[-1], name).register_forward_pre_hook(unread.gather)
    layers[-1].mlp.register_forward_hook(unread.scatter)
    AttentionInterface.register("packed", _attend_packed)
    config = copy(attentions[-1].config)
    config._attn_implementation = "packed"
    for attention in attentions:
        attention.config = config


def use_head() -> None:
    """Have TRL's trainers score labelled positions alone on the CPU, and by `head_logps`.
    It can go when `add_fused_lm_head` leaves the others out without Triton too and fits its buffer to the vocabulary.
    """
    from trl.kernels.chunked_logprob import _use_triton
    from trl.trainer import utils

    utils._ChunkedLogProbFunction = type("Head", (), {"apply": staticmethod(head_logps)})
    utils._use_triton = lambda device: device.type == "cpu" or _use_triton(device)


def head_logps(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, temperature: float, tile: int,
    softcap: float | None = None, scale: float = 1.0, outputs: tuple[str, ...] = (),
) -> Any:  # fmt: skip
    """Log-probabilities of N targets in float32 (N,), and those of TRL's `OPTIONAL_OUTPUTS` that are asked for.
    TRL's kernel holds a tile of the vocabulary at a time, N x `tile`, and computes logits twice. Where all of them
    are few this one computes them once."""
    few, on_cpu = len(targets_N) * len(weight_VH) <= _LARGEST and softcap is None, hidden_NH.device.type == "cpu"
    if on_cpu and few and not hasattr(weight_VH, "ds_id"):  # of which ZeRO-3 holds a part
        return _HeadLogps.apply(hidden_NH, weight_VH, bias_V, targets_N, scale / temperature, outputs)
    from trl.kernels import ChunkedLogProbFunction

    options = temperature, min(tile, len(weight_VH)) if on_cpu else tile, softcap, scale, outputs
    return ChunkedLogProbFunction.apply(hidden_NH, weight_VH, bias_V, targets_N, *options)


class _HeadLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_N: Tensor, scale: float,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        ctx.set_materialize_grads(False)
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden_NH.dtype
        bias_V = None if bias_V is None else bias_V.to(dtype)
        z_NV = linear(hidden_NH.to(dtype), weight_VH.to(dtype), bias_V).float()
        z_NV = z_NV if scale == 1 else z_NV.mul_(scale)
        log_z_N = z_NV.logsumexp(dim=-1)
        logps_N = z_NV.gather(1, targets_N[:, None])[:, 0] - log_z_N
        p_NV = (z_NV - log_z_N[:, None]).exp_()
        found = {
            "entropy": lambda: log_z_N - torch.linalg.vecdot(p_NV, z_NV),
            "log_sum_sq_probs": lambda: torch.linalg.vecdot(p_NV, p_NV).log(),
            "mean_logits": lambda: z_NV.mean(dim=-1),
            "is_top1": lambda: z_NV.argmax(dim=-1) == targets_N,
        }
        others = [read() if name in outputs else None for name, read in found.items()]
        ctx.mark_non_differentiable(*(value for value in others if value is not None))
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, p_NV)
        ctx.scale, ctx.dtype = scale, dtype
        return logps_N, *others

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """d log p / dz = 1[target] - p."""
        if grad_N is None:
            return (None,) * 6
        hidden_NH, weight_VH, targets_N, p_NV = ctx.saved_tensors
        grad_NV = (p_NV * -grad_N[:, None]).scatter_add_(1, targets_N[:, None], grad_N[:, None]).mul_(ctx.scale)
        wide_NV, (needs_hidden, needs_weight, needs_bias, *_) = grad_NV.to(ctx.dtype), ctx.needs_input_grad
        d_hidden = (wide_NV @ weight_VH.to(ctx.dtype)).to(hidden_NH.dtype) if needs_hidden else None
        d_weight = (wide_NV.t() @ hidden_NH.to(ctx.dtype)).to(weight_VH.dtype) if needs_weight else None
        d_bias = grad_NV.sum(dim=0).to(weight_VH.dtype) if needs_bias else None
        return d_hidden, d_weight, d_bias, None, None, None


class RoomyLayer(DynamicLayer):
    """Keys and values in buffers with room for more, where the layer it is made from copies all of them each step."""

    _rooms: list[Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        given, size = (key_states, value_states), self.get_seq_length()
        if not size:  # most is read and never looked at again: it is no copy either
            self.lazy_initialization(*given)
            self.keys, self.values = given
            return given
        now, kept, rooms = size + key_states.size(2), (self.keys, self.values), self._rooms
        is_own = rooms is not None and rooms[0].data_ptr() == self.keys.data_ptr() and len(rooms[0]) == len(self.keys)
        if rooms is None or not is_own or rooms[0].size(2) < now:
            rooms = self._rooms = [it.new_empty(*it.shape[:2], now + _ROOM, it.size(3)) for it in kept]
            for room, it in zip(rooms, kept, strict=True):
                room[:, :, :size] = it
        for room, new in zip(rooms, given, strict=True):
            room[:, :, size:now] = new
        self.keys, self.values = (room[:, :, :now] for room in rooms)
        return self.keys, self.values


def make_cache(base: Any) -> DynamicCache:
    """Make the cache that a model generates with, with room in its layers that keep all there is."""
    cache = DynamicCache(config=base.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
