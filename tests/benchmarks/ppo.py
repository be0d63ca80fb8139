"""PPO side by side with the last PPOTrainer that TRL had, trl 1.12's experimental one, in its own environment.

A 13 M GPT-2, 64 episodes, batches of 16, 4 epochs, 32 new tokens, one thread. Training alone is timed, on the wall and
in the processor's seconds, which a busy machine stretches less; the peak is the whole process's. Both sides compute the
16 answers of a step PPO_BENCH_MICRO at a time: all of them unless told otherwise.
Make the other environment once, or name one with TRL112_PYTHON or --trl:

    python3 -m venv .venv-trl112 && .venv-trl112/bin/pip install torch==2.13.0
    .venv-trl112/bin/pip install trl==1.12.0
    python tests/benchmarks/ppo.py [--trl PYTHON] [--runs 3] [--only "one base, critic head"]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from table import Row
from timing import Command, Run, alternate

OTHER_PYTHON = Path(os.environ.get("TRL112_PYTHON", Path(__file__).parents[2] / ".venv-trl112/bin/python"))
EPISODES = int(os.environ.get("PPO_BENCH_EPISODES", "64"))
BATCH, EPOCHS, NEW_TOKENS = 16, 4, 32
MICRO_BATCH = int(os.environ.get("PPO_BENCH_MICRO", str(BATCH)))
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
  micro_batch_size: {micro}
  ppo_epochs: {epochs}
  max_new_tokens: {tokens}
  total_episodes: {episodes}
  learning_rate: 3e-6
  lr_scheduler_type: constant
  save_strategy: "no"
  gradient_checkpointing: false
  samples: {{num: 0}}
"""


def write_policy(directory: Path) -> tuple[Any, Any]:
    """Write the policy of 13 M parameters and its tokenizer, and give its config and the tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    import alignkit
    from alignkit.models.start import builtin_tokenizer

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
    tokenizer.chat_template = (Path(alignkit.__file__).parent / "models/templates/chatml.jinja").read_text()
    tokenizer.save_pretrained(directory / "policy")
    return config, tokenizer


def prepare(directory: Path) -> None:
    """Write the policy, a reward model of its size, the prompts as tokens, and reward adapters on the policy's base."""
    from transformers import AutoModelForSequenceClassification

    from alignkit.launch.run import launch_stage
    from alignkit.recipe import load_recipe, resolve

    config, tokenizer = write_policy(directory)
    config.num_labels = 1
    AutoModelForSequenceClassification.from_config(config).save_pretrained(directory / "reward")
    tokenizer.save_pretrained(directory / "reward")
    for name, (lora, keys) in OURS.items():
        path = directory / f"{name}.yaml"
        path.write_text(
            RECIPE.format(
                lora=lora,
                keys=keys,
                batch=BATCH,
                micro=MICRO_BATCH,
                epochs=EPOCHS,
                tokens=NEW_TOKENS,
                episodes=EPISODES,
            )  # fmt: skip
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
    from alignkit.cli import quiet_libraries
    from alignkit.recipe import load_recipe, resolve
    from alignkit.runs.directory import RunDir
    from alignkit.train.ppo import build

    quiet_libraries()
    run = RunDir(recipe.parent / f"run-{os.getpid()}")
    run.path.mkdir()
    built = build(resolve(load_recipe(recipe), "ppo"), run)
    began = clocks()
    built.trainer.train()
    ended = clocks()
    assert built.trainer.state.global_step == EPISODES // BATCH * EPOCHS
    return ended[0] - began[0], ended[1] - began[1]


def clocks() -> tuple[float, float]:
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
        total_episodes=EPISODES, per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=BATCH // MICRO_BATCH, num_mini_batches=1, num_ppo_epochs=EPOCHS,
        response_length=NEW_TOKENS, local_rollout_forward_batch_size=MICRO_BATCH, temperature=1.0,
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
    began = clocks()
    trainer.train()
    ended = clocks()
    return ended[0] - began[0], ended[1] - began[1]


def peak_megabytes() -> float:
    """Return the most memory of this process; `ru_maxrss` would be the parent's where that held more (vfork)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def worker(name: str, directory: Path) -> None:
    os.chdir(directory)
    wall, processor = train_theirs(directory) if name == "trl" else train_ours(directory / f"{name}.yaml")
    result = {"wall": EPISODES / wall, "processor": EPISODES / processor, "peak_megabytes": peak_megabytes()}
    print("RESULT " + json.dumps(result))


def measure(directory: Path, *, runs: int, python: str, names: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """Train with each in fresh processes, in turn; return what each round measured."""
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    before = os.getcwd()
    os.chdir(directory)
    prepare(directory)
    os.chdir(before)
    words = [__file__, "--worker"]
    commands = [
        Command(name, [python if name == "trl" else sys.executable, *words, name, str(directory)], directory,
                variables=quiet | ({"PYTHONPATH": ""} if name == "trl" else {}))
        for name in names
    ]  # fmt: skip
    return {name: read_results(each) for name, each in alternate(commands, runs=runs, warmups=0, at_once=2).items()}


def read_results(runs: Sequence[Run]) -> list[dict[str, float]]:
    """What the workers printed last."""
    lines = (line for run in runs for line in run.output.splitlines() if line.startswith("RESULT "))
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def compare(found: dict[str, list[dict[str, float]]], name: str, key: str) -> tuple[float, float, float]:
    """Return our median, TRL's median, and the median over rounds of ours by theirs."""
    ours, theirs = [row[key] for row in found[name]], [row[key] for row in found["trl"]]
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    return statistics.median(ours), statistics.median(theirs), statistics.median(ratios)


def measure_ppo(directory: Path, *, runs: int) -> list[Row]:
    """Return the rows of the table: episodes per processor second and peak memory of each variant beside TRL 1.12."""
    found = measure(directory, runs=runs, python=str(OTHER_PYTHON), names=("trl", *OURS))
    against, rows = "trl 1.12's PPOTrainer", []
    for name in OURS:
        mine, other, ratio = compare(found, name, "processor")
        what, bar = f"ppo 13.0 M, {name}", ">= 1.5" if name.startswith("one base") else ">= 1.3"
        unit = "episodes/processor s"
        rows.append(Row(what, f"{mine:.2f} {unit}", f"{other:.2f} {unit}", against, ratio, bar))
        mine, other, ratio = compare(found, name, "peak_megabytes")
        bar = "<= 0.6" if name.startswith("one base") else "<= 0.7"
        rows.append(Row(f"{what}, peak memory", f"{mine:,.0f} MiB", f"{other:,.0f} MiB", against, ratio, bar))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", default=str(OTHER_PYTHON), help="Python of the environment with trl 1.12")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", action="append", choices=list(OURS), help="measure this variant; repeatable")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker[0], Path(options.worker[1]))
        return 0
    names = ("trl", *(options.only or OURS))
    with tempfile.TemporaryDirectory(prefix="alignkit-ppo-") as place:
        found = measure(Path(place), runs=options.runs, python=options.trl, names=names)
    keys = {"wall": "episodes/s", "processor": "episodes/processor s", "peak_megabytes": "peak MiB"}
    print("| | " + " | ".join(f"{title} | x TRL" for title in keys.values()) + " |\n|---" + "|---" * 6 + "|")
    for name in names:
        cells = []
        for key in keys:
            mine, _, ratio = compare(found, name, key)
            cells += [f"{mine:.2f}", f"{ratio:.2f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
