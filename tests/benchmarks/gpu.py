"""Speed and memory on a card, from random weights of real shapes; writes GPU.md beside this file.

    python tests/benchmarks/gpu.py [--only REGEX] [--out DIRECTORY]

Every measurement is a process of its own. Memory is torch's allocator peak over the steps, weights included. MFU counts
the model's own operations, recomputed ones left out: 6 a parameter and token where all weights are trained, 4 where
adapters are, and causal attention; the card's dense bf16 peak is 989 TFLOP/s (H100, H200). No network is used.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PEAK_FLOPS = 989e12
STEPS, WARM_UP = 10, 3
LENGTH = 2048
SHAPES = {  # hidden size, layers, intermediate size, heads, heads of keys and values: Llama 3.2 1B, Llama 3.1 8B
    "1B": (2048, 16, 8192, 32, 8),
    "8B": (4096, 32, 14336, 32, 8),
}
VOCABULARY = 128_256
# name, method, who, shape, lora, quantization, recompute activations, rows per forward pass
TRAININGS: list[tuple[str, str, str, str, bool, str, bool, int]] = [
    ("sft 8B LoRA", "sft", "ours", "8B", True, "none", True, 1),
    ("sft 8B LoRA", "sft", "trl", "8B", True, "none", True, 1),
    ("dpo 8B LoRA", "dpo", "ours", "8B", True, "none", True, 1),
    ("dpo 8B LoRA", "dpo", "trl", "8B", True, "none", True, 1),
    ("sft 1B full", "sft", "ours", "1B", False, "none", False, 4),
    ("sft 1B full", "sft", "trl", "1B", False, "none", False, 4),
    ("sft 8B LoRA, no recomputation", "sft", "ours", "8B", True, "none", False, 1),
    ("sft 8B QLoRA", "sft", "ours", "8B", True, "nf4", True, 1),
    ("sft 8B QLoRA, no recomputation", "sft", "ours", "8B", True, "nf4", False, 1),
    ("rm 8B QLoRA", "rm", "ours", "8B", True, "nf4", True, 1),
    ("sft 1B full, recomputation", "sft", "ours", "1B", False, "none", True, 4),
]
PPO = [("ppo 1B full", "1B", False), ("ppo 8B LoRA", "8B", True)]
RECIPE = """\
name: gpu
model: {{path: {model}{quantization}}}
launch: {{device: cuda}}
{lora}
{method}:
  data: {{path: {rows}}}
  chat: false
  max_steps: {steps}
  batch_size: {micro}
  micro_batch_size: {micro}
  max_length: {length}
  batching: shuffled
  learning_rate: 1e-5
  gradient_checkpointing: {recompute}
  logging_strategy: "no"
  save_strategy: "no"
  {more}
"""


def write_shape(directory: Path, shape: str) -> Path:
    """Write a Llama of that shape with random bf16 weights, drawn on the card, and a byte-level tokenizer."""
    import torch
    from inputs import write_model
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = directory / shape
    if (path / "config.json").exists():
        return path
    hidden, layers, intermediate, heads, pairs = SHAPES[shape]
    tokenizer = AutoTokenizer.from_pretrained(write_model(directory / "bytes"))
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=pairs, max_position_embeddings=8192,
        tie_word_embeddings=shape == "1B", rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def write_rows(path: Path, method: str, num: int, length: int) -> Path:
    """Write rows of exactly `length` bytes, which are tokens: one row for sft, both answers for dpo and rm."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(num):
            prompt = f"{number:08d} which words come next? "
            words = (f"word{number + place} " for place in range(length))
            answer = "".join(words)[: length - len(prompt) - 1]
            row = {"prompt": prompt, "completion": answer}
            if method != "sft":
                row = {"prompt": prompt, "chosen": answer, "rejected": answer[::-1]}
            file.write(json.dumps(row) + "\n")
    return path


def train(spec: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Take STEPS steps with alignkit's trainer or TRL's and return the median step and the peak of memory."""
    import torch
    from transformers import TrainerCallback

    length = LENGTH if spec["method"] == "sft" else LENGTH // 2
    rows = write_rows(directory / "rows.jsonl", spec["method"], (STEPS + 1) * spec["micro"], length)
    began = time.perf_counter()
    trainer = (_ours if spec["who"] == "ours" else _trl)(spec, directory, rows, length)
    loaded = time.perf_counter() - began
    marks: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            marks.append(time.perf_counter())

    trainer.add_callback(Clock())
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    seconds = statistics.median(after - before for before, after in itertools.pairwise(marks[WARM_UP:]))
    hidden, layers, intermediate, heads, pairs = SHAPES[spec["shape"]]
    head_size = hidden // heads
    matrices = layers * (2 * hidden * hidden + 2 * hidden * pairs * head_size + 3 * hidden * intermediate)
    matrices += VOCABULARY * hidden if spec["method"] != "rm" else 0
    sequences = spec["micro"] * (1 if spec["method"] == "sft" else 2)
    tokens = sequences * length
    passes = 6 if not spec["lora"] else 4
    # The reference of dpo reads the same tokens once more, forward alone.
    flops = (passes + (2 if spec["method"] == "dpo" else 0)) * matrices * tokens
    flops += (passes + (2 if spec["method"] == "dpo" else 0)) * layers * hidden * length * tokens  # causal attention
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "mfu": flops / seconds / PEAK_FLOPS,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "load_seconds": loaded,
    }


def _ours(spec: dict[str, Any], directory: Path, rows: Path, length: int, more: str = "") -> Any:
    import importlib

    from alignkit.cli import quiet_libraries
    from alignkit.recipe import load_recipe, resolve
    from alignkit.runs.directory import RunDir

    quiet_libraries()
    recipe = directory / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(
            model=spec["model"],
            quantization="" if spec["quantization"] == "none" else f", quantization: {spec['quantization']}",
            lora="lora: {r: 16, alpha: 32, dropout: 0.0, target_modules: all-linear}" if spec["lora"] else "",
            method=spec["method"],
            rows=rows,
            steps=STEPS,
            micro=spec["micro"],
            length=length,
            recompute=str(spec["recompute"]).lower(),
            more=more,
        )  # fmt: skip
    )
    run = RunDir(directory / "run")
    run.path.mkdir()
    run.checkpoints.mkdir()
    return (
        importlib.import_module(f"alignkit.train.{spec['method']}")
        .build(resolve(load_recipe(recipe), spec["method"]), run)
        .trainer
    )


def _trl(spec: dict[str, Any], directory: Path, rows: Path, length: int) -> Any:
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    config_class, trainer = (SFTConfig, SFTTrainer) if spec["method"] == "sft" else (DPOConfig, DPOTrainer)
    config = config_class(
        output_dir=str(directory / "out"), max_steps=STEPS, per_device_train_batch_size=spec["micro"],
        max_length=length, learning_rate=1e-5, logging_strategy="no", save_strategy="no", bf16=True,
        gradient_checkpointing=spec["recompute"], report_to="none", disable_tqdm=True,
        # As ours: frozen weights in bf16, trained ones in float32.
        model_init_kwargs={"dtype": "bfloat16" if spec["lora"] else "float32"},
    )  # fmt: skip
    data = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(directory / "cache"))
    return trainer(str(spec["model"]), args=config, train_dataset=data, peft_config=lora if spec["lora"] else None)


def rollouts(spec: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Three PPO rollouts of 64 answers of 128 tokens: seconds of sampling and of the rest, and plain generation's."""
    import torch

    rows = directory / "prompts.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for number in range(192):
            file.write(json.dumps({"prompt": f"{number:08d} " + "which words come next? " * 5}) + "\n")
    more = "reward: builtin:true-reward\n  max_new_tokens: 128\n  min_new_tokens: 128\n  ppo_epochs: 1"
    spec = {**spec, "method": "ppo", "quantization": "none", "recompute": False, "micro": 8}
    recipe = RECIPE.replace("  max_length: {length}\n", "").replace("  batching: shuffled\n", "")
    recipe = recipe.replace("batch_size: {micro}\n  micro", "batch_size: 64\n  micro").replace("{steps}", "3")
    globals()["RECIPE"] = recipe
    trainer = _ours(spec, directory, rows, LENGTH, more)
    sampling: list[float] = []
    sample = trainer.collector.generate

    def timed(*args: Any) -> Any:
        torch.cuda.synchronize()
        began = time.perf_counter()
        answers = sample(*args)
        torch.cuda.synchronize()
        sampling.append(time.perf_counter() - began)
        return answers

    trainer.collector.generate = timed
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    trainer.train()
    torch.cuda.synchronize()
    whole = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 2**30
    model = trainer.model.eval().to(torch.bfloat16)
    model.config.use_cache = True
    ids = torch.randint(0, 250, (64, 124), device="cuda")
    for _ in range(2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=128, min_new_tokens=128, do_sample=True
        )
        torch.cuda.synchronize()
        plain = time.perf_counter() - began
    return {
        "rollout_seconds": whole / 3,
        "sampling_seconds": statistics.median(sampling),
        "tokens_per_second": 64 * 128 / statistics.median(sampling),
        "plain_tokens_per_second": 64 * 128 / plain,
        "peak_gib": peak,
    }


def housekeeping(spec: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Seconds of hashing the frozen base of an 8B model on the card, and of writing 4 GiB of optimizer state."""
    import torch

    from alignkit.models.load import Precision, read_base
    from alignkit.models.parameters import hash_base, hash_samples

    began = time.perf_counter()
    model = read_base(str(spec["model"]), Precision(torch.bfloat16, "cpu")).cuda().requires_grad_(False)
    torch.cuda.synchronize()
    found = {"load_seconds": time.perf_counter() - began}
    for name, measure in (("hash_base", hash_base), ("hash_samples", hash_samples)):
        began = time.perf_counter()
        measure(model)
        found[f"{name}_seconds"] = time.perf_counter() - began
    began = time.perf_counter()
    torch.save({"state": torch.zeros(2**30, device="cuda")}, directory / "optimizer.pt")
    found["save_seconds_per_gib"] = (time.perf_counter() - began) / 4
    return found


WORK = {"train": train, "rollouts": rollouts, "housekeeping": housekeeping}


def _measure(task: str, spec: dict[str, Any], shapes: Path) -> dict[str, Any]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = f"{root}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    with tempfile.TemporaryDirectory(prefix="alignkit-gpu-") as directory:
        command = [sys.executable, __file__, "--worker", task, json.dumps(spec | {"at": str(shapes)}), directory]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        return {"failed": (done.stderr or done.stdout).strip().splitlines()[-12:]}
    return json.loads(line.removeprefix("RESULT "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker", nargs=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    arguments = parser.parse_args()
    if arguments.worker:
        task, text, directory = arguments.worker
        spec = json.loads(text)
        sys.path.insert(0, str(Path(__file__).resolve().parent))
        if task == "shape":
            print("RESULT " + json.dumps({"path": str(write_shape(Path(spec["at"]), spec["shape"]))}))
            return
        spec["model"] = Path(spec["at"]) / spec["shape"]
        print("RESULT " + json.dumps(WORK[task](spec, Path(directory))))
        return
    tasks: list[tuple[str, dict[str, Any]]] = [
        (
            "train",
            dict(
                zip(("name", "method", "who", "shape", "lora", "quantization", "recompute", "micro"), row, strict=True)
            ),
        )
        for row in TRAININGS
    ]
    tasks += [("rollouts", {"name": name, "shape": shape, "lora": lora, "who": "ours"}) for name, shape, lora in PPO]
    tasks.append(("housekeeping", {"name": "housekeeping 8B", "shape": "8B", "who": "ours"}))
    measured = []
    with tempfile.TemporaryDirectory(prefix="alignkit-shapes-") as shapes:
        made: set[str] = set()
        for task, spec in tasks:
            if not re.search(arguments.only, spec["name"]):
                continue
            if spec["shape"] not in made:
                print("shape", spec["shape"], _measure("shape", spec, Path(shapes)), flush=True)
                made.add(spec["shape"])
            began = time.perf_counter()
            found = _measure(task, spec, Path(shapes))
            found["process_seconds"] = time.perf_counter() - began
            measured.append({**spec, **found})
            print(json.dumps(measured[-1]), flush=True)
            (arguments.out / "gpu.json").write_text(json.dumps(measured, indent=1) + "\n")
    (arguments.out / "GPU.md").write_text(_table(measured))


def _table(measured: list[dict[str, Any]]) -> str:
    import torch
    import transformers
    import trl

    lines = [
        "# On a card",
        "",
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"trl {trl.__version__}. Made by `make bench-gpu`; random weights of Llama's shapes, bf16, sdpa, one card.",
        "",
        f"Rows of {LENGTH:,} tokens (dpo and rm: pairs of {LENGTH // 2:,}); the median of {STEPS - WARM_UP - 1} steps.",
        "",
        "| what | rows | by | tokens/s | MFU | peak GiB | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    others = {row["name"]: row for row in measured if row["who"] == "trl" and "mfu" in row}
    for row in measured:
        if "mfu" not in row:
            continue
        other = others.get(row["name"]) if row["who"] == "ours" else None
        ratio = f"{row['tokens_per_second'] / other['tokens_per_second']:.2f}" if other else ""
        by = "alignkit" if row["who"] == "ours" else "TRL's trainer"
        lines.append(
            f"| {row['name']} | {row['micro']} | {by} | {row['tokens_per_second']:,.0f} | {row['mfu']:.1%} | "
            f"{row['peak_gib']:.1f} | {ratio} |"
        )
    lines += [
        "",
        "| 64 answers of 128 tokens | s a rollout, mean of the first 3 | s sampling | tokens/s decoded "
        "| by `generate` | peak GiB |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    lines += [
        f"| {row['name']} | {row['rollout_seconds']:.2f} | {row['sampling_seconds']:.2f} | "
        f"{row['tokens_per_second']:,.0f} | {row['plain_tokens_per_second']:,.0f} | {row['peak_gib']:.1f} |"
        for row in measured
        if "rollout_seconds" in row
    ]
    for row in measured:
        if "hash_base_seconds" in row:
            lines += ["", f"8B in bf16: loaded in {row['load_seconds']:.1f} s, its base hashed in "
                      f"{row['hash_base_seconds']:.1f} s, sampled in {row['hash_samples_seconds']:.2f} s; optimizer "
                      f"state is written in {row['save_seconds_per_gib']:.2f} s a GiB."]  # fmt: skip
    lines += ["", *(f"Failed: {row['name']} ({row['who']})" for row in measured if "failed" in row)]
    lines += _checks(Path(os.environ.get("ALIGNKIT_GPU_LOG", "missing")))
    return "\n".join(lines).rstrip() + "\n"


def _checks(log: Path) -> list[str]:
    """What the tests marked `gpu` measured, the largest of each figure over the cases of a test."""
    if not log.is_file():
        return []
    largest: dict[tuple[str, str], float] = {}
    for found in map(json.loads, log.read_text(encoding="utf-8").splitlines()):
        case = str(found.get("dtype") or found.get("kind") or found.get("optim") or found.get("name") or "")
        for name, value in {**found, **found.get("differences", {})}.items():
            if isinstance(value, float) and name not in ("temperature", "softcap"):
                key = (f"{found['what']} {case}".strip(), name)
                largest[key] = max(largest.get(key, 0.0), value)
    lines = ["", "What `make test-gpu` measured, the largest over its cases:", "", "| check | figure | value |"]
    return [*lines, "|---|---|---|", *(f"| {what} | {name} | {value:.3g} |" for (what, name), value in largest.items())]


if __name__ == "__main__":
    main()
