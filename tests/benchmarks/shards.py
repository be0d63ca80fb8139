"""Memory of each of two processes under ddp, fsdp, zero2 and zero3, predicted and measured; writes SHARDS.md.

    python tests/benchmarks/shards.py [--only REGEX]

Two real processes joined by gloo, on the CPU. Measured is the highest sum in the log of torch's allocator over two
steps, as in setup.py, from which the model and the rows are, without gloo's copies. zero2 and zero3 need DeepSpeed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from memory import MODEL, ROWS, write_recipe

from alignkit.launch.accelerate import join_launcher
from alignkit.recipe import Stage, load_recipe, resolve
from alignkit.runs.directory import RunDir
from alignkit.train import ranks, setup

LENGTH = 128
STRATEGIES = ("ddp", "fsdp", "zero2", "zero3")
CASES = [(*kind, strategy) for kind in (("sft", "full", "no"), ("sft", "full", "bf16"), ("sft", "LoRA", "no"),
         ("dpo", "full", "no"), ("rm", "full", "no")) for strategy in STRATEGIES]  # fmt: skip


def work(stage: Stage) -> None:
    """Train two steps as one of the processes, and print the bytes of its highest moment."""
    join_launcher(stage, retries=0)
    run = RunDir(Path(stage.run_dir))
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    ranks.start(stage, run.path)
    build = importlib.import_module(f"alignkit.train.{stage.method}").build
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer = build(stage, run).trainer
        for weight in filter(torch.is_floating_point, trainer.model.parameters()):
            weight.data = weight.data.clone()  # what is mapped from a file does not come from the allocator
        del weight
        gc.collect()
        trainer.train()
    log = run.path / f"log-{ranks.rank()}.json"
    profile.export_chrome_trace(str(log))
    events = json.loads(log.read_text(encoding="utf-8"))["traceEvents"]
    # From the first optimizer step on: before it, a strategy has yet to shard what each process has loaded.
    sharded = min(event["ts"] for event in events if str(event.get("name")).startswith("Optimizer.step"))
    print(f"RESULT {highest(events, sharded)}", flush=True)


def highest(events: list[dict[str, Any]], start: float) -> int:
    """Find the largest sum of what is allocated, without the copies that gloo makes of what it reduces: its thread
    frees them when it comes by, a step later or at once."""
    spans = [(each["name"], each["ts"], each["ts"] + each["dur"]) for each in events if "dur" in each]
    reduced = [span for span in spans if re.search("RegisterPostBackward|AccumulateGrad|post_backward", span[0])]
    copies = [(began, ended) for name, began, ended in spans if name == "aten::clone"
              and any(first <= began and ended <= last for _, first, last in reduced)]  # fmt: skip
    total, most, alive, skipped = 0, 0, dict[int, int](), set[int]()
    for at, size, place in sorted((each["ts"], each["args"]["Bytes"], each["args"]["Addr"])
                                                  for each in events if each.get("name") == "[memory]"):  # fmt: skip
        if size > 0 and any(began <= at <= ended for began, ended in copies):
            skipped.add(place)
        elif size > 0:
            alive[place] = size
            total += size
        elif place in skipped:
            skipped.remove(place)
        else:
            total -= alive.pop(place, 0)  # what was there before is not counted
        most = max(most, total if at >= start else 0)
    return most


def measure(method: str, kind: str, mixed: str, strategy: str) -> tuple[setup.Prediction, list[int]]:
    """Predict the highest moment of each process of two, and count it in both."""
    with tempfile.TemporaryDirectory(prefix="alignkit-shards-") as name:
        directory = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(directory)
        recipe = write_recipe(directory, method, kind, False, LENGTH)
        more = ["launch.processes=2", f"launch.strategy={strategy}", f"launch.mixed_precision={mixed}"]
        more += [f"{method}.batch_size={2 * ROWS}"]
        stage = resolve(load_recipe(recipe, overrides=more), method, out=directory / "run")
        found = setup.predict_memory(stage, setup.read_shape(stage), micro=ROWS, tokens=LENGTH, device="cpu")
        here = [str(Path(__file__).parent), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        variables = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
        command += ["--work", str(recipe), method, str(directory / "run"), *more]
        done = subprocess.run(command, env=os.environ | variables | {"PYTHONPATH": os.pathsep.join(here)},
                              capture_output=True, text=True, timeout=300, check=False)  # fmt: skip
        lines = re.findall(r"RESULT (\d+)", done.stdout)
        assert done.returncode == 0 and len(lines) == 2, done.stderr[-6000:]
        return found, [int(line) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    parser.add_argument("--work", nargs="*")
    options = parser.parse_args()
    if options.work:
        recipe, method, out, *more = options.work
        return work(resolve(load_recipe(Path(recipe), overrides=more), method, out=Path(out)))
    lines = [
        "# Memory of two processes, predicted and measured",
        "",
        f"On the CPU, {ROWS} rows of {LENGTH} tokens a process and step; a Llama of {MODEL['num_hidden_layers']} "
        f"layers of {MODEL['hidden_size']}. Made by `python tests/benchmarks/shards.py`.",
        "",
        "| method | trained | 16 bits | strategy | predicted MiB | rank 0 | rank 1 | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in (case for case in CASES if re.search(options.only, " ".join(case))):
        if case[-1].startswith("zero") and importlib.util.find_spec("deepspeed") is None:
            continue
        found, measured = measure(*case)
        sizes = " | ".join(f"{size / 2**20:.1f}" for size in (found.total, *measured))
        lines.append(f"| {' | '.join(case)} | {sizes} | {found.total / max(measured) - 1:+.1%} |")
        print(lines[-1], flush=True)
        if os.environ.get("SHOW"):
            print(found.moment, {name: round(size / 2**20, 2) for name, size in found.parts.items()})
    if not options.only:
        Path(__file__).with_name("SHARDS.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return None


if __name__ == "__main__":
    main()
