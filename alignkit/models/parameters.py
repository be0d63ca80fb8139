"""Facts about a model's parameters: how many train, what quantised ones cost, whether the base stayed the same.

Deliberately changes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor

_SAMPLED_ELEMENTS = 256  # of each parameter


def describe_parameters(model: nn.Module) -> dict[str, float]:
    """Count parameters and measure the quantised ones.

    `quantized` counts weights, not the bytes they are packed in; `bits_per_quantized_parameter` holds codes and all
    block constants (4.127 for nf4 with double quantization, arXiv 2305.14314 section 3), 0 when nothing is quantised.
    """
    trainable = total = quantized = quantized_bytes = num_bytes = 0
    scales = _int8_scales(model)
    for parameter in model.parameters():
        count = _count(parameter)
        if hasattr(parameter, "ds_id"):  # ZeRO-3: nothing is put together to be counted
            size = count * parameter.element_size()
        else:
            size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors_of(parameter, scales))
        total += count
        num_bytes += size
        trainable += count if parameter.requires_grad else 0
        if _is_quantized(parameter):
            quantized += count
            quantized_bytes += size
    return {
        "trainable": trainable,
        "total": total,
        "quantized": quantized,
        "bits_per_quantized_parameter": 8 * quantized_bytes / quantized if quantized else 0.0,
        "bytes": num_bytes,
    }


def hash_base(model: nn.Module) -> str:
    """Hash the bytes of everything an adapter leaves alone: base weights, packed codes, quantization constants.

    Equal before and after training when training touched nothing but adapters and heads. Trainable parameters,
    adapters and modules saved with them are left out, buffers too. Of a sharded model every rank must call it.
    """
    digest = hashlib.blake2b(digest_size=16)
    scales = _int8_scales(model)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad or ".lora_" in name or ".modules_to_save." in name:
            continue
        digest.update(name.encode())
        for tensor in _tensors_of(parameter, scales):
            digest.update(_bytes_of(tensor))
        offset = getattr(getattr(parameter, "quant_state", None), "offset", None)
        if offset is not None:
            digest.update(_bytes_of(offset))
    return digest.hexdigest()


def hash_samples(model: nn.Module) -> str:
    """Hash name, shape and some elements of every parameter: cheap, and different for other weights."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.data.reshape(-1)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(_bytes_of(flat[:: max(flat.numel() // _SAMPLED_ELEMENTS, 1)]))
    return digest.hexdigest()


def _whole(parameter: nn.Parameter) -> torch.Tensor:
    """Return the data of a parameter; what ZeRO-3 has taken apart is put together, which all ranks must ask for."""
    if not hasattr(parameter, "ds_id"):
        return parameter.data
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.data.clone()


def _bytes_of(tensor: torch.Tensor) -> bytes:
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()


def _int8_scales(model: nn.Module) -> dict[int, torch.Tensor]:
    """Map the id of an int8 weight to its row scales, which bitsandbytes moves to the layer in the first forward."""
    scales = {}
    for module in model.modules():
        if type(module).__name__.endswith("Linear8bitLt") and hasattr(module, "state"):
            scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            if scale is not None:
                scales[id(module.weight)] = scale
    return scales


def _tensors_of(parameter: nn.Parameter, int8_scales: dict[int, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the tensor itself and, for a quantised one, its block constants; shared code books are left out."""
    yield _whole(parameter)
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        yield state.absmax
        if state.nested:
            yield state.state2.absmax
    elif id(parameter) in int8_scales:
        yield int8_scales[id(parameter)]


def _is_quantized(parameter: nn.Parameter) -> bool:
    return type(parameter).__name__ in ("Params4bit", "Int8Params") and parameter.dtype in (torch.uint8, torch.int8)


def _count(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())
