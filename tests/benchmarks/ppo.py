"""PPO side by side with the last PPOTrainer that TRL had, trl 1.12's experimental one, in its own environment.

A 13 M GPT-2, 128 episodes, batches of 16, 4 epochs, 32 new tokens, one thread. Training alone is timed, on the wall and
in the processor's seconds, which a busy machine does not stretch; the peak is the whole process's.
Make the other environment once:

    python3 -m venv /tmp/trl112 && /tmp/trl112/bin/pip install torch==2.13.0 && /tmp/trl112/bin/pip install trl==1.12.0
    python tests/benchmarks/ppo.py --trl /tmp/trl112/bin/python [--runs 3]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

EPISODES = int(os.environ.get("PPO_BENCH_EPISODES", "128"))
BATCH, EPOCHS, NEW_TOKENS = 16, 4, 32
# name -> (lora section, keys of the ppo stage); the first has TRL's four models, the others share.
OURS = {
    "four models": ("", "reward: ./reward\n  value_init: reward"),
    "three models, critic head": ("", "reward: ./reward\n  value_init: head"),
    "one base, critic adapter": ("lora: {r: 16, alpha: 32}", "reward: ./runs/bench/rm\n  value_init: reward"),
    "one base, critic head": ("lora: {r: 16, alpha: 32}", "reward: ./runs/bench/rm\n  value_init: policy"),
}
RECIPE = """
name: bench
model: {{path: ./policy}}
launch: {{device: cpu}}
{lora}
rm:
  data: {{path: builtin:preferences, max_rows: 16}}
  batch_size: 8
  max_steps: 1
  samples: {{num: 0}}
ppo:
  data: {{path: builtin:prompts, max_rows: 128}}
  {keys}
  batch_size: {batch}
  micro_batch_size: {batch}
  ppo_epochs: {epochs}
  max_new_tokens: {tokens}
  total_episodes: {episodes}
  learning_rate: 3e-6
  lr_scheduler_type: constant
  save_strategy: "no"
  gradient_checkpointing: false
  samples: {{num: 0}}
"""


def prepare(directory: Path) -> None:
    """Write the policy, a reward model of its size, the prompts as tokens, and reward adapters on the policy's base."""
    import torch
    from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

    from alignkit.launch import launch_stage
    from alignkit.models.builtin import builtin_tokenizer
    from alignkit.recipe import load_recipe, resolve
    from alignkit.train.ppo import build

    tokenizer = builtin_tokenizer()
    config = GPT2Config(
        vocab_size=512, n_positions=256, n_embd=512, n_layer=4, n_head=8, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    policy = GPT2LMHeadModel(config)
    print(f"{sum(p.numel() for p in policy.parameters()) / 1e6:.1f} M parameters", file=sys.stderr)
    policy.save_pretrained(directory / "policy")
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory / "reward")
    tokenizer.chat_template = (
        Path(build.__code__.co_filename).parents[1] / "models/templates/chatml.jinja"
    ).read_text()
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(directory / name)
    for name, (lora, keys) in OURS.items():
        path = directory / f"{name}.yaml"
        path.write_text(
            RECIPE.format(lora=lora, keys=keys, batch=BATCH, epochs=EPOCHS, tokens=NEW_TOKENS, episodes=EPISODES)
        )
    launch_stage(resolve(load_recipe(directory / "one base, critic head.yaml"), "rm"))
    from alignkit.data import DataReport, Rejects, read_rows
    from alignkit.models.chat import Chat

    stage = resolve(load_recipe(directory / "four models.yaml"), "ppo")
    rows = read_rows(stage, stage.options.data, report=DataReport(), rejects=Rejects())
    ids = Chat(tokenizer).encode_prompts([row.prompt for row in rows])
    (directory / "prompts.json").write_text(json.dumps(ids))


def train_ours(recipe: Path) -> tuple[float, float]:
    """Train and return the seconds of training alone, on the wall and of the processor."""
    from alignkit.launch.environment import prepare_environment
    from alignkit.recipe import load_recipe, resolve
    from alignkit.runs.layout import RunDir
    from alignkit.train.ppo import build

    prepare_environment(tiny=False)
    run = RunDir(recipe.parent / f"run-{os.getpid()}")
    run.path.mkdir()
    built = build(resolve(load_recipe(recipe), "ppo"), run)
    began = _clocks()
    built.trainer.train()
    ended = _clocks()
    assert built.trainer.state.global_step == EPISODES // BATCH * EPOCHS
    return ended[0] - began[0], ended[1] - began[1]


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def train_theirs(directory: Path) -> tuple[float, float]:
    """Train the same with trl 1.12; its value model starts from the reward model, as ours."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(directory / "policy", padding_side="left")
    config = PPOConfig(
        output_dir=str(directory / f"theirs-{os.getpid()}"),
        total_episodes=EPISODES, per_device_train_batch_size=BATCH, gradient_accumulation_steps=1, num_mini_batches=1,
        num_ppo_epochs=EPOCHS, response_length=NEW_TOKENS, local_rollout_forward_batch_size=BATCH, temperature=1.0,
        learning_rate=3e-6, lr_scheduler_type="constant", kl_coef=0.05, stop_token="eos", num_sample_generations=0,
        use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", seed=0,
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": json.loads((directory / "prompts.json").read_text())})
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(directory / "policy"),
        ref_model=AutoModelForCausalLM.from_pretrained(directory / "policy"),
        reward_model=AutoModelForSequenceClassification.from_pretrained(directory / "reward", num_labels=1),
        value_model=AutoModelForSequenceClassification.from_pretrained(directory / "reward", num_labels=1),
        train_dataset=data,
        eval_dataset=data.select(range(2)),
    )
    began = _clocks()
    trainer.train()
    ended = _clocks()
    return ended[0] - began[0], ended[1] - began[1]


def worker(name: str, directory: Path) -> None:
    os.chdir(directory)
    wall, processor = train_theirs(directory) if name == "trl" else train_ours(directory / f"{name}.yaml")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {"wall": EPISODES / wall, "processor": EPISODES / processor, "peak_megabytes": peak}
    print("RESULT " + json.dumps(result))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", default="/tmp/trl112/bin/python", help="Python of the environment with trl 1.12")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker[0], Path(options.worker[1]))
        return 0
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("trl", *OURS)}
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    with tempfile.TemporaryDirectory(prefix="alignkit-ppo-") as place:
        os.chdir(place)
        prepare(Path(place))
        for number in range(options.runs):
            for name in found:
                python = options.trl if name == "trl" else sys.executable
                variables = {**os.environ, **quiet}
                if name == "trl":
                    variables.pop("PYTHONPATH", None)
                done = subprocess.run(
                    [python, __file__, "--worker", name, place], env=variables, capture_output=True, text=True
                )
                line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
                if line is None:
                    raise RuntimeError(f"{name} failed:\n{done.stderr[-4000:]}")
                found[name].append(json.loads(line.removeprefix("RESULT ")))
                print(f"  {number} {name}: {line}", file=sys.stderr, flush=True)
        os.chdir("/")
    keys = {"wall": "episodes/s", "processor": "episodes/processor s", "peak_megabytes": "peak MB"}
    print("| | " + " | ".join(f"{title} | x TRL" for title in keys.values()) + " |\n|---" + "|---" * 6 + "|")
    for name, results in found.items():
        cells = []
        for key in keys:
            ratios = [mine[key] / other[key] for mine, other in zip(results, found["trl"], strict=True)]
            cells += [f"{statistics.median(row[key] for row in results):.2f}", f"{statistics.median(ratios):.2f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
