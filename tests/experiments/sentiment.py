"""Controlled sentiment with PPO (Ziegler 2019, section 3.1.1): realised KL against its target, reward, and collapse.

    python tests/experiments/sentiment.py [--data ../shared/data/sentence-polarity] [--out runs/sentiment] [--seeds 3]

A small GPT-2 answers beginnings of movie-review sentences with exactly 24 tokens, as the paper's models do; the reward
is the log-odds of a classifier trained on half of the labels, the judge one trained on the other half (`polarity.py`).
Every stage runs through the command line, in processes forked from one that has loaded the libraries. One setting
serves all targets; target 0 stands for kl_coef 0.

Criteria, over 3 seeds: (a) the KL of the last third of the rollouts lies within 15 % of kl_target, for 3, 6 and 10;
(b) reward and held-out reward rise by more than their 95 % t interval; (c) with kl_coef 0 distinct-2 falls below that
of every run with a target, and the monitor warns. Prints what came out, met or not.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from polarity import World, answer, distinct_2, interval, prepare_world, run_stage

DATA = Path(__file__).parents[3] / "shared/data/sentence-polarity"  # beside the checkout
RECIPE = """
name: sentiment
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
  learning_rate: {rate}
  critic_learning_rate: 2e-3
  lr_scheduler_type: constant
  warmup_steps: 0
  kl_coef: {coef}
  {adaptive}
  total_episodes: {episodes}
  reward_normalize: gain_and_bias
  save_strategy: 'no'
  logging_steps: 4
  samples: {{num: 8, max_new_tokens: 24}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=Path("runs/sentiment"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--targets", type=float, nargs="+", default=[3, 6, 10, 0])
    parser.add_argument("--rollouts", type=int, default=72)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--coef", type=float, default=3.0, help="times 1 / target: where kl_coef starts")
    parser.add_argument("--horizon", type=int, default=500)
    parser.add_argument("--batch", type=int, default=64, help="answers of a rollout")
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    world = prepare_world(options.data, options.out.resolve())
    before = answer(world.model, world.held_out)
    reward, judged = world.score(world.held_out, before), world.judge(world.held_out, before)
    print("classifiers: accuracy {:.3f} (reward) and {:.3f} (judge) on the other half".format(*world.accuracies))
    print(f"start: reward {statistics.mean(reward):.2f}, held-out reward {statistics.mean(judged):.2f}, "
          f"distinct-2 {distinct_2(before):.2f}", flush=True)  # fmt: skip
    found: dict[float, list[dict[str, float]]] = {target: [] for target in options.targets}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for target in options.targets:
            found[target].append(run_once(world, options, target, seed))
            values = ", ".join(f"{name} {value:.2f}" for name, value in found[target][-1].items())
            print(f"kl target {target:g}, seed {seed}: {values}", flush=True)
    print("\nkl target | reward after   | held-out reward | KL, last third | off target | distinct-2     | warned")
    for target, runs in found.items():
        columns = {name: interval([run[name] for run in runs]) for name in ("reward", "judge", "kl", "distinct")}
        off = " ".join(f"{run['kl'] / target - 1:+.0%}" for run in runs) if target else "-"
        warned = f"{int(sum(run['warned'] for run in runs))} of {len(runs)}"
        print(f"{target or 'kl_coef 0':>9} | {columns['reward']:14} | {columns['judge']:15} | {columns['kl']:14} | "
              f"{off:>10} | {columns['distinct']:14} | {warned}")  # fmt: skip
    start_reward, start_judge = statistics.mean(reward), statistics.mean(judged)
    leashed = {target: runs for target, runs in found.items() if target}
    near = all(abs(run["kl"] / target - 1) <= 0.15 for target, runs in leashed.items() for run in runs)
    rose = all(min(run["reward"] for run in runs) > start_reward and min(run["judge"] for run in runs) > start_judge
               for runs in leashed.values())  # fmt: skip
    lowest = min(run["distinct"] for runs in leashed.values() for run in runs)
    fell = all(run["distinct"] < lowest and run["warned"] for run in found.get(0, []))
    figure = "KL " + ", ".join(interval([run["kl"] for run in runs], digits=1).strip() for runs in leashed.values())
    figure += f" nats; reward {start_reward:.2f} to "
    figure += ", ".join(interval([run["reward"] for run in runs], digits=1).strip() for runs in leashed.values())
    print(json.dumps({"figure": figure + (", collapse without KL" if fell else ""), "met": near and rose and fell}))


def run_once(world: World, options: argparse.Namespace, target: float, seed: int) -> dict[str, float]:
    """Train one run, unless it is finished, and return what it came to."""
    folder = world.out / f"target-{target:g}-seed-{seed}"
    world.place_scorers(folder)
    recipe = RECIPE.format(
        seed=seed,
        start=world.model,
        prompts=world.prompts,
        coef=round(options.coef / target, 3) if target else 0,
        adaptive=f"kl_target: {target:g}\n  kl_horizon: {options.horizon}" if target else "keep_checkpoints: 1",
        rate=options.rate,
        batch=options.batch,
        episodes=options.batch * options.rollouts,
    )
    (folder / "sentiment.yaml").write_text(recipe)
    run_stage(folder, "ppo", "-r", "sentiment.yaml", "--trust-code")  # a finished run is not trained again
    run = folder / "runs" / "sentiment" / "ppo"
    after = answer(run / "model", world.held_out)
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    kls = [row["objective/kl"] for row in rows if "objective/kl" in row]
    return {
        "reward": statistics.mean(world.score(world.held_out, after)),
        "judge": statistics.mean(world.judge(world.held_out, after)),
        "kl": statistics.mean(kls[-(len(kls) // 3) :]),
        "distinct": distinct_2(after),
        "warned": float("the reward rose" in (folder / "log.txt").read_text()),
    }


if __name__ == "__main__":
    main()
