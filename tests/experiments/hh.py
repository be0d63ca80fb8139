"""Five-fold SFT -> reward model -> DPO on real HH-RLHF pairs, with a small Llama trained from scratch on the CPU.

    python tests/experiments/hh.py PATH/hh-rlhf/harmless_pairs.jsonl.gz OUT [--quantization nf4] [--folds 5]

Prints the held-out pair accuracy of the reward model and of DPO's implicit reward with 95 % Wilson intervals, beside
the "shorter is better" rule on the same pairs. Every stage runs through the command line; folds are by prompt.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

RECIPE = """
name: hh-fold
model:
  path: {model}
  init: scratch
  chat_template: plain
  quantization: {quantization}
lora: {{r: 16, alpha: 32}}
data: {{path: {train}, format: hh}}
eval: {{path: {test}, format: hh}}
pretrain: {{method: sft, objective: lm, max_length: 256, batch_size: 16, learning_rate: 2e-3, num_train_epochs: 3,
           samples: {{num: 0}}, eval_strategy: 'no', {skip}}}
sft: {{start_from: pretrain, max_length: 384, batch_size: 32, learning_rate: 1e-3,
      eval_strategy: 'no', {skip}}}
rm: {{start_from: sft, max_length: 384, batch_size: 32, learning_rate: 1e-3,
     center_rewards_coefficient: 0.01, eval_strategy: 'no', {skip}}}
dpo: {{start_from: sft, max_length: 384, batch_size: 32, learning_rate: 5e-4, beta: 0.1,
      eval_strategy: 'no', {skip}}}
"""


def read_pairs(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def fold_of(pair: dict, folds: int) -> int:
    """Return the fold of a pair; all pairs of one prompt are in the same fold."""
    prompt = pair["chosen"][: pair["chosen"].rfind("\n\nAssistant:")]
    return hashlib.blake2b(prompt.encode()).digest()[0] % folds


def write_pairs(path: Path, pairs: list[dict]) -> None:
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def make_model(directory: Path, texts: list[str]) -> None:
    """Write a Llama config of 0.7 M parameters and a 2,048-token BPE learned on the training texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>").save_pretrained(
        directory
    )
    LlamaConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=352, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=0, pad_token_id=1,
    ).save_pretrained(directory)  # fmt: skip


def wilson(right: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share."""
    z, p = 1.959964, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def run_stage(recipe: Path, method: str, stage: str, cwd: Path) -> dict:
    command = [sys.executable, "-m", "alignkit", method, "-r", str(recipe), "--stage", stage, "--json"]
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--first", type=int, default=5, help="run only the first folds")
    arguments = parser.parse_args()
    pairs = read_pairs(arguments.pairs)
    right = {"rm": 0.0, "dpo": 0.0, "shorter": 0.0}
    seen = {"rm": 0, "dpo": 0, "shorter": 0}
    for fold in range(min(arguments.folds, arguments.first)):
        directory = (arguments.out / f"fold{fold}").resolve()
        directory.mkdir(parents=True, exist_ok=True)
        test = [pair for pair in pairs if fold_of(pair, arguments.folds) == fold]
        train = [pair for pair in pairs if fold_of(pair, arguments.folds) != fold]
        write_pairs(directory / "train.jsonl", train)
        write_pairs(directory / "test.jsonl", test)
        make_model(directory / "llama", [pair["chosen"] for pair in train])
        recipe = directory / "recipe.yaml"
        recipe.write_text(
            RECIPE.format(
                model="./llama",
                train="./train.jsonl",
                test="./test.jsonl",
                quantization=arguments.quantization,
                skip="on_bad_row: skip, max_truncated: 0.4",
            )
        )
        for method, stage in (("sft", "pretrain"), ("sft", "sft"), ("rm", "rm"), ("dpo", "dpo")):
            result = run_stage(recipe, method, stage, directory)
            metrics = result["metrics"]
            print(f"fold {fold} {stage}: {json.dumps(metrics)} {result['wall_seconds']} s", flush=True)
            if stage in right:
                rows = json.loads((directory / "runs/hh-fold" / stage / "stage.json").read_text())["eval_lengths"][
                    "num_rows"
                ]
                key = "eval_accuracy" if stage == "rm" else "eval_rewards/accuracies"
                right[stage] += metrics[key] * rows
                seen[stage] += rows
        right["shorter"] += sum(
            (len(p["chosen"]) < len(p["rejected"])) + 0.5 * (len(p["chosen"]) == len(p["rejected"])) for p in test
        )
        seen["shorter"] += len(test)
    for name in right:
        low, high = wilson(right[name], seen[name])
        print(f"{name}: {right[name] / seen[name]:.1%} [{low:.1%}, {high:.1%}] of {seen[name]} held-out pairs")


if __name__ == "__main__":
    main()
