"""PPO with QLoRA on the CPU: the reward rises, the nf4 base keeps its bytes, and one base stands beside four models.

    python tests/experiments/qlora.py [--data ../shared/data/sentence-polarity] [--out runs/qlora] [--seeds 3]

Rise: the GPT-2 of `sentiment.py` (0.3 M parameters), quantised to nf4, with adapters for policy, reward and critic on
that one base; the reward is an rm stage trained on pairs of the model's own answers that the reward classifier ranked,
the judge the classifier of the other half. Memory: a GPT-2 of 86 M parameters with random weights, one rollout of 8
answers of 16 tokens and two epochs, two answers at a time so that weights outweigh activations; each variant in fresh
processes, the peak is the whole process's, its libraries included.

Criteria: over 3 seeds both the reward and the judge rise by more than their 95 % t interval (mean of the last five
rollouts less that of the first five); the SHA-256 of every tensor of the base, its quantisation constants included, is
the same before and after, and so is that of its file. The memory is reported. Prints what came out, met or not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from polarity import World, answer, interval, prepare_world, run_stage

DATA = Path(__file__).parents[3] / "shared/data/sentence-polarity"  # beside the checkout
RISE = """
name: qlora
seed: {seed}
model: {{path: {base}, quantization: nf4}}
launch: {{device: cpu}}
lora: {{r: 16, alpha: 32, target_modules: all-linear}}
rm: {{data: {pairs}, batch_size: 32, micro_batch_size: 32, learning_rate: 1e-3, gradient_checkpointing: false,
     num_train_epochs: 2, save_strategy: 'no', eval_strategy: 'no', samples: {{num: 0}}}}
ppo:
  data: {prompts}
  reward: rm
  gold: {{function: "sentiment_judge:score"}}
  max_new_tokens: 24
  min_new_tokens: 24
  batch_size: 64
  micro_batch_size: 64
  gradient_checkpointing: false
  learning_rate: 2e-3
  lr_scheduler_type: constant
  warmup_steps: 0
  kl_coef: 0.1
  reward_normalize: gain_and_bias
  total_episodes: {episodes}
  save_strategy: 'no'
  samples: {{num: 0}}
"""
MEMORY = """
name: {name}
model: {{path: ./policy, quantization: {quantization}}}
launch: {{device: cpu}}
{lora}
rm: {{data: {{path: builtin:preferences, max_rows: 4}}, batch_size: 2, max_steps: 1, save_strategy: 'no',
     samples: {{num: 0}}}}
ppo:
  data: {{path: builtin:prompts, max_rows: 8}}
  reward: {reward}
  value_init: reward
  batch_size: 8
  micro_batch_size: 2
  ppo_epochs: 2
  max_new_tokens: 16
  total_episodes: 8
  gradient_checkpointing: false
  save_strategy: 'no'
  samples: {{num: 0}}
"""
LORA = "lora: {r: 16, alpha: 32}"
VARIANTS = {  # name -> (quantization, lora section, reward)
    "four-models-fp32": ("none", "", "./reward"),
    "one-base-fp32": ("none", LORA, "rm"),
    "one-base-nf4": ("nf4", LORA, "rm"),
}


def hash_base(model: Any) -> str:
    """Return the SHA-256 of all tensors that are no adapter's, with the constants of quantised ones."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if ".lora_" in name:
            continue
        parts = {"": tensor}
        if getattr(tensor, "quant_state", None) is not None:
            parts |= tensor.quant_state.as_dict(packed=True)
        for key in sorted(parts):
            if hasattr(parts[key], "detach"):
                digest.update(f"{name}.{key}".encode())
                digest.update(parts[key].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def peak_bytes() -> int:
    """Return the most memory of this process; `ru_maxrss` would be the parent's where that held more (vfork)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def train(recipe: Path) -> dict[str, Any]:
    """Train the ppo stage in this process; return hashes, peak memory, and what was logged."""
    from dataclasses import replace

    from alignkit.cli import quiet_libraries
    from alignkit.recipe import load_recipe, resolve
    from alignkit.runs.directory import RunDir
    from alignkit.train.ppo import build

    quiet_libraries()
    run = RunDir(recipe.parent / f"run-{os.getpid()}")
    run.path.mkdir()
    built = build(replace(resolve(load_recipe(recipe), "ppo"), trust_code=True), run)
    before = hash_base(built.trainer.model)
    built.trainer.train()
    peak = peak_bytes()
    after = hash_base(built.trainer.model)
    rows = [row for row in built.trainer.state.log_history if "objective/kl" in row]
    return {
        "before": before,
        "after": after,
        "peak_bytes": peak,
        "parts": [f"{part['what']}: {', '.join(part['roles'])}" for part in built.record["roles"]],
        **{name: [row[name] for row in rows] for name in ("reward", "gold", "objective/kl") if name in rows[0]},
    }


def train_fresh(recipe: Path) -> dict[str, Any]:
    """Do it in a fresh process, in the recipe's directory."""
    done = subprocess.run(
        [sys.executable, __file__, "--worker", str(recipe)], cwd=recipe.parent, capture_output=True, text=True
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        sys.exit(f"{recipe} failed:\n{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


def write_pairs(world: World, path: Path) -> None:
    """Let the starting model answer training prompts twice; the reward classifier ranks the two."""
    prompts = [json.loads(line)["prompt"] for line in world.prompts.read_text().splitlines()]
    first, second = (answer(world.model, prompts, seed=seed) for seed in (1, 2))
    scores = zip(world.score(prompts, first), world.score(prompts, second), strict=True)
    rows = [
        {"prompt": prompt, "chosen": one if left > right else two, "rejected": two if left > right else one}
        for prompt, one, two, (left, right) in zip(prompts, first, second, scores, strict=True)
        if left != right and one.strip() and two.strip()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def show_rise(world: World, options: argparse.Namespace) -> None:
    """Train with every seed and print the rise and the hashes."""
    pairs = world.out / "pairs.jsonl"
    write_pairs(world, pairs)
    found: dict[str, list[float]] = {"reward": [], "gold": []}
    same = True
    for seed in range(options.seeds):
        folder = world.out / f"seed-{seed}"
        world.place_scorers(folder)
        episodes = 64 * options.rollouts
        recipe = RISE.format(seed=seed, base=world.model, pairs=pairs, prompts=world.prompts, episodes=episodes)
        (folder / "qlora.yaml").write_text(recipe)
        run_stage(folder, "rm", "-r", "qlora.yaml")
        file = hashlib.sha256((world.model / "model.safetensors").read_bytes()).hexdigest()
        result = train_fresh(folder / "qlora.yaml")
        file_after = hashlib.sha256((world.model / "model.safetensors").read_bytes()).hexdigest()
        same = same and result["before"] == result["after"] and file == file_after
        for name, rises in found.items():
            rises.append(statistics.mean(result[name][-5:]) - statistics.mean(result[name][:5]))
        print(f"seed {seed}: {result['parts']}\n  base {result['before'][:16]} before, {result['after'][:16]} after; "
              f"reward {found['reward'][-1]:+.2f}, judge {found['gold'][-1]:+.2f}, "
              f"KL at the end {statistics.mean(result['objective/kl'][-5:]):.1f}", flush=True)  # fmt: skip
    words = {name: interval(values).strip() for name, values in found.items()}
    beyond = all(statistics.mean(found[name]) > float(rise.split("± ")[-1]) for name, rise in words.items())
    figure = f"reward {words['reward']}, judge {words['gold']}; base {'byte-identical' if same else 'CHANGED'}"
    print(json.dumps({"figure": figure, "met": beyond and same}), flush=True)


def show_memory(out: Path, runs: int) -> None:
    """Train each variant in fresh processes, in turn, and print the peaks."""
    import torch
    from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

    from alignkit.models import load
    from alignkit.models.start import builtin_tokenizer

    folder = out / "memory"
    folder.mkdir(exist_ok=True)
    tokenizer = builtin_tokenizer()
    config = GPT2Config(
        vocab_size=512, n_positions=256, n_embd=768, n_layer=12, n_head=12, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id, num_labels=1,
    )  # fmt: skip
    torch.manual_seed(0)
    policy = GPT2LMHeadModel(config)
    size = sum(p.numel() for p in policy.parameters()) / 1e6
    policy.save_pretrained(folder / "policy")
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    tokenizer.chat_template = (Path(load.__file__).parent / "templates/chatml.jinja").read_text()
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(folder / name)
    peaks: dict[str, list[float]] = {name: [] for name in VARIANTS}
    parts: dict[str, list[str]] = {}
    for name, (quantization, lora, reward) in VARIANTS.items():
        recipe = MEMORY.format(name=name, quantization=quantization, lora=lora, reward=reward)
        (folder / f"{name}.yaml").write_text(recipe)
        if lora:
            run_stage(folder, "rm", "-r", f"{name}.yaml")
    for _ in range(runs):
        for name in VARIANTS:
            result = train_fresh(folder / f"{name}.yaml")
            peaks[name].append(result["peak_bytes"] / 2**20)
            parts[name] = result["parts"]
    four = statistics.median(peaks["four-models-fp32"])
    print(f"\nGPT-2 of {size:.1f} M parameters\nvariant | peak MiB | x four models | holds")
    for name, found in peaks.items():
        peak = statistics.median(found)
        print(f"{name} | {peak:.0f} | {peak / four:.2f} | {'; '.join(parts[name])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--out", type=Path, default=Path("runs/qlora"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=40)
    parser.add_argument("--runs", type=int, default=3, help="processes of each variant in the comparison of memory")
    parser.add_argument("--only", choices=["rise", "memory"])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print("RESULT " + json.dumps(train(options.worker)))
        return
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.only != "rise":
        show_memory(out, options.runs)
    if options.only != "memory":
        show_rise(prepare_world(options.data, out), options)


if __name__ == "__main__":
    main()
