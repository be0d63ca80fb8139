"""Log-probabilities of many texts under a language model, read together where they begin alike.

Legend: B rows of a batch, T tokens of the longest, S of the stem that all begin with, N scored tokens in all, H hidden
size.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor

from alignkit.console import Meter
from alignkit.models.kernels import make_cache
from alignkit.models.logprobs import pad, pad_answers, run_trunk, token_logps

_BATCH_TOKENS = 2**16
_CACHED_TOKENS = 2**15  # whose keys and values are held at a time
_CPU_TOKENS = 2**11  # the same where more at once are no faster and memory that is new each time is slower
_WORTH_SHARING = 0.2  # of the tokens; a cache costs something too
_WORTH_A_TOKEN = 1500  # attention scores that cost what a token's other operations do
_LONG_STEM, _LONG_GROUP = 64, 16
_LONG_BEGINNING = 1024  # is read alone, for a mask grows with its square


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
        mask_BTS = torch.full((num_rows, width, before + width), lowest, dtype=self.base.dtype)
        mask_BTS[:, :, :before] = 0
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
