"""A whole short run from a cold start, alignkit's command against TRL's with the same settings.

Both read the same model directory and the same rows, take 20 steps and save the model; each keeps its own extras
at their defaults (alignkit's are samples, step-0 checks, a sealed checkpoint, and reloading what it saved).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from inputs import write_model, write_rows
from start_up import SCRIPTS
from table import Row
from timing import Command, alternate, median_ratio, median_seconds

STEPS = 20
TRL_COMMANDS = {"sft": "sft", "dpo": "dpo", "rm": "reward"}
# The same words for both: batch 8, no accumulation, float32 on the CPU, no truncation to speak of.
RECIPE = """\
name: bench
model: {{path: {model}, dtype: float32}}
launch: {{device: cpu}}
{method}:
  data: {{path: {rows}/train.jsonl}}
  max_steps: {steps}
  batch_size: 8
  micro_batch_size: 8
  learning_rate: 1e-4
  max_length: 512
  logging_steps: 10
  gradient_checkpointing: false
"""
TRL_CONFIG = """\
model_name_or_path: {model}
dtype: float32
dataset_name: {rows}
output_dir: {out}
max_steps: {steps}
per_device_train_batch_size: 8
gradient_accumulation_steps: 1
learning_rate: 1.0e-4
max_length: 512
logging_steps: 10
gradient_checkpointing: false
use_cpu: true
bf16: false
report_to: none
"""


def measure_short_run(directory: Path, *, runs: int) -> list[Row]:
    """Time 20 steps of sft, dpo and rm with a 0.14 M model."""
    model = write_model(directory / "model")
    rows = []
    for method, command in TRL_COMMANDS.items():
        data = write_rows(directory / f"rows-{method}", method, 400)
        commands = [_ours(directory, method, model, data), _theirs(directory, command, model, data)]
        found = alternate(commands, runs=runs, warmups=not rows)  # once: then all libraries are in the page cache
        ours, theirs = (found[each.name] for each in commands)
        rows.append(
            Row(
                f"{method}, {STEPS} steps, cold start",
                f"{median_seconds(ours):.1f} s",
                f"{median_seconds(theirs):.1f} s",
                f"`trl {command}`",
                median_ratio(ours, theirs),
                "<= 0.7",
            )
        )
    return rows


def _ours(directory: Path, method: str, model: Path, data: Path) -> Command:
    recipe, out = directory / f"{method}.yaml", directory / f"ours-{method}"
    recipe.write_text(RECIPE.format(method=method, model=model, rows=data, steps=STEPS), encoding="utf-8")
    arguments = [str(SCRIPTS / "alignkit"), method, "--recipe", str(recipe), "--out", str(out)]
    return Command(f"alignkit {method}", arguments, directory, prepare=lambda: shutil.rmtree(out, ignore_errors=True))


def _theirs(directory: Path, command: str, model: Path, data: Path) -> Command:
    config, out = directory / f"trl-{command}.yaml", directory / f"trl-{command}"
    config.write_text(TRL_CONFIG.format(model=model, rows=data, out=out, steps=STEPS), encoding="utf-8")
    arguments = [str(SCRIPTS / "trl"), command, "--config", str(config)]
    cache = directory / "hf-cache"  # a cold start tokenises: TRL would otherwise find its tokens of the last round

    def prepare() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(cache, ignore_errors=True)

    return Command(f"trl {command}", arguments, directory, variables={"HF_DATASETS_CACHE": str(cache)}, prepare=prepare)
