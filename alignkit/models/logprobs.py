"""Token ids as padded batches, and log-probabilities of given tokens under a causal language model.

Only positions that predict a scored token go through the softmax.

Legend: B sequences of a batch, T tokens of the longest, P positions that are scored, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_LOGITS = 2**26  # entries of one batch of logits
_POSITIONS = 4096  # scored at once, in float32


@torch.no_grad()
def score_tokens(
    model: Any,
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    pad_id: int,
    temperature: float = 1.0,
    batch_size: int = 16,
) -> list[list[float]]:
    """Return log p of every token of each continuation given what comes before it, in nats.

    A sequence is (context, continuation); the first token of an empty context has nothing before it and is left out.
    Everything must fit into the model's positions. `temperature` divides the logits. The model is in eval mode.
    """
    results: list[list[float]] = [[] for _ in sequences]
    vocabulary = model.get_input_embeddings().num_embeddings
    lengths = [len(context) + len(tail) for context, tail in sequences]
    waiting = sorted((place for place, (_, tail) in enumerate(sequences) if tail), key=lambda place: -lengths[place])
    while waiting:
        size = max(min(batch_size, _LOGITS // (lengths[waiting[0]] * vocabulary)), 1)
        batch, waiting = waiting[:size], waiting[size:]
        scored = _score_batch(model, [sequences[place] for place in batch], pad_id, temperature)
        for place, values in zip(batch, scored, strict=True):
            results[place] = values
    return results


def _score_batch(
    model: Any, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int, temperature: float
) -> list[list[float]]:
    device = next(model.parameters()).device
    whole = [[*context, *tail] for context, tail in sequences]
    ids_BT, mask_BT = pad(whole, pad_id)
    width = ids_BT.size(1)
    first = max(min(len(context) for context, _ in sequences) - 1, 0)  # the earliest position that is needed
    kept = {"logits_to_keep": width - first} if keeps_last(model) else {}
    logits_BPV: Tensor = model(
        input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False, **kept
    ).logits
    offset = width - logits_BPV.size(1)
    rows, columns, targets = [], [], []
    counts = []
    for row, (context, tail) in enumerate(sequences):
        start = max(len(context), 1)  # a token needs one before it
        stop = len(context) + len(tail)
        rows += [row] * (stop - start)
        columns += list(range(start - 1 - offset, stop - 1 - offset))
        targets += whole[row][start:stop]
        counts.append(stop - start)
    values: list[float] = []
    for begin in range(0, len(rows), _POSITIONS):
        part = slice(begin, begin + _POSITIONS)
        logps_PV = (logits_BPV[rows[part], columns[part]].float() / temperature).log_softmax(dim=-1)
        values += logps_PV.gather(1, torch.tensor(targets[part], device=device)[:, None])[:, 0].tolist()
    split, begin = [], 0
    for count in counts:
        split.append(values[begin : begin + count])
        begin += count
    return split


def pad(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Pad rows of token ids, some of them empty, to one width: ids and mask, int64 (B, T) on the CPU."""
    width = max(map(len, rows))
    ids_BT = torch.full((len(rows), width), pad_id)
    mask_BT = torch.zeros_like(ids_BT)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids_BT[number, place] = torch.tensor(row, dtype=torch.long)
        mask_BT[number, place] = 1
    return ids_BT, mask_BT


def keeps_last(model: Any) -> bool:
    """Tell whether a model can leave out the logits of the first positions."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
