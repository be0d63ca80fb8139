"""Facts about a model in memory: how many parameters train, what quantised ones cost, hashes of the base, and a probe.

The probe is a fingerprint of what a model computes, kept as JSON: the next stage takes it again before its first step,
and a saved model must give it back. It shows a lost adapter or a wrong base, not a flipped bit.
"""

import hashlib
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from alignkit.console import Meter
from alignkit.models.adapters import is_adapter

_SAMPLED_ELEMENTS = 256  # of each parameter
_ROWS, _LENGTH, _POSITIONS, _ENTRIES = 2, 16, (3, 7, 11, 15), 16
# Largest difference, as a share of the largest value (or of 1): other kernels and batch shapes round differently.
_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
_OTHER_PRECISION = 0.25  # the same weights in another quantization


def describe_parameters(model: nn.Module) -> dict[str, float]:
    """Count parameters and measure the quantised ones.
    `quantized` counts weights, not the bytes they are packed in; `bits_per_quantized_parameter` holds codes and all
    block constants (4.127 for nf4 with double quantization, arXiv 2305.14314 section 3), 0 when nothing is quantised.
    """
    trainable = total = quantized = quantized_bytes = num_bytes = 0
    constants = _constants(model)
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())
        size = getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()  # whole also under ZeRO-3
        size += sum(tensor.numel() * tensor.element_size() for tensor in constants.get(id(parameter), ()))
        total += count
        num_bytes += size
        trainable += count if parameter.requires_grad else 0
        if type(parameter).__name__ in ("Params4bit", "Int8Params") and parameter.dtype in (torch.uint8, torch.int8):
            quantized += count
            quantized_bytes += size
    bits = 8 * quantized_bytes / quantized if quantized else 0.0
    return {"trainable": trainable, "total": total, "quantized": quantized, "bits_per_quantized_parameter": bits,
            "bytes": num_bytes}  # fmt: skip


def hash_base(model: nn.Module) -> str:
    """Hash the bytes of everything an adapter leaves alone: base weights, packed codes, quantization constants.
    Equal before and after training when training touched nothing but adapters and heads. Trainable parameters,
    adapters and modules saved with them are left out, buffers too. Of a sharded model every rank must call it."""
    digest, constants = hashlib.blake2b(digest_size=16), _constants(model, offsets=True)
    named = sorted(model.named_parameters())
    with Meter("tensors of the base hashed", len(named)) as meter:
        for name, parameter in meter.over(named):
            if parameter.requires_grad or is_adapter(name):
                continue
            digest.update(name.encode())
            for tensor in (parameter, *constants.get(id(parameter), ())):
                digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def hash_samples(model: nn.Module) -> str:
    """Hash name, shape and some elements of every parameter: cheap, and different for other weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.data.reshape(-1)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(_bytes_of(flat[:: max(flat.numel() // _SAMPLED_ELEMENTS, 1)]))
    return digest.hexdigest()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Put together a weight that FSDP or ZeRO-3 has taken apart; all ranks must ask for the same one."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if not hasattr(tensor, "ds_id"):
        return tensor
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.data.clone()


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return whole(tensor).detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()


def _constants(model: nn.Module, *, offsets: bool = False) -> dict[int, list[torch.Tensor]]:
    """Map the id of a quantised weight to its block constants; shared code books are left out."""
    found: dict[int, list[torch.Tensor]] = {}
    for module in model.modules():
        kind, held = type(module).__name__, list[torch.Tensor | None]()
        if kind == "Linear4bit" and (
            state := getattr(module.weight, "quant_state", None) or getattr(module, "quant_state", None)
        ):
            held = [state.absmax, state.state2.absmax if state.nested else None, state.offset if offsets else None]
        elif kind.endswith("Linear8bitLt") and hasattr(module, "state"):
            held = [module.weight.SCB if module.weight.SCB is not None else module.state.SCB]  # after a forward
        if held:
            found[id(module.weight)] = [tensor for tensor in held if tensor is not None]
    return found


def take_probe(model: nn.Module, *, vocab_size: int, reward: bool) -> dict[str, Any]:
    """Take the fingerprint, in eval mode: scores of both rows, or logits at 4 positions for 16 spread tokens."""
    was_training, device = model.training, next(model.parameters()).device
    ids = probe_ids(vocab_size).to(device)
    model.eval()
    rounds = "flash" in str(model.config._attn_implementation) and model.dtype == torch.float32  # which it cannot take
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=rounds):
            target = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **target)
            logits = output.logits.float()
    finally:
        model.train(was_training)
    if not reward:  # (2, 16, vocabulary) -> (2, 4, 16)
        entries = torch.arange(_ENTRIES) * vocab_size // _ENTRIES
        logits = logits[:, list(_POSITIONS)][:, :, entries]
    dtype = "bfloat16" if rounds else str(model.config.dtype or torch.float32).removeprefix("torch.")
    stored = getattr(model.config, "quantization_config", None) or {}
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    kind = "int8" if stored.get("load_in_8bit") else str(stored.get("bnb_4bit_quant_type", "other"))
    kind = kind if stored else "none"
    return {"reward": reward, "dtype": dtype, "quantization": kind, "values": logits.flatten().tolist()}


def probe_ids(vocab_size: int) -> torch.Tensor:
    """The two rows of a probe, (2, 16), from the middle of the vocabulary, where no tokenizer keeps special tokens."""
    low, width = vocab_size // 8, max(vocab_size // 2 - vocab_size // 8, 1)
    steps = torch.arange(_ROWS * _LENGTH).reshape(_ROWS, _LENGTH)
    return low + steps * 37 % width


def compare_probes(before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Say why two probes cannot come from the same model, None when they can."""
    if before["reward"] != after["reward"]:
        was, now = ("a reward model" if probe["reward"] else "a policy" for probe in (before, after))
        return f"it was {was} and is {now}"
    first, second = torch.tensor(before["values"]), torch.tensor(after["values"])
    if first.shape != second.shape:
        return f"the probe has {second.numel()} values, not {first.numel()}"
    if not torch.isfinite(second).all():
        return "it computes values that are not finite"
    tolerance = max(_TOLERANCE[before["dtype"]], _TOLERANCE[after["dtype"]])
    if before["quantization"] != after["quantization"]:
        tolerance = _OTHER_PRECISION
    largest, allowed = (first - second).abs().max().item(), tolerance * max(1.0, first.abs().max().item())
    if largest > allowed:
        return f"its outputs differ by up to {largest:.3g} from the saved ones (allowed: {allowed:.3g})"
    return None
