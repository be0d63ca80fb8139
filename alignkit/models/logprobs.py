"""Token ids as padded batches, and log-probabilities of given tokens under a causal language model.

PPO, evaluation and the local judge all ask here. Only positions that predict a wanted token go through the LM head,
tile by tile: prompts and padding cost no logits.

Legend: B sequences of a batch, L tokens of the longest, T of the longest answer, N answer tokens in all, H hidden size.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from alignkit.console import Meter
from alignkit.models.kernels import head_logps

_BATCH_TOKENS = 2**16
_CACHED_TOKENS = 2**15  # whose keys and values are held at a time
_ROOM = 32  # tokens that a buffer of keys and values has more room for
_CPU_TOKENS = 2**11  # the same where more at once are no faster and memory that is new each time is slower
_WORTH_SHARING = 0.2  # of the tokens; a cache costs something too
_WORTH_A_TOKEN = 1500  # attention scores that cost what a token's other operations do
_LONG_STEM, _LONG_GROUP = 64, 16
_LONG_BEGINNING = 1024  # is read alone, for a mask grows with its square
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


@torch.no_grad()
def score_tokens(
    model: Any, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], *, pad_id: int, temperature: float = 1.0,
    batch_size: int = 16,
) -> list[list[float]]:  # fmt: skip
    """Log p of every token of each (context, continuation) given what comes before it, in nats.
    The first token of an empty context has nothing before it and is left out; of an encoder-decoder model the pairs are
    sources and targets, of which no token is left out. Everything must fit into the model's positions. `temperature`
    divides the logits. The model is in eval mode."""
    results: list[list[float]] = [[] for _ in sequences]
    if not model.config.is_encoder_decoder:
        with Meter("sequences read", len(sequences)) as meter:
            for batch in iter_scores(model, sequences, pad_id=pad_id, temperature=temperature, batch_size=batch_size):
                for place, logps in batch:
                    results[place] = logps
                meter.advance(len(batch))
        return results
    device, sizes = next(model.parameters()).device, [len(target) for _, target in sequences]
    waiting = sorted((place for place, size in enumerate(sizes) if size), key=lambda place: -sizes[place])
    for start in range(0, len(waiting), batch_size):
        places = waiting[start : start + batch_size]
        source_BS, mask_BS = pad([sequences[place][0] for place in places], pad_id)
        target_BT, known_BT = pad([sequences[place][1] for place in places], pad_id)
        labels_BT = target_BT.masked_fill(known_BT == 0, -100).to(device)
        inputs = {"input_ids": source_BS.to(device), "attention_mask": mask_BS.to(device), "labels": labels_BT}
        logps_BTV = (model(**inputs, use_cache=False).logits.float() / temperature).log_softmax(dim=-1).cpu()
        logps_BT = logps_BTV.gather(2, target_BT[:, :, None])[:, :, 0]
        for place, row in zip(places, logps_BT, strict=True):
            results[place] = row[: sizes[place]].tolist()
    return results


@torch.no_grad()
def iter_scores(
    model: Any, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], *, pad_id: int, temperature: float = 1.0,
    batch_size: int = 16, known: Collection[int] = (), share: bool | None = None,
) -> Iterator[list[tuple[int, list[float]]]]:  # fmt: skip
    """Score as `score_tokens` does, and give out (place, log-probabilities) of each batch as soon as it is read.
    A batch whose places are all in `known` is not read; the others are the same whatever is known. Beginnings that
    sequences have in common are read once where that saves enough, or as `share` says."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    pairs = [(list(context or tail[:1]), list(tail if context else tail[1:])) for context, tail in sequences]
    waiting = sorted((place for place, (_, tail) in enumerate(pairs) if tail), key=lambda at: -sum(map(len, pairs[at])))
    batches, saved = _plan(pairs, waiting, batch_size)
    saves_enough = saved > _WORTH_SHARING * sum(len(pairs[at][0]) for at in waiting)
    if (saves_enough if share is None else share) and can_share(base):
        reader = _Reader(base, pad_id, [])
        for length, groups in batches:
            stem = groups[0][0][0][:length].tolist()
            if not all(place in known for group in groups for _, tails in group for place, _ in tails):
                reader = reader if reader.stem == stem else _Reader(base, pad_id, stem)
                yield _read_batch(reader, groups, temperature)
        return
    while waiting:
        size = max(min(batch_size, _BATCH_TOKENS // sum(map(len, pairs[waiting[0]]))), 1)
        places, waiting = waiting[:size], waiting[size:]
        if all(place in known for place in places):
            continue
        contexts, tails = zip(*(pairs[place] for place in places), strict=True)
        batch = pad_answers(contexts, tails, pad_id=pad_id, device=next(model.parameters()).device)
        # No mask is needed: causal attention never looks at padding behind it, and is twice as fast.
        hidden_BLH, _ = run_trunk(
            base, base.get_output_embeddings(), input_ids=batch.input_ids_BL, use_cache=False,
            attention_mask=torch.ones_like(batch.attention_mask_BL), reads=(batch.rows_N, batch.columns_N),
        )  # fmt: skip
        logps_N, _ = token_logps(base, batch.pick(hidden_BLH), batch.targets_N, temperature)
        parts = logps_N.split([len(tail) for tail in tails])
        yield [(place, part.tolist()) for place, part in zip(places, parts, strict=True)]


@torch.no_grad()
def follow_greedily(
    model: Any, asked: Sequence[tuple[Sequence[int], Sequence[int]]], *, pad_id: int, batch_size: int,
    goes_on: Callable[[int, list[int]], bool], first: Collection[int] = (),
) -> Iterator[list[tuple[int, list[float], list[int]]]]:  # fmt: skip
    """Score the tail after each context, and write the greedy answer to it on the keys and values of that read.
    What the answer has in common with the tail needs no step of its own, as with a draft in speculative decoding
    (Leviathan et al. 2023, arXiv 2211.17192). `goes_on` is asked after each token, by place and answer so far.
    Those that will be long come `first`, so that their steps are taken together."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    head, sizes = base.get_output_embeddings(), [len(context) + len(tail) for context, tail in asked]
    order = sorted(range(len(asked)), key=lambda at: (at not in first, -sizes[at]))
    while order:
        size = max(min(batch_size, _CACHED_TOKENS // max(sizes[at] for at in order[:batch_size])), 1)
        places, order = order[:size], order[size:]
        pairs = [(list(context), list(tail)) for context, tail in (asked[place] for place in places)]
        reader = _Reader(base, pad_id, [])
        # The hidden states that predict each token of a tail, and the one after it.
        spans = [range(len(context) - 1, len(context) + len(tail)) for context, tail in pairs]
        reads = torch.tensor([(row, at) for row, span in enumerate(spans) for at in span], device=reader.device).T
        hidden_BTH = reader.read([context + tail for context, tail in pairs], reads=tuple(reads))
        picked = hidden_BTH[tuple(reads)].split(list(map(len, spans)))
        targets_N = torch.tensor([token for _, tail in pairs for token in tail], device=hidden_BTH.device)
        logps_N, _ = token_logps(base, torch.cat([each_TH[:-1] for each_TH in picked]), targets_N)
        logps = [part.tolist() for part in logps_N.split([len(tail) for _, tail in pairs])]
        likeliest = [part.tolist() for part in head(torch.cat(picked)).argmax(-1).split([len(it) for it in picked])]
        answers: list[list[int]] = []
        for place, (_, tail), tokens in zip(places, pairs, likeliest, strict=True):
            same = next((at for at, token in enumerate(tail) if token != tokens[at]), len(tail))
            ends = (at for at in range(same) if not goes_on(place, tokens[: at + 1]))
            answers.append(tokens[: next(ends, same) + 1])
        read = [len(context) + len(it) - 1 for (context, _), it in zip(pairs, answers, strict=True)]
        reader.forget(read, hidden_BTH.size(1))
        rows = list(range(len(places)))
        while going := [at for at, row in enumerate(rows) if goes_on(places[row], answers[row])]:
            reader.select(going)
            rows = [rows[at] for at in going]
            tokens_B = head(reader.read([answers[row][-1:] for row in rows])[:, -1]).argmax(-1)
            for row, token in zip(rows, tokens_B.tolist(), strict=True):
                answers[row].append(token)
        yield list(zip(places, logps, answers, strict=True))


# Texts that begin alike: comparisons after the same worked examples, both orders of one, the choices of a question.
# What they have in common is read once, and the rest on its keys and values.

_Question = tuple[NDArray[np.int32], list[tuple[int, list[int]]]]  # a context; place and ids of what is scored after it
_Groups = list[list[_Question]]
_Spans = list[tuple[int, int]]  # of a row's tokens: from, to
_Wanted = tuple[int, list[int], list[int]]  # place and ids of a tail, and the columns that predict them


def can_share(base: Any) -> bool:
    """Whether a model takes masks as they are and its cache can have padding inside, whose places some count."""
    base = base.get_base_model() if isinstance(base, PeftModel) else base
    config = base.config.get_text_config()
    whole = set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    counts = getattr(config, "sliding_window", None) or getattr(base, "_is_stateful", False)
    takes_masks = base._supports_attention_backend and base.config._attn_implementation in ("sdpa", "eager")
    return takes_masks and whole and not counts and "position_ids" in inspect.signature(base.forward).parameters


def _plan(
    pairs: Sequence[tuple[list[int], list[int]]], places: Iterable[int], batch_size: int
) -> tuple[list[tuple[int, _Groups]], int]:
    """Lay out batches, each with the length of the stem that all of it begins with; count the tokens that this saves.
    In an order by content those that begin alike are neighbours. A batch or more of them with a long beginning has a
    stem, which is read alone and kept; beyond it, neighbours are a group as long as that saves more."""
    asked: dict[bytes, _Question] = {}
    for place in places:
        ids = np.asarray(pairs[place][0], np.int32)
        asked.setdefault(ids.tobytes(), (ids, []))[1].append((place, pairs[place][1]))
    saved = sum((len(tails) - 1) * len(ids) for ids, tails in asked.values())

    def is_like(family: list[_Question], question: _Question) -> bool:
        begins = _alike(family[0], family[-1]) if len(family) > 1 else 0
        return _alike(family[0], question) >= max(_LONG_STEM, 0.75 * begins)

    families = _gather([asked[key] for key in sorted(asked)], is_like)
    alone = [question for family in families if len(family) < batch_size for question in family]
    batches: list[tuple[int, _Groups]] = []
    for family in [*(family for family in families if len(family) >= batch_size), *([alone] if alone else [])]:
        begins = _alike(family[0], family[-1])
        stem = begins if len(family) >= batch_size and begins >= _LONG_STEM else 0

        def saves_more(group: list[_Question], question: _Question, stem: int = stem) -> bool:
            before, now = (_alike(group[0], other) - stem for other in (group[-1], question))
            row = sum(len(ids) - stem for ids, _ in group) - (len(group) - 1) * before
            wasted = row * (len(question[0]) - stem - now)  # scores that are masked
            more = max((len(group) - 1) * before, _LONG_GROUP, wasted * len(group) / _WORTH_A_TOKEN)
            return len(group) < batch_size and len(group) * now > more

        groups = sorted(_gather(family, saves_more), key=lambda group: -max(len(ids) for ids, _ in group))
        saved += stem * (len(family) - 1) + sum((len(it) - 1) * (_alike(it[0], it[-1]) - stem) for it in groups)
        count = batch_size
        for group in groups:
            if (length := _alike(group[0], group[-1])) > 2 * stem + _LONG_BEGINNING:  # is no part of a masked row
                batches.insert(0, (length, [group]))
                continue
            count += len(group)
            if count > batch_size:
                batches.append((stem, []))
                count = len(group)
            batches[-1][1].append(group)
    return batches, saved


def _gather(questions: Iterable[_Question], joins: Callable[[list[_Question], _Question], bool]) -> _Groups:
    """Put neighbours into one group as long as the next one joins it."""
    groups: _Groups = []
    for question in questions:
        if not groups or not joins(groups[-1], question):
            groups.append([])
        groups[-1].append(question)
    return groups


def _alike(one: _Question, other: _Question) -> int:
    """Count the tokens that two contexts begin with alike; the last token of each is left out."""
    limit = min(len(one[0]), len(other[0])) - 1
    differs = one[0][:limit] != other[0][:limit]
    return int(differs.argmax()) if differs.any() else limit


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


class _Reader:
    """Feeds tokens to a model on top of what it has read; rows of unlike length are padded and masked."""

    def __init__(self, base: Any, pad_id: int, stem: list[int]) -> None:
        self.base, self.stem, self._pad_id, self.device = base, stem, pad_id, next(base.parameters()).device
        self._cache: Any = None
        if stem:
            self.read([stem])
        self._kept: Any = self._cache

    def begin(self, num_rows: int) -> None:
        """Start rows anew after the stem, whose keys and values they share until more is read."""
        self._mask_BT = torch.ones(num_rows, len(self.stem), dtype=torch.long, device=self.device)
        self._cache = copy(self._kept)
        if self._kept is not None:
            self._cache.layers = [copy(layer) for layer in self._kept.layers]
            for layer in self._cache.layers:
                layer.keys, layer.values = (it.expand(num_rows, -1, -1, -1) for it in (layer.keys, layer.values))

    def read(
        self, rows: Sequence[Sequence[int]], *, reads: tuple[Tensor, ...] | None = None,
        pieces: Sequence[Sequence[_Spans]] | None = None,
    ) -> Tensor:  # fmt: skip
        """Read more of each row: hidden states after each token, (B, T, H), or at `reads` alone.
        A row in `pieces` is no text: each piece is read after those that it names before its own place."""
        ids_BT, new_BT = (it.to(self.device) for it in pad(rows, self._pad_id))
        before_BT = new_BT[:, :0] if self._cache is None else self._mask_BT
        self._mask_BT = torch.cat([before_BT, new_BT], dim=1)
        positions_BT = (self._mask_BT.cumsum(1) - 1).clamp_min(0)[:, before_BT.size(1) :]
        # What is read first needs no mask: causal attention never looks at padding behind it, and is twice as fast.
        mask: Tensor = torch.ones_like(new_BT) if self._cache is None else self._mask_BT
        if self._cache is None:
            self._cache = make_cache(self.base)
        if pieces is not None:
            positions_BT, mask = (it.to(self.device) for it in self._see(pieces, *ids_BT.shape))
        hidden_BTH, output = run_trunk(
            self.base, self.base.get_output_embeddings(), input_ids=ids_BT, position_ids=positions_BT, use_cache=True,
            attention_mask=mask, past_key_values=self._cache, reads=reads,
        )  # fmt: skip
        self._cache = output.past_key_values
        return hidden_BTH

    def _see(self, pieces: Sequence[Sequence[_Spans]], num_rows: int, width: int) -> tuple[Tensor, Tensor]:
        """Positions (B, T) and what is added to attention scores (B, 1, T, S + T): 0 for what a token sees."""
        before, lowest = len(self.stem), torch.finfo(self.base.dtype).min
        positions_BT = torch.zeros(num_rows, width, dtype=torch.long)
        mask_BTS = torch.zeros(num_rows, width, before + width, dtype=self.base.dtype)
        mask_BTS[:, :, before:] = lowest
        longest = max(end - start for spans in pieces for *_, (start, end) in spans)
        later_TT = torch.full((longest, longest), lowest, dtype=self.base.dtype).triu(1)
        for row, spans in enumerate(pieces):
            for *above, (start, end) in spans:
                length = before
                for begin, stop in above:
                    mask_BTS[row, start:end, before + begin : before + stop] = 0
                    length += stop - begin
                mask_BTS[row, start:end, before + start : before + end] = later_TT[: end - start, : end - start]
                positions_BT[row, start:end] = torch.arange(length, length + end - start)
        return positions_BT, mask_BTS[:, None]

    def select(self, rows: list[int]) -> None:
        """Go on with these of the rows, each as often as it is named."""
        if self._cache is not None and rows != list(range(len(self._mask_BT))):
            indices = torch.tensor(rows, device=self.device)
            self._cache.batch_select_indices(indices)
            self._mask_BT = self._mask_BT[indices]

    def forget(self, lengths: Sequence[int], width: int) -> None:
        """Of the last `width` columns keep what each row holds there up to its length."""
        self._mask_BT[:, -width:] *= (torch.arange(width) < torch.tensor(lengths)[:, None]).to(self._mask_BT)


def _read_batch(reader: _Reader, groups: _Groups, temperature: float) -> list[tuple[int, list[float]]]:
    """Score a batch, a row a group: what it begins with, then each context's own rest with its tails side by side."""
    laid = sorted((_lay_out(group, len(reader.stem)) for group in groups), key=lambda row: -len(row[0]))
    most = _CPU_TOKENS if reader.device.type == "cpu" else _CACHED_TOKENS
    scored: list[tuple[int, list[float]]] = []
    while laid:
        size = max(most // (len(reader.stem) + len(laid[0][0])), 1)
        rows, laid = laid[:size], laid[size:]
        wanted = [(row, *each) for row, (_, _, own) in enumerate(rows) for each in own]
        steps = [(row, *step) for row, _, tail, columns in wanted for step in zip(columns, tail, strict=True)]
        rows_N, columns_N, targets_N = torch.tensor(steps, device=reader.device).T
        reader.begin(len(rows))
        pieces = [spans for _, spans, _ in rows] if reader.stem or len(wanted) > len(rows) else None
        hidden_BTH = reader.read([ids for ids, _, _ in rows], reads=(rows_N, columns_N), pieces=pieces)
        logps_N, _ = token_logps(reader.base, hidden_BTH[rows_N, columns_N], targets_N, temperature)
        parts = logps_N.split([len(tail) for _, _, tail, _ in wanted])
        scored += [(place, part.tolist()) for (_, place, *_), part in zip(wanted, parts, strict=True)]
    return scored


def _lay_out(group: list[_Question], start: int) -> tuple[list[int], list[_Spans], list[_Wanted]]:
    """Put a group's pieces, without the `start` tokens of the stem, after each other: ids, the spans that each piece
    is read after with its own as the last, and what is scored."""
    ids, pieces, wanted = list[int](), list[_Spans](), list[_Wanted]()

    def add(tokens: Sequence[int], above: _Spans) -> _Spans:
        pieces.append([*above, (len(ids), len(ids) + len(tokens))])
        ids.extend(tokens)
        return pieces[-1]

    begins = _alike(group[0], group[-1]) if len(group) > 1 else start
    head = add(group[0][0][start:begins].tolist(), [])
    for context, tails in group:
        rest = add(context[begins:].tolist(), head)
        for place, tail in tails:
            own = add(tail[:-1], rest)
            wanted.append((place, tail, [rest[-1][1] - 1, *range(*own[-1])]))
    return ids, pieces, wanted
