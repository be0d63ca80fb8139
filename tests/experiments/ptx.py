"""PPO-ptx (InstructGPT, eq. 2): how much of the language-modelling loss that PPO gives away does `ptx:` keep?

    python tests/experiments/ptx.py [--data ../shared/data/sentence-polarity] [--out runs/ptx] [--seeds 3] [--coef 1]

The world is that of `sentiment.py`: a small GPT-2 pre-trained on movie-review sentences, rewarded for positive ones.
Both arms run with the same seeds and the same weak KL coefficient; they differ in `ptx:` on the pre-training text only.
Every sixth rollout is a checkpoint; each is judged by its reward on 512 beginnings and its loss on the 512 sentences
kept out, in nats a token.

Matched reward: for each seed, the highest reward that both arms have reached at a checkpoint; each arm's loss there is
interpolated between the two checkpoints around its first crossing. Criterion: over the seeds, the mean share kept,
1 - (loss given away with ptx) / (loss given away without), is at least a half. Prints what came out, met or not.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from polarity import World, answer, interval, prepare_world, run_stage

DATA = Path(__file__).parents[3] / "shared/data/sentence-polarity"  # beside the checkout
RECIPE = """
name: ptx
seed: {seed}
model: {{path: {start}}}
ppo:
  data: {prompts}
  reward: {{function: "sentiment_reward:score"}}
  gold: {{function: "sentiment_judge:score"}}
  max_new_tokens: 24
  min_new_tokens: 24
  batch_size: {batch}
  micro_batch_size: {batch}
  ppo_epochs: 4
  gradient_checkpointing: false
  value_init: policy
  learning_rate: 3e-4
  critic_learning_rate: 3e-3
  lr_scheduler_type: constant
  warmup_steps: 0
  kl_coef: {kl_coef}
  total_episodes: {episodes}
  reward_normalize: gain_and_bias
  save_steps: {every}
  keep_checkpoints: 100
  logging_steps: 4
  samples: {{num: 0}}
  {ptx}
"""
ROLLOUTS_PER_CHECKPOINT = 6


def measure_loss(model_dir: Path, start: Path, texts: list[str]) -> float:
    """Return the mean loss in nats a token, each sentence read from its first token to the eos after it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    rows = [[0, *tokenizer(text).input_ids, 0][:64] for text in texts]  # 0 is eos, which precedes a text in training
    total, count = 0.0, 0
    with torch.no_grad():
        for first in range(0, len(rows), 64):
            part = [torch.tensor(row) for row in rows[first : first + 64]]
            ids = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=1)
            labels = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=-100)[:, 1:]
            logits = model(input_ids=ids, attention_mask=(ids != 1).long()).logits[:, :-1]
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
            count += int((labels != -100).sum())
    return total / count


def judge(world: World, model_dir: Path) -> tuple[float, float]:
    """Return reward and held-out loss of a model."""
    answers = answer(model_dir, world.held_out, tokenizer_dir=world.model)
    reward = statistics.mean(world.score(world.held_out, answers))
    return reward, measure_loss(model_dir, world.model, world.held_out_text)


def train_arm(world: World, options: argparse.Namespace, arm: str, seed: int) -> list[tuple[float, float]]:
    """Train one arm, unless it is finished; return reward and loss at its checkpoints, oldest first."""
    folder = world.out / f"{arm}-seed-{seed}"
    world.place_scorers(folder)
    ptx = f"ptx: {{data: {world.text}, coef: {options.coef}, batch_size: 32}}"
    recipe = RECIPE.format(
        seed=seed,
        start=world.model,
        prompts=world.prompts,
        kl_coef=options.kl_coef,
        batch=options.batch,
        episodes=options.batch * options.rollouts,
        every=4 * ROLLOUTS_PER_CHECKPOINT,
        ptx=ptx if arm == "ptx" else "",
    )
    (folder / "ptx.yaml").write_text(recipe)
    run_stage(folder, "ppo", "-r", "ptx.yaml", "--trust-code")
    checkpoints = (folder / "runs/ptx/ppo/checkpoints").glob("checkpoint-*")
    return [judge(world, path) for path in sorted(checkpoints, key=lambda path: int(path.name.split("-")[1]))]


def loss_at(curve: list[tuple[float, float]], reward: float) -> float:
    """Return the loss where the reward is first reached, between the two points around it."""
    for (low, loss_before), (high, loss_after) in zip(curve, curve[1:], strict=False):
        if low < reward <= high:
            return loss_before + (loss_after - loss_before) * (reward - low) / (high - low)
    raise ValueError(f"reward {reward:.2f} was never reached")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=Path("runs/ptx"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=36)
    parser.add_argument("--coef", type=float, default=1.0, help="of ptx")
    parser.add_argument("--kl-coef", type=float, default=0.05)
    parser.add_argument("--batch", type=int, default=128, help="answers of a rollout")
    options = parser.parse_args()
    world = prepare_world(options.data, options.out.resolve())
    start = judge(world, world.model)
    print(f"start: reward {start[0]:.2f}, held-out loss {start[1]:.3f} nats a token", flush=True)
    rows: list[dict[str, float]] = []
    for seed in range(options.seeds):
        curves = {arm: [start, *train_arm(world, options, arm, seed)] for arm in ("plain", "ptx")}
        for arm, curve in curves.items():
            points = ", ".join(f"{reward:.2f}/{loss:.3f}" for reward, loss in curve)
            print(f"seed {seed}, {arm}: reward/loss {points}")
        matched = min(max(reward for reward, _ in curve) for curve in curves.values())
        given = {arm: loss_at(curve, matched) - start[1] for arm, curve in curves.items()}
        rows.append({"reward": matched, **given, "kept": 1 - given["ptx"] / given["plain"]})
        print(f"seed {seed}: {json.dumps({name: round(value, 3) for name, value in rows[-1].items()})}", flush=True)
    print("\nmatched reward | loss given away by PPO | by PPO-ptx | share kept")
    columns = [interval([row[name] for row in rows], digits=3) for name in ("reward", "plain", "ptx", "kept")]
    print(" | ".join(columns))
    mean = statistics.mean(row["kept"] for row in rows)
    figure = f"PPO-ptx keeps {columns[3].strip()} of the loss that PPO gives away"
    print(json.dumps({"figure": figure, "met": mean >= 0.5}))


if __name__ == "__main__":
    main()
