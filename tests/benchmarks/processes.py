"""Training throughput of two processes beside one: how much of a second core reaches the optimizer.

Every process computes with one thread, so that only the number of processes differs.
"""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path

from inputs import write_model, write_rows
from start_up import SCRIPTS
from table import Row
from timing import Command, alternate

SIZES = {"0.14 M": (64, 2, 1600), "13.9 M": (512, 4, 96)}  # name -> hidden size, layers, rows
STRATEGIES = ("ddp", "fsdp")
RECIPE = """\
name: bench
model: {{path: {model}, dtype: float32}}
launch: {{device: cpu, processes: {processes}, strategy: {strategy}}}
sft:
  data: {{path: {rows}/train.jsonl}}
  num_train_epochs: 1
  batch_size: 16
  micro_batch_size: 8
  max_length: 512
  gradient_checkpointing: false
  samples: {{num: 0}}
"""


def measure_processes(directory: Path, *, runs: int) -> list[Row]:
    """Compare tokens per second of the steps, as result.json has them, with one process and with two."""
    rows = []
    for size, (hidden, layers, num_rows) in SIZES.items():
        model = write_model(directory / f"model-{hidden}", hidden_size=hidden, num_layers=layers)
        data = write_rows(directory / f"rows-{hidden}", "sft", num_rows)
        kinds = {"one": (1, "ddp"), **{strategy: (2, strategy) for strategy in STRATEGIES}}
        commands = [_command(directory, f"{kind}-{hidden}", model, data, *kinds[kind]) for kind in kinds]
        found = alternate(commands, runs=runs, warmups=0)
        speeds = {
            kind: [json.loads(run.output.splitlines()[-1])["tokens_per_second"] for run in found[command.name]]
            for kind, command in zip(kinds, commands, strict=True)
        }
        for strategy in STRATEGIES:
            ratio = statistics.median(two / one for two, one in zip(speeds[strategy], speeds["one"], strict=True))
            medians = [f"{statistics.median(speeds[kind]):,.0f} tokens/s" for kind in (strategy, "one")]
            rows.append(Row(f"sft {size}, 2 processes, {strategy}", medians[0], medians[1], "1 process", ratio))
    return rows


def _command(directory: Path, name: str, model: Path, data: Path, processes: int, strategy: str) -> Command:
    recipe, out = directory / f"{name}.yaml", directory / name
    text = RECIPE.format(model=model, rows=data, processes=processes, strategy=strategy)
    recipe.write_text(text, encoding="utf-8")
    train = f"{SCRIPTS / 'alignkit'} sft --recipe {recipe} --out {out} --json"
    # The result is JSON on several lines; the last line of the output must be one.
    show = f"{SCRIPTS / 'python'} -c \"import json; print(json.dumps(json.load(open('{out}/result.json'))))\""
    return Command(
        name,
        ["sh", "-c", f"{train} && {show}"],
        directory,
        variables={"OMP_NUM_THREADS": "1"},
        prepare=lambda: shutil.rmtree(out, ignore_errors=True),
    )
