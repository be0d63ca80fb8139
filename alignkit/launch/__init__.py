"""Where a stage runs: here, in this process, for now also under a launcher that already started it."""

from alignkit.launch.local import launch_stage

__all__ = ["launch_stage"]
