"""What a stage command would start: this process alone, or accelerate with which config; for `--dry-run`.

It writes nothing and starts nothing.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignkit.launch.accelerate import (
    CONFIG,
    DEEPSPEED_CONFIG,
    command_line,
    config_text,
    config_values,
    deepspeed_config,
    zero_stage,
)
from alignkit.launch.command import Command
from alignkit.launch.devices import mixed_precision
from alignkit.launch.placement import Placement, place
from alignkit.launch.worker import is_worker
from alignkit.recipe import Stage
from alignkit.runs.directory import RunDir


@dataclass(frozen=True)
class Plan:
    """What would be started on this node."""

    mode: str  # in-process, accelerate, or worker
    placement: Placement
    command: list[str] = field(default_factory=list)
    config_file: str | None = None
    config: str | None = None
    deepspeed_file: str | None = None
    deepspeed: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, the command as one line for a shell."""
        return {
            "mode": self.mode,
            "placement": self.placement.to_dict(),
            "command": shlex.join(self.command),
            "config_file": self.config_file,
            "config": self.config,
            "deepspeed_file": self.deepspeed_file,
            "deepspeed": self.deepspeed,
        }


def plan_launch(stage: Stage, command: Command) -> Plan:
    """Return what the command would start here; what is not known before the start is written UNKNOWN.

    Raises RecipeError when `launch:`, the command line and SLURM contradict each other.
    """
    placement = place(stage, command.node_rank, strict=False)
    if is_worker():
        return Plan("worker", placement)
    if placement.world_size == 1:
        return Plan("in-process", placement)
    directory = RunDir(Path(stage.run_dir).expanduser().absolute()).launch
    precision = mixed_precision(stage, placement.device)
    return Plan(
        "accelerate",
        placement,
        command_line(command, placement, precision, directory / CONFIG, timeout_seconds=stage.launch.timeout_seconds),
        str(directory / CONFIG),
        config_text(stage, config_values(stage, placement, precision, directory)),
        *((str(directory / DEEPSPEED_CONFIG), deepspeed_config(stage)) if zero_stage(placement.strategy) else ()),
    )
