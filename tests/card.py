"""A device without hardware: tensors that say `card:0` and whose numbers lie on the CPU, through torch's PrivateUse1.

It stands in for cuda where there is none. Every operator computes; one that mixes devices raises, as on a card, and
what makes the host wait for the device is counted in `SYNCS`. Kernels, streams, autocast and memory are not tested so.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
SYNCS: Counter[str] = Counter()
WAITS = {
    aten._local_scalar_dense.default: "item", aten.nonzero.default: "nonzero", aten.masked_select.default: "mask",
    aten._unique2.default: "unique", aten.equal.default: "equal", aten.bincount.default: "bincount",
}  # fmt: skip
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # cuda takes indices from the host
_LIBRARIES = [torch.library.Library(name, "IMPL") for name in ("aten", "_")]


class _Module:
    """What torch asks the module of a device."""

    __name__ = "torch.card"

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed: int) -> None: ...


def install() -> torch.device:
    """Let torch know the device; for the rest of the process."""
    _setup_privateuseone_for_python_backend("card", backend_module=_Module())

    def make(func: Any) -> Any:  # torch.tensor(..., device=) passes by every mode
        return lambda *args, **kwargs: _run(func, args, kwargs | {"device": torch.device("card:0")})

    made = {"empty_strided": aten.empty_strided.default, "empty.memory_format": aten.empty.memory_format}
    for name, func in made.items():
        _LIBRARIES[0].impl(name, make(func), "PrivateUse1")
    _LIBRARIES[0].impl("copy_", lambda *args, **kwargs: _run(aten.copy_.default, args, kwargs), "PrivateUse1")
    _LIBRARIES[1].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    return torch.device("card:0")


class OnCard(torch.Tensor):
    """A tensor of the device; `held` has its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnCard:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=torch.device("card:0"), requires_grad=False,
        )  # fmt: skip
        made.held = held
        return made

    def tolist(self) -> Any:
        SYNCS["host"] += 1
        return self.held.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnCard({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Card(TorchDispatchMode):
    """Sends what makes tensors for the device there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat, spec = tree_flatten((args, kwargs))
    held = [one for one in flat if isinstance(one, OnCard)]
    wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    if not held and wanted != "card":
        return func(*args, **kwargs)
    others = [one for one in flat if isinstance(one, torch.Tensor) and not isinstance(one, OnCard) and one.dim()]
    if held and others and func not in MOVES | INDEXED:
        raise RuntimeError(f"{func} mixes devices: of the host are {[tuple(one.shape) for one in others]}")
    leaves = (
        wanted == "cpu"
        if func is aten._to_copy.default
        else func is aten.copy_.default and not isinstance(args[0], OnCard)
    )
    to_host = bool(held) and leaves
    if held and func in WAITS:
        SYNCS[WAITS[func]] += 1
    elif to_host:
        SYNCS["host"] += 1
    elif func in INDEXED and any(isinstance(one, OnCard) and one.dtype == torch.bool for one in args[1]):
        SYNCS["mask"] += 1

    def bare(one: Any) -> Any:
        if isinstance(one, torch.device) and one.type == "card":
            return torch.device("cpu")
        return one.held if isinstance(one, OnCard) else one

    bare_args, bare_kwargs = tree_unflatten([bare(one) for one in flat], spec)
    out = func(*bare_args, **bare_kwargs)
    mine = {id(one.held): one for one in held}  # what is changed in place stays the same tensor
    return (
        out
        if to_host
        else tree_map_only(torch.Tensor, lambda one: mine[id(one)] if id(one) in mine else OnCard(one), out)
    )
