"""Dropout, and every other rate at which a model draws random numbers in training, switched off."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftModel
from torch import nn
from trl.trainer.utils import disable_dropout_in_model

_NAMES = ("drop", "jitter")  # attention_dropout, layerdrop, embd_pdrop, router_jitter_noise, ...


def switch_off_dropout(model: nn.Module) -> None:
    """Make a forward pass in training compute what one in evaluation does.

    TRL's `disable_dropout` knows nn.Dropout alone. Most architectures call dropout as a function, at a rate that a
    layer holds (OPT, Granite) or reads from its config (Falcon, GPT-Neo). The model's own config keeps its rates, so
    that what is saved is the architecture it was.
    """
    disable_dropout_in_model(model)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    configs: dict[int, Any] = {}  # one copy for all layers that share a config
    for module in base.modules():
        for name in _rates(module):
            setattr(module, name, 0.0)
        config = getattr(module, "config", None)
        if module is not base and config is not None and (rates := _rates(config)):
            changed = configs.setdefault(id(config), copy.copy(config))
            for name in rates:
                setattr(changed, name, 0.0)
            module.config = changed


def _rates(owner: Any) -> list[str]:
    return [
        name
        for name, value in vars(owner).items()
        if isinstance(value, float) and value and any(part in name for part in _NAMES)
    ]
