"""Constitutional AI in miniature: labels of a judge that was trained here, and a real run on the published revisions.

    python tests/experiments/rlaif.py miniature OUT [--seeds 3] [--prompts 200]
    python tests/experiments/rlaif.py replay PATH/constitutional-ai PATH/hh-rlhf/harmless_pairs.jsonl.gz OUT [--seeds 3]

`miniature` runs recipes/tiny-rlaif.yaml: pre-training, sft and the judge once, then for each seed the labels, soft and
hard, dpo on either, and rm and ppo on the soft ones. The toy world's true reward, which no stage has seen, is the
measure: of sampled answers to test prompts before and after, and of the labels themselves.

`replay` trains on the published critique-revision chains: a small model learns dialogue from HH-RLHF, then the
revisions of all but the held-out prompts; prints the loss on held-out chains before and after, over seeds of the split.

Every stage runs through the command line. Intervals are 95 %: t over seeds, Wilson for shares.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = REPOSITORY / "recipes" / "tiny-rlaif.yaml"
POLICIES = ("sft", "soft", "hard", "ppo")
HARD = """
extends: {recipe}
name: {name}
seed: {seed}
model: {{init: pretrained}}
sft: null
judge: null
pretrain: null
rlaif: {{start_from: {base}/sft, judge: {base}/judge}}
hard:
  method: rlaif
  start_from: {base}/sft
  constitution: builtin:positive-reviews
  data: {{path: builtin:prompts, max_rows: 800}}
  judge: {base}/judge
  critique: false
  label: {{max_new_tokens: 48, batch_size: 64, hard: true}}
  dpo: {{max_length: 256, batch_size: 32, learning_rate: 2e-4, num_train_epochs: 2, beta: 0.1,
        special_tokens_in_text: escape}}
rm: {{start_from: {base}/sft}}
ppo: {{start_from: {base}/sft}}
stages: [rlaif, hard, rm, ppo]
"""
REPLAY = """
name: replay
seed: {seed}
model: {{path: builtin:tiny-gpt2, init: scratch, chat_template: plain, config: {{n_layer: 4, n_embd: 128}}}}
sft:
  data: {{path: {hh}, format: hh}}
  max_length: 512
  max_truncated: 1
  batch_size: 16
  learning_rate: 2e-3
  num_train_epochs: 2
  on_bad_row: skip
  samples: {{num: 0}}
  save_strategy: 'no'
rlaif:
  start_from: sft
  constitution: builtin:harmlessness
  data: builtin:prompts
  train: none
  critique: {{replay: [{chains}]}}
  sft:
    eval: 0.2
    eval_on_start: true
    max_length: 512
    max_truncated: 1
    batch_size: 16
    learning_rate: 5e-4
    num_train_epochs: 4
    samples: {{num: 0}}
    save_strategy: 'no'
stages: [sft, rlaif]
"""
_T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def run(recipe: Path, cwd: Path, *more: str) -> None:
    """Run the stages of a recipe; finished ones are left alone."""
    command = [sys.executable, "-m", "alignkit", *(more or ("run",)), "-r", str(recipe)]
    with (cwd / "log.txt").open("a") as log:
        subprocess.run(command, cwd=cwd, check=True, stdout=log, stderr=log)


def answer(model_dir: Path, num_prompts: int, seed: int) -> list[float]:
    """Return the true rewards of sampled answers of a model to prompts of the test split."""
    from alignkit.data.builtin import iter_builtin, parse_builtin, true_reward
    from alignkit.models.chat import Chat
    from alignkit.models.frozen import load_causal
    from alignkit.models.generation import generate_answers

    loaded = load_causal(str(model_dir), device="cpu")
    chat = Chat(loaded.tokenizer)
    rows = [record for _, record in iter_builtin(parse_builtin(f"builtin:prompts?rows={num_prompts}", split="test"))]
    prompts = chat.encode_prompts([row["prompt"] for row in rows])
    rewards = []
    for start in range(0, len(prompts), 50):
        batch = prompts[start : start + 50]
        seeds = [seed * 1_000_003 + start + number for number in range(len(batch))]
        ids = generate_answers(
            loaded.model, batch, seeds, temperature=1.0, max_new_tokens=48, eos_ids=chat.stop_ids,
            pad_id=loaded.tokenizer.pad_token_id,
        )  # fmt: skip
        rewards += [true_reward(text) for text in loaded.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    return rewards


def agreement(rows_file: Path) -> tuple[int, int, float]:
    """Return how many soft labels prefer the truly better answer, of how many that differ, and their mean log-loss."""
    from alignkit.data.builtin import true_reward

    right = count = 0
    losses = []
    for line in rows_file.read_text().splitlines():
        row = json.loads(line)
        gain = true_reward(row["chosen"][0]["content"]) - true_reward(row["rejected"][0]["content"])
        if not gain:
            continue
        label = row.get("label", 1.0)
        truth = label if gain > 0 else 1 - label
        right += truth > 0.5
        losses.append(-math.log(max(truth, 1e-9)))
        count += 1
    return right, count, statistics.mean(losses)


def wilson(right: float, n: int) -> tuple[float, float]:
    z, p = 1.959964, right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def spread(values: list[float]) -> str:
    """Return the mean over seeds with its 95 % t interval."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = _T_95.get(len(values), 1.96) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3f} ± {half:.3f}"


def miniature(out: Path, seeds: int, num_prompts: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    for stage in ("pretrain", "sft", "judge"):
        run(RECIPE, out, "sft", "--stage", stage)
    base = out / "runs/tiny-rlaif"
    found: dict[str, list[float]] = {name: [] for name in POLICIES}
    for seed in range(1, seeds + 1):
        name = f"seed{seed}"
        recipe = out / f"{name}.yaml"
        recipe.write_text(HARD.format(recipe=RECIPE, name=name, seed=seed, base=base))
        run(recipe, out)
        runs = out / "runs" / name
        models = {"sft": base / "sft", "soft": runs / "rlaif-dpo", "hard": runs / "hard-dpo", "ppo": runs / "ppo"}
        for policy, directory in models.items():
            rewards = answer(directory / "model", num_prompts, seed)
            found[policy].append(statistics.mean(rewards))
            error = statistics.stdev(rewards) / math.sqrt(len(rewards))
            print(f"seed {seed} {policy}: true reward {found[policy][-1]:.3f} (standard error {error:.3f})", flush=True)
        right, count, loss = agreement(runs / "rlaif-label/rows.jsonl")
        low, high = wilson(right, count)
        report: dict[str, Any] = json.loads((runs / "rlaif-label/report.json").read_text())
        check, orders = report["check"], report["order_agreement"]
        print(
            f"seed {seed} labels: {right / count:.1%} [{low:.1%}, {high:.1%}] of {count} agree with the true reward, "
            f"log-loss {loss:.3f} (a coin: {math.log(2):.3f}); on {check['n']} known comparisons "
            f"{check['accuracy']:.1%} [{check['low']:.1%}, {check['high']:.1%}], ECE {check['ece']:.3f}; both orders "
            f"agree on {orders['share']:.1%}; {report['labels_per_second']:.1f} labels a second",
            flush=True,
        )
    print(f"\ntrue reward of {num_prompts} sampled answers, mean and 95 % t interval over {seeds} seeds")
    for policy in POLICIES:
        gain = [after - before for after, before in zip(found[policy], found["sft"], strict=True)]
        print(f"  {policy:5} {spread(found[policy])}   gain {spread(gain)}")
    lead = [soft - hard for soft, hard in zip(found["soft"], found["hard"], strict=True)]
    print(f"  soft - hard {spread(lead)}, {sum(value > 0 for value in lead)} of {seeds} seeds above 0")
    risen = spread([after - before for after, before in zip(found["soft"], found["sft"], strict=True)])
    figure = f"true reward {risen} by DPO on soft labels; soft less hard {spread(lead)}"
    mean, _, half = risen.partition(" ± ")
    print(json.dumps({"figure": figure, "met": float(mean) > float(half or 0)}))


def replay(chains: Path, pairs: Path, out: Path, seeds: int) -> None:
    files = ", ".join(str(path.resolve()) for path in sorted(chains.glob("samples_*.jsonl")))
    before, after = [], []
    for seed in range(seeds):
        directory = (out / f"seed{seed}").resolve()
        directory.mkdir(parents=True, exist_ok=True)
        recipe = directory / "recipe.yaml"
        recipe.write_text(REPLAY.format(seed=seed, hh=pairs.resolve(), chains=files))
        run(recipe, directory)
        run_dir = directory / "runs/replay/rlaif-sft"
        losses = [
            row["eval_loss"]
            for row in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
            if "eval_loss" in row
        ]
        stage = json.loads((run_dir / "stage.json").read_text())
        held = stage["eval_lengths"]["num_rows"]
        before.append(losses[0])
        after.append(losses[-1])
        trained = stage["lengths"]["num_rows"]
        print(
            f"seed {seed}: {trained} revisions trained, {held} of other prompts held out: loss {losses[0]:.3f} -> "
            f"{losses[-1]:.3f} nats per token, perplexity {math.exp(losses[0]):.1f} -> {math.exp(losses[-1]):.1f}",
            flush=True,
        )
    fall = [first - last for first, last in zip(before, after, strict=True)]
    print(f"held-out loss before {spread(before)}, after {spread(after)}, fall {spread(fall)} over {seeds} splits")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    small = commands.add_parser("miniature")
    small.add_argument("out", type=Path)
    small.add_argument("--seeds", type=int, default=3)
    small.add_argument("--prompts", type=int, default=200)
    real = commands.add_parser("replay")
    real.add_argument("chains", type=Path)
    real.add_argument("pairs", type=Path)
    real.add_argument("out", type=Path)
    real.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    if given.command == "miniature":
        miniature(given.out, given.seeds, given.prompts)
    else:
        replay(given.chains, given.pairs, given.out, given.seeds)


if __name__ == "__main__":
    main()
