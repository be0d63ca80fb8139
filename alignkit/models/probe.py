"""A fingerprint of what a model computes: logits or scores of two fixed rows of tokens.

Deliberately small and plain, to be kept as JSON: the next stage takes it again before its first step, and a saved
model must give it back. It shows a lost adapter or a wrong base, not a flipped bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_ROWS, _LENGTH, _POSITIONS, _ENTRIES = 2, 16, (3, 7, 11, 15), 16
# Largest difference, as a share of the largest value (or of 1): other kernels and batch shapes round differently.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
_OTHER_PRECISION = 0.25  # the same weights in another quantization


def take_probe(model: nn.Module, *, vocab_size: int, reward: bool) -> dict[str, Any]:
    """Return the fingerprint: scores of both rows, or logits at 4 positions for 16 spread vocabulary entries.

    Runs in eval mode without gradients and puts the mode back.
    """
    was_training = model.training
    device = next(model.parameters()).device
    ids = probe_ids(vocab_size).to(device)
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()
    finally:
        model.train(was_training)
    if not reward:  # (2, 16, vocabulary) -> (2, 4, 16)
        entries = torch.arange(_ENTRIES) * vocab_size // _ENTRIES
        logits = logits[:, list(_POSITIONS)][:, :, entries]
    config = model.config
    return {
        "reward": reward,
        "dtype": str(config.dtype or torch.float32).removeprefix("torch."),
        "quantization": _quantization_of(config),
        "values": logits.flatten().tolist(),
    }


def probe_ids(vocab_size: int) -> torch.Tensor:
    """Return the two rows, (2, 16), from the middle of the vocabulary, where no tokenizer keeps special tokens."""
    low, width = vocab_size // 8, max(vocab_size // 2 - vocab_size // 8, 1)
    steps = torch.arange(_ROWS * _LENGTH).reshape(_ROWS, _LENGTH)
    return low + steps * 37 % width


def compare_probes(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Return why two probes cannot come from the same model, None when they can."""
    kinds = {True: "a reward model", False: "a policy"}
    if before["reward"] != after["reward"]:
        return f"it was {kinds[before['reward']]} and is {kinds[after['reward']]}"
    first, second = torch.tensor(before["values"]), torch.tensor(after["values"])
    if first.shape != second.shape:
        return f"the probe has {second.numel()} values, not {first.numel()}"
    if not torch.isfinite(second).all():
        return "it computes values that are not finite"
    tolerance = max(_TOLERANCE[before["dtype"]], _TOLERANCE[after["dtype"]])
    if before["quantization"] != after["quantization"]:
        tolerance = _OTHER_PRECISION
    largest = (first - second).abs().max().item()
    allowed = tolerance * max(1.0, first.abs().max().item())
    if largest > allowed:
        return f"its outputs differ by up to {largest:.3g} from the saved ones (allowed: {allowed:.3g})"
    return None


def _quantization_of(config: Any) -> str:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return "none"
    values = quantization if isinstance(quantization, dict) else quantization.to_dict()
    return "int8" if values.get("load_in_8bit") else str(values.get("bnb_4bit_quant_type", "other"))
