"""Work per second once everything is loaded: training throughput and data preparation, beside TRL's."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from inputs import write_model, write_rows
from table import Row
from timing import Command, alternate

WORKER = Path(__file__).resolve().parent / "worker.py"
SIZES = {"0.14 M": (64, 2, 1600), "13.9 M": (512, 4, 96)}  # name -> hidden size, layers, rows
BATCH = 8
PREPARED_ROWS = 20_000
Measured = dict[str, list[dict[str, float]]]  # what the worker printed, by name


def measure_throughput(directory: Path, *, runs: int) -> list[Row]:
    """Count non-padding tokens per second of one epoch: alignkit, TRL and a bare PyTorch loop."""
    rows = []
    for size, (hidden, layers, num_rows) in SIZES.items():
        model = write_model(directory / f"model-{hidden}", hidden_size=hidden, num_layers=layers)
        data = write_rows(directory / f"rows-{hidden}", "sft", num_rows)
        names = ["ours", "ours-shuffled", "trl", "bare"]
        found = _measure(["train"], names, [str(model), str(data), str(BATCH)], directory, runs=runs)
        rows += [
            _row(f"sft {size}, the same batches", found, "ours-shuffled", "trl", "TRL's SFTTrainer", ">= 1.0"),
            _row(f"sft {size}, each one's batches", found, "ours", "trl", "TRL's SFTTrainer", ">= 1.5"),
            _row(f"sft {size}, the same batches", found, "ours-shuffled", "bare", "a bare PyTorch loop", ""),
        ]
    return rows


def measure_preparation(directory: Path, *, runs: int) -> list[Row]:
    """Count rows per second from a JSONL file to token tables; ALIGNKIT_BENCH_ROWS sets another number of rows."""
    num_rows = int(os.environ.get("ALIGNKIT_BENCH_ROWS", PREPARED_ROWS))
    model = write_model(directory / "model")
    data = write_rows(directory / "rows", "sft", num_rows)
    found = _measure(["prepare"], ["ours", "trl"], [str(model), str(data)], directory, runs=runs)
    peaks = [statistics.median(run["peak_bytes"] for run in found[name]) / 2**20 for name in ("ours", "trl")]
    return [
        _row(f"{num_rows:,} rows of sft", found, "ours", "trl", "TRL's SFTTrainer", ">= 5", unit="rows/s"),
        Row(f"{num_rows:,} rows of sft, peak memory", f"{peaks[0]:.0f} MiB", f"{peaks[1]:.0f} MiB", "TRL's SFTTrainer",
            peaks[0] / peaks[1]),
    ]  # fmt: skip


def _measure(
    task: Sequence[str], names: Sequence[str], arguments: Sequence[str], directory: Path, *, runs: int
) -> Measured:
    commands = [Command(name, [sys.executable, str(WORKER), *task, name, *arguments], directory) for name in names]
    found = alternate(commands, runs=runs, warmups=0)
    return {name: [json.loads(run.output.splitlines()[-1]) for run in found[name]] for name in names}


def _row(what: str, found: Measured, ours: str, theirs: str, against: str, bar: str, *, unit: str = "tokens/s") -> Row:
    mine, others = ([run["per_second"] for run in found[name]] for name in (ours, theirs))
    ratio = statistics.median(one / other for one, other in zip(mine, others, strict=True))
    medians = [f"{statistics.median(speeds):,.0f} {unit}" for speeds in (mine, others)]
    return Row(what, medians[0], medians[1], against, ratio, bar)
