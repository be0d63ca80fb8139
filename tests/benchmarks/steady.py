"""Work per second once everything is loaded: training throughput and data preparation, beside TRL's.

Seconds are the processor's, so that a neighbour on the machine counts for neither side; every process has one thread,
and two run at once.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from grpo import train_both
from inputs import write_model, write_rows
from table import Row
from timing import Command, alternate

import alignkit.models

WORKER = Path(__file__).resolve().parent / "worker.py"
SIZES = {"0.14 M": (64, 2, 400, ">= 1.2"), "13.9 M": (512, 4, 48, ">= 1.0")}  # hidden size, layers, rows, bar
METHODS = {"sft": "SFTTrainer", "dpo": "DPOTrainer", "rm": "RewardTrainer"}
GROWTH = ("rows", "hidden size", "length")
FACTORS = (1, 2, 4, 8)
BATCH = 8
PREPARED_ROWS = 20_000
Measured = dict[str, list[dict[str, float]]]  # what the worker printed, by name


def measure_throughput(directory: Path, *, runs: int, sizes: Sequence[str] = tuple(SIZES)) -> list[Row]:
    """Count non-padding tokens per second of one epoch: alignkit, TRL and a bare PyTorch loop."""
    rows = []
    for size in sizes:
        hidden, layers, num_rows, bar = SIZES[size]
        model = write_model(directory / f"model-{hidden}", hidden_size=hidden, num_layers=layers)
        for method, trainer in METHODS.items():
            data = write_rows(directory / f"{method}-{hidden}", method, num_rows)
            names = ["ours", "ours-shuffled", "trl", "bare"]
            found = _measure([method], names, [str(model), str(data), str(BATCH)], directory, runs=runs)
            _require_equal_losses(method, found)
            what, theirs = f"{method} {size}", f"TRL's {trainer}"
            peaks = [statistics.median(run["peak_bytes"] for run in found[name]) for name in ("ours-shuffled", "trl")]
            rows += [
                _row(f"{what}, the same batches", found, "ours-shuffled", "trl", theirs, bar),
                _row(f"{what}, each one's batches", found, "ours", "trl", theirs, ">= 1.6"),
                _row(f"{what}, the same batches", found, "ours-shuffled", "bare", "a bare PyTorch loop", ">= 0.95"),
                _memory(f"{what}, peak memory of the process", *peaks, theirs),
            ]
    return rows


def measure_real_model(directory: Path, *, runs: int) -> list[Row]:
    """Train LoRA adapters on the model directory that ALIGNKIT_REAL_MODEL names, beside TRL on the same batches."""
    if not (path := os.environ.get("ALIGNKIT_REAL_MODEL")):
        print("real: left out: ALIGNKIT_REAL_MODEL names no model directory", file=sys.stderr)
        return []
    import torch

    words = ["lora", "bf16"] if torch.cpu._is_avx512_bf16_supported() else ["lora"]
    rows = []
    for method in ("sft", "dpo"):
        data = write_rows(directory / method, method, 24, turns=True)
        # Losses differ: TRL trains the newline behind an answer's end, too.
        found = _measure([method], ["ours-shuffled", "trl"], [path, str(data), "4", *words], directory, runs=runs)
        what = f"{method}, real model, {', '.join(words)}, the same batches"
        rows.append(
            _row(what, found, "ours-shuffled", "trl", f"TRL's {METHODS[method]}", ">= 1.1", unit="characters/s")
        )
    return rows


def measure_profile(directory: Path, *, runs: int) -> list[Row]:
    """Say where the processor time of a step of 0.14 M goes, in shares of the whole step."""
    hidden, layers, num_rows, _ = SIZES["0.14 M"]
    model = write_model(directory / "model", hidden_size=hidden, num_layers=layers)
    rows = []
    for method in METHODS:
        data = write_rows(directory / method, method, num_rows // 2)
        found = _measure([method], ["profile"], [str(model), str(data), str(BATCH)], directory, runs=runs)["profile"]
        for part in found[0]:
            if part.startswith("share of "):
                share = statistics.median(run[part] for run in found)
                seconds = statistics.median(run["seconds_per_step"] for run in found)
                what = f"{method} 0.14 M, {part.removeprefix('share of ')}"
                rows.append(Row(what, f"{1e3 * share * seconds:.1f} ms", f"{1e3 * seconds:.1f} ms", "the step", share))
    return rows


def measure_growth(directory: Path, *, runs: int) -> list[Row]:
    """Cost of sft at 1 to 8 times rows, hidden size and length, and of grpo at as many answers, with the exponents."""
    rows = []
    for kind in GROWTH:
        costs: dict[str, list[float]] = {"ours-shuffled": [], "bare": []}
        for factor in FACTORS:
            hidden = 64 * (factor if kind == "hidden size" else 1)
            words = 40 * (factor if kind == "length" else 1)
            place = directory / f"{kind.replace(' ', '-')}-{factor}"
            model = write_model(place / "model", hidden_size=hidden, num_layers=2, positions=4096)
            data = write_rows(place / "rows", "sft", 160 * (factor if kind == "rows" else 1), words=words)
            found = _measure(["sft"], [*costs], [str(model), str(data), str(BATCH)], directory, runs=runs)
            for name, seconds in costs.items():
                seconds.append(statistics.median(run["seconds"] for run in found[name]))
        rows.append(_growth(f"sft, {kind}", *costs.values(), "a bare PyTorch loop"))
    found = [train_both(directory / f"answers-{factor}", answers=32 * factor, runs=runs) for factor in FACTORS]
    ours, theirs = (
        [32 * factor / statistics.median(each["processor"] for each in both[name])
         for factor, both in zip(FACTORS, found, strict=True)]
        for name in ("alignkit", "trl")
    )  # fmt: skip
    return [*rows, _growth("grpo, answers", ours, theirs, "trl's GRPOTrainer")]


def _growth(what: str, ours: Sequence[float], theirs: Sequence[float], against: str) -> Row:
    exponents = [math.log(each[-1] / each[0]) / math.log(FACTORS[-1]) for each in (ours, theirs)]
    told = [f"{' '.join(f'{value:.1f}' for value in each)} s" for each in (ours, theirs)]
    what = f"{what} x {', '.join(map(str, FACTORS))}: exponents {exponents[0]:.2f} and {exponents[1]:.2f}"
    return Row(what, *told, against, exponents[0] / exponents[1], "<= 1.1")


def _require_equal_losses(method: str, found: Measured) -> None:
    """Stop where the sides did not train on the same batches; a new reward head is drawn at random."""
    losses = {name: round(found[name][0]["loss"], 6) for name in found if name != "ours"}
    if method != "rm" and max(losses.values()) > 1.001 * min(losses.values()):
        raise RuntimeError(f"{method}: mean losses differ, so the batches do: {losses}")


def _memory(what: str, ours: float, theirs: float, against: str) -> Row:
    return Row(what, f"{ours / 2**20:.0f} MiB", f"{theirs / 2**20:.0f} MiB", against, ours / theirs)


def measure_preparation(directory: Path, *, runs: int) -> list[Row]:
    """Count rows per second from a JSONL file to token tables; ALIGNKIT_BENCH_ROWS sets another number of rows."""
    num_rows = int(os.environ.get("ALIGNKIT_BENCH_ROWS", PREPARED_ROWS))
    model = write_model(directory / "model")
    data = write_rows(directory / "rows", "sft", num_rows)
    found = _measure(["prepare"], ["ours", "trl"], [str(model), str(data)], directory, runs=runs)
    peaks = [statistics.median(run["peak_bytes"] for run in found[name]) for name in ("ours", "trl")]
    zephyr = (Path(alignkit.models.__file__).parent / "templates" / "zephyr.jinja").read_text(encoding="utf-8")
    model, data = write_model(directory / "chat", template=zephyr), write_rows(directory / "chats", "chats", num_rows)
    chats = _measure(["prepare"], ["ours", "trl"], [str(model), str(data)], directory, runs=runs)
    return [
        _row(f"{num_rows:,} chats of sft", chats, "ours", "trl", "TRL's SFTTrainer", ">= 5", unit="rows/s"),
        _row(f"{num_rows:,} rows of sft", found, "ours", "trl", "TRL's SFTTrainer", ">= 5", unit="rows/s"),
        _memory(f"{num_rows:,} rows of sft, peak memory", *peaks, "TRL's SFTTrainer"),
    ]


def _measure(
    task: Sequence[str], names: Sequence[str], arguments: Sequence[str], directory: Path, *, runs: int
) -> Measured:
    one = {"OMP_NUM_THREADS": "1"}  # thread; two processes of two each would spin for each other's core
    words = [sys.executable, str(WORKER), *task]
    commands = [Command(name, [*words, name, *arguments], directory, variables=one) for name in names]
    found = alternate(commands, runs=runs, warmups=0, at_once=2)
    return {name: [json.loads(run.output.splitlines()[-1]) for run in found[name]] for name in names}


def _row(what: str, found: Measured, ours: str, theirs: str, against: str, bar: str, *, unit: str = "tokens/s") -> Row:
    mine, others = ([run["per_second"] for run in found[name]] for name in (ours, theirs))
    ratio = statistics.median(one / other for one, other in zip(mine, others, strict=True))
    medians = [f"{statistics.median(speeds):,.0f} {unit}" for speeds in (mine, others)]
    return Row(what, medians[0], medians[1], against, ratio, bar)
