"""One answer token by token, so that a person can read it while it grows and stop it at any point.

Deliberately one conversation at a time and in plain Python: batches are `generation`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_HELD_BACK = "\ufffd"  # what half of a character decodes to


def stream_tokens(
    model: Any,
    prompt: Sequence[int],
    *,
    temperature: float,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield new tokens until a stop token (not yielded), `max_new_tokens`, or the end of the model's positions.

    Temperature 0 takes the likeliest token. The model is in eval mode; `generator` lies on the CPU.
    """
    device = next(model.parameters()).device
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    positions = getattr(inner.config.get_text_config(), "max_position_embeddings", None) or 10**9
    ids_1T = torch.tensor([list(prompt)], device=device)
    past = None
    for _ in range(min(max_new_tokens, positions - len(prompt))):
        with torch.no_grad():
            output = model(input_ids=ids_1T, past_key_values=past, use_cache=True)
        past = output.past_key_values
        token = _choose(output.logits[0, -1].float().cpu(), temperature, generator)
        if token in eos_ids:
            return
        yield token
        ids_1T = torch.tensor([[token]], device=device)


def stream_text(tokenizer: Any, tokens: Iterator[int]) -> Iterator[str]:
    """Yield the text that each token adds; half of a character waits for its other half."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if text.endswith(_HELD_BACK) and len(text) - len(text.rstrip(_HELD_BACK)) < 4:
            continue
        if len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    rest = tokenizer.decode(ids, skip_special_tokens=True)[len(shown) :]
    if rest:
        yield rest


def _choose(logits_V: Tensor, temperature: float, generator: torch.Generator | None) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial((logits_V / temperature).softmax(dim=-1), 1, generator=generator))
