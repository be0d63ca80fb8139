"""A moving average of the trained weights, saved as the model at the end (InstructGPT: decay 0.992).

Deliberately only of the policy: the critic and the optimizer go on from the raw weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from alignkit.errors import RunError
from alignkit.train import shards

EMA_FILE = "ema.safetensors"


class Ema:
    """Averages of named parameters, on their devices."""

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float) -> None:
        self._parameters, self._decay = parameters, decay
        self._averages: list[Tensor] = [p.detach().float().clone() for p in parameters.values()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights: a <- decay a + (1 - decay) w."""
        weights = [p.detach().float() for p in self._parameters.values()]
        torch._foreach_lerp_(self._averages, weights, 1 - self._decay)

    @torch.no_grad()
    def put_in(self) -> None:
        """Make the averages the weights."""
        for parameter, average in zip(self._parameters.values(), self._averages, strict=True):
            parameter.copy_(average)

    def save(self, directory: Path) -> None:
        """Write the averages beside a checkpoint's weights; all ranks call it, rank 0 writes."""
        state = shards.gather(zip(self._parameters, self._averages, strict=True))
        if state is not None:
            save_file(state, directory / EMA_FILE, metadata={"format": "pt"})

    def load(self, directory: Path) -> None:
        """Read them back. Raises RunError when the checkpoint was written without them."""
        if not (directory / EMA_FILE).is_file():
            raise RunError("holds no averaged weights (ema); start over with --force", where=str(directory))
        places = dict(zip(self._parameters, self._averages, strict=True))
        shards.scatter_model(places, load_file(directory / EMA_FILE))


class AfterStep(TrainerCallback):
    """Moves the averages after every optimizer step, before anything is saved."""

    def __init__(self, find: Callable[[], Ema | None]) -> None:
        self._find = find

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if (ema := self._find()) is not None:
            ema.update()
