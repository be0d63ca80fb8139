"""How a global batch is shared out to processes: arithmetic on the recipe, so that a mistake costs no start-up."""

from __future__ import annotations

from alignkit.errors import Problem
from alignkit.recipe.schema import TrainOptions
from alignkit.recipe.stage import Stage


def check_batch(stage: Stage, num_processes: int) -> Problem | None:
    """Return what is wrong with `batch_size` for so many processes, None when each gets the same number of rows."""
    options = stage.options
    if not isinstance(options, TrainOptions):
        return None
    micro = options.micro_batch_size
    divisor = num_processes * (1 if micro == "auto" else micro)
    if options.batch_size % divisor == 0:
        return None
    several = f"{num_processes} processes" if num_processes > 1 else "one process"
    shared = several if micro == "auto" else f"{several} with micro_batch_size {micro}"
    return Problem(
        f"{stage.name}.batch_size is {options.batch_size}, which {shared} cannot divide; "
        f"make it a multiple of {divisor}",
        stage.where(f"{stage.name}.batch_size"),
    )
