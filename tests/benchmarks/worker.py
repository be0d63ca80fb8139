"""One measurement in a process of its own; prints one JSON object. `throughput` and `preparation` start it.

    python worker.py train ours|ours-shuffled|trl|bare MODEL ROWS BATCH
    python worker.py prepare ours|trl MODEL ROWS

All trainers take one epoch over the same rows in float32 on the CPU, so that they see the same tokens, and only
the loop is timed: no start, no saving, no logging.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPE = """\
name: bench
model: {{path: {model}, dtype: float32}}
launch: {{device: cpu}}
sft:
  data: {{path: {rows}/train.jsonl}}
  num_train_epochs: 1
  batch_size: {batch}
  micro_batch_size: {batch}
  batching: {batching}
  learning_rate: 1e-4
  max_length: 512
  logging_strategy: "no"
  save_strategy: "no"
  gradient_checkpointing: false
"""


def train_ours(model: Path, rows: Path, batch: int, out: Path, *, batching: str) -> float:
    """Train with alignkit's own trainer and return the seconds of the loop."""
    from alignkit.recipe import load_recipe, resolve
    from alignkit.runs.directory import RunDir
    from alignkit.train.sft import build

    recipe = out / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=model, rows=rows, batch=batch, batching=batching), encoding="utf-8")
    run = RunDir(out / "run")
    run.path.mkdir()
    run.checkpoints.mkdir()
    return _train(build(resolve(load_recipe(recipe), "sft"), run).trainer)


def train_trl(model: Path, rows: Path, batch: int, out: Path) -> float:
    """Train with TRL's trainer on the batches of `ours-shuffled`, and return the seconds of the loop.

    They are shuffled rows padded per batch, as TRL's default is; another shuffle would pad by chance more or less.
    """
    from datasets import load_dataset
    from trl import SFTConfig, SFTTrainer

    from alignkit.train.order import shuffled_order

    data = load_dataset(str(rows), split="train")
    data = data.select(shuffled_order(len(data), seed=0, epoch=0))
    config = SFTConfig(
        output_dir=str(out),
        num_train_epochs=1,
        per_device_train_batch_size=batch,
        learning_rate=1e-4,
        max_length=512,
        logging_strategy="no",
        save_strategy="no",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        model_init_kwargs={"dtype": "float32"},
    )
    return _train(SFTTrainer(str(model), args=config, train_dataset=data))


def train_bare(model: Path, rows: Path, batch: int, out: Path) -> float:
    """Train in a plain PyTorch loop over ready tensors, with the same padding as TRL, and return its seconds."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    tokenizer = AutoTokenizer.from_pretrained(model)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    batches = _pad_batches(tokenizer, rows, batch)
    began = time.perf_counter()
    for inputs in batches:
        network(**inputs, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - began


def count_tokens(model: Path, rows: Path) -> int:
    """Return the tokens of all rows, padding not counted: characters and an eos, the tokenizer being byte-level."""
    lines = (rows / "train.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(len(row["prompt"]) + len(row["completion"]) + 1 for row in map(json.loads, lines))


def prepare_ours(model: Path, rows: Path, out: Path) -> float:
    """Read, check and tokenise with alignkit and return the seconds; libraries are loaded before the clock starts."""
    import datasets  # noqa: F401

    from alignkit.data import Rejects
    from alignkit.models.chat import Chat
    from alignkit.models.tokens import load_tokenizer
    from alignkit.recipe import load_recipe, resolve
    from alignkit.train.tables import prepare_tables

    recipe = out / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=model, rows=rows, batch=8, batching="grouped"), encoding="utf-8")
    stage = resolve(load_recipe(recipe), "sft")
    began = time.perf_counter()
    prepare_tables(stage, Chat(load_tokenizer(stage)), out / "cache", rejects=Rejects())
    return time.perf_counter() - began


def prepare_trl(model: Path, rows: Path, out: Path) -> float:
    """Load and tokenise with TRL and return the seconds; the model is loaded before the clock starts."""
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    config = SFTConfig(output_dir=str(out), max_length=512, use_cpu=True, bf16=False, report_to="none")
    began = time.perf_counter()
    data = load_dataset(str(rows), split="train")
    SFTTrainer(network, args=config, train_dataset=data, processing_class=tokenizer)
    return time.perf_counter() - began


def _train(trainer: Any) -> float:
    """Train and return the seconds between the callbacks at the loop's two ends."""
    from transformers import TrainerCallback

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.train()
    return times[1] - times[0]


def _pad_batches(tokenizer: Any, rows: Path, batch: int) -> list[dict[str, Any]]:
    import torch

    lines = [json.loads(line) for line in (rows / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [lines[number]["prompt"] + lines[number]["completion"] + tokenizer.eos_token for number in order]
    batches = []
    for start in range(0, len(texts), batch):
        inputs = tokenizer(texts[start : start + batch], padding=True, return_tensors="pt")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        batches.append({"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels})
    return batches


def main() -> None:
    task, who, model, rows, *rest = sys.argv[1:]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    paths = Path(model), Path(rows)
    with tempfile.TemporaryDirectory(prefix="alignkit-bench-") as directory:
        out = Path(directory)
        os.environ["HF_DATASETS_CACHE"] = str(out / "hf-cache")
        if task == "train":
            batch = int(rest[0])
            train = {
                "ours": lambda: train_ours(*paths, batch, out, batching="grouped"),
                "ours-shuffled": lambda: train_ours(*paths, batch, out, batching="shuffled"),
                "trl": lambda: train_trl(*paths, batch, out),
                "bare": lambda: train_bare(*paths, batch, out),
            }
            seconds = train[who]()
            amount = count_tokens(*paths)
        else:
            seconds = (prepare_ours if who == "ours" else prepare_trl)(*paths, out)
            with (paths[1] / "train.jsonl").open("rb") as file:
                amount = sum(1 for _ in file)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "per_second": amount / seconds, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
