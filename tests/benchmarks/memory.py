"""Predicted against measured memory of 26 trainings on the CPU; writes MEMORY.md beside this file.

    python tests/benchmarks/setup.py [--only REGEX]

Measured is the highest sum in the log of torch's allocator while alignkit's own trainer takes two steps, weights and
optimizer state included; predicted is what `alignkit plan` says. Every measurement is a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import itertools
import json
import multiprocessing
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from alignkit.cli import quiet_libraries
from alignkit.recipe import load_recipe, resolve
from alignkit.runs.directory import RunDir
from alignkit.train import setup

MODEL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8,
         "num_key_value_heads": 4, "vocab_size": 8192, "max_position_embeddings": 2048}  # fmt: skip
ROWS = 2
# method, kind of training, whether activations are computed twice, tokens of a row
CASES = [
    (method, kind, recomputes, length)
    for method, kind, recomputes, length in itertools.product(
        ("sft", "dpo", "rm"), ("full", "LoRA", "nf4"), (False, True), (128, 512)
    )
    if not (method != "sft" and length == 128)
]
CASES += [("ppo", kind, False, 128) for kind in ("full", "LoRA")]  # with two reward models, of which no critic starts


def write_recipe(directory: Path, method: str, kind: str, recomputes: bool, length: int) -> Path:
    """Write a model of random weights, rows of exactly that length in bytes, and a recipe."""
    from inputs import write_model

    tokenizer = AutoTokenizer.from_pretrained(write_model(directory / "bytes"))
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**MODEL)).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    with (directory / "rows.jsonl").open("w", encoding="utf-8") as file:
        for number in range(4 * ROWS):
            answer = "".join(f"word{number + place} " for place in range(length))[: length - 10]
            row = {"prompt": f"{number:08d}", "completion": answer}
            if method != "sft":
                row = {"prompt": f"{number:08d}", "chosen": answer, "rejected": answer[::-1]}
            file.write(json.dumps(row) + "\n")
    more = f"max_length: {length}, gradient_checkpointing: {str(recomputes).lower()}"
    if method == "ppo":  # half of a row is written
        rewards = [str(directory / name) for name in ("one", "two")]
        for reward in rewards:
            shape = LlamaConfig(**MODEL, num_labels=1, pad_token_id=tokenizer.pad_token_id)
            LlamaForSequenceClassification(shape).save_pretrained(reward)
            tokenizer.save_pretrained(reward)
        (directory / "rows.jsonl").write_text(
            "".join(json.dumps({"prompt": f"{number:0{length // 2}d}"}) + "\n" for number in range(4 * ROWS))
        )
        more = f"reward: [{', '.join(f'{{model: {reward}}}' for reward in rewards)}], max_new_tokens: {length // 2}, "
        more += f"min_new_tokens: {length // 2}, minibatches: 1, gradient_checkpointing: {str(recomputes).lower()}"
    recipe = directory / "recipe.yaml"
    recipe.write_text(
        f"name: memory\nmodel: {{path: {directory / 'model'}, quantization: {'nf4' if kind == 'nf4' else 'none'}}}\n"
        f"launch: {{device: cpu}}\n{'' if kind == 'full' else 'lora: {dropout: 0.0}'}\n"
        f"{method}: {{data: {directory / 'rows.jsonl'}, chat: false, max_steps: 2, batch_size: {ROWS}, "
        f"micro_batch_size: {ROWS}, {more}, "
        "logging_strategy: 'no', save_strategy: 'no'}\n"
    )
    return recipe


def measure(case: tuple[str, str, bool, int]) -> tuple[float, float]:
    """Predict, then take two steps under torch's profiler and read the allocator's log; MiB."""
    with tempfile.TemporaryDirectory(prefix="alignkit-memory-") as directory:
        os.environ["XDG_CACHE_HOME"] = directory
        return _measure(*case, Path(directory))


def _measure(method: str, kind: str, recomputes: bool, length: int, directory: Path) -> tuple[float, float]:
    quiet_libraries()
    stage = resolve(load_recipe(write_recipe(directory, method, kind, recomputes, length)), method)
    predicted = setup.predict_memory(stage, setup.read_shape(stage), micro=ROWS, tokens=length, device="cpu")
    run = RunDir(directory / "run")
    run.checkpoints.mkdir(parents=True)
    module = importlib.import_module(f"alignkit.train.{method}")
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        trainer = module.build(stage, run).trainer
        models = [trainer.model]
        if method == "ppo":
            models += [trainer.roles.reference or trainer.model, *trainer.collector.rewards.modules]
        for parameter in filter(torch.is_floating_point, itertools.chain(*(model.parameters() for model in models))):
            parameter.data = parameter.data.clone()  # what is mapped from a file does not come from the allocator
        gc.collect()
        with torch.profiler.record_function("BUILT"):
            pass
        trainer.train()
    log = directory / "log.json"
    profile.export_chrome_trace(str(log))
    events = json.loads(log.read_text(encoding="utf-8"))["traceEvents"]
    built = min(event["ts"] for event in events if event.get("name") == "BUILT")
    sums = sorted((event["ts"], event["args"]["Bytes"], event["args"]["Total Allocated"])
                  for event in events if event.get("name") == "[memory]")  # fmt: skip
    before = sums[0][2] - sums[0][1]
    highest = max(total for at, _, total in sums if at >= built) - before
    return predicted.total / 2**20, highest / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="")
    only = parser.parse_args().only
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    for method in ("sft", "dpo", "rm", "ppo"):
        importlib.import_module(f"alignkit.train.{method}")
    lines = [
        "# Memory, predicted and measured",
        "",
        f"On the CPU, {ROWS} rows a step, float32; a Llama of {MODEL['num_hidden_layers']} layers of "
        f"{MODEL['hidden_size']}. Made by `python tests/benchmarks/setup.py`; GPU.md has what a card measured.",
        "",
        "| method | trained | recomputes | tokens | predicted MiB | measured MiB | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in (case for case in CASES if re.search(only, " ".join(map(str, case)))):
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as child:  # which may have one that traces
            predicted, measured = child.submit(measure, case).result()
        method, kind, recomputes, length = case
        lines.append(f"| {method} | {kind} | {'yes' if recomputes else 'no'} | {length} | {predicted:.1f} | "
                     f"{measured:.1f} | {predicted / measured - 1:+.1%} |")  # fmt: skip
        print(lines[-1], flush=True)
    if not only:
        Path(__file__).with_name("MEMORY.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
