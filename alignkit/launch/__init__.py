"""Where a stage runs: here, in this process."""

from alignkit.launch.environment import prepare_environment
from alignkit.launch.local import launch_stage

__all__ = ["launch_stage", "prepare_environment"]
