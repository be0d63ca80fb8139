"""GRPO side by side with TRL's GRPOTrainer, at equal settings in the same environment.

The 13 M GPT-2 of ppo.py, 128 answers of 32 tokens, 16 a step in groups of 8, the KL in the loss against a reference,
one thread. Every answer has all its tokens on both sides, so that both sample and learn from equally many; training
alone is timed, on the wall and in the processor's seconds.

    python tests/benchmarks/grpo.py [--runs 3]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from ppo import clocks, compare, peak_megabytes, read_results, write_policy
from table import Row
from timing import Command, alternate

BATCH, GROUP, NEW_TOKENS = 16, 8, 32
RATE, BETA = 3e-6, 0.04
RECIPE = f"""
name: bench
model: {{{{path: ./policy}}}}
launch: {{{{device: cpu}}}}
ppo:
  preset: grpo
  data: rows.jsonl
  reward: {{{{function: "reward:score"}}}}
  batch_size: {BATCH}
  micro_batch_size: {BATCH}
  num_generations: {GROUP}
  max_new_tokens: {NEW_TOKENS}
  min_new_tokens: {NEW_TOKENS}
  kl_coef: {BETA}
  max_steps: {{steps}}
  learning_rate: {RATE}
  lr_scheduler_type: constant
  save_strategy: "no"
  gradient_checkpointing: false
  samples: {{{{num: 0}}}}
"""
REWARD = '''
def score(prompts, completions, **_):
    """The share of letters that come only once."""
    texts = [completion[0]["content"] for completion in completions]
    return [len(set(text)) / max(len(text), 1) for text in texts]
'''


def prepare(directory: Path, answers: int) -> None:
    """Write the policy, the prompts, the reward and our recipe."""
    directory.mkdir(exist_ok=True)
    write_policy(directory)
    texts = (f"Count from {number} to {number + 9}" for number in range(answers // GROUP))
    rows = ({"prompt": [{"role": "user", "content": text}]} for text in texts)
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "reward.py").write_text(REWARD)
    (directory / "ours.yaml").write_text(RECIPE.format(steps=answers // BATCH))


def build_ours(answers: int) -> Any:
    from alignkit.cli import quiet_libraries
    from alignkit.recipe import load_recipe, resolve
    from alignkit.runs.directory import RunDir
    from alignkit.train.ppo import build

    quiet_libraries()
    run = RunDir(Path(f"run-{os.getpid()}").absolute())
    run.path.mkdir()
    return build(resolve(load_recipe(Path("ours.yaml")), "ppo", trust_code=True), run).trainer


def build_theirs(answers: int) -> Any:
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    functions: dict[str, Any] = {}
    exec(REWARD, functions)
    config = GRPOConfig(
        output_dir=f"theirs-{os.getpid()}", per_device_train_batch_size=BATCH, num_generations=GROUP,
        max_completion_length=NEW_TOKENS, generation_kwargs={"min_new_tokens": NEW_TOKENS}, temperature=1.0, beta=BETA,
        loss_type="grpo", max_steps=answers // BATCH, learning_rate=RATE, lr_scheduler_type="constant",
        logging_strategy="no", save_strategy="no", gradient_checkpointing=False, use_cpu=True, bf16=False,
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    return GRPOTrainer(
        AutoModelForCausalLM.from_pretrained("policy"), functions["score"], args=config,
        train_dataset=load_dataset("json", data_files="rows.jsonl", split="train"),
    )  # fmt: skip


def worker(name: str, directory: Path, answers: int) -> None:
    os.chdir(directory)
    trainer = (build_ours if name == "alignkit" else build_theirs)(answers)
    began = clocks()
    trainer.train()
    wall, processor = (ended - start for start, ended in zip(began, clocks(), strict=True))
    tokens = trainer._total_train_tokens if name == "alignkit" else trainer.state.num_input_tokens_seen
    result = {"wall": answers / wall, "processor": answers / processor, "peak_megabytes": peak_megabytes()}
    print("RESULT " + json.dumps(result | {"tokens": tokens, "steps": trainer.state.global_step}))


def train_both(directory: Path, *, answers: int, runs: int) -> dict[str, list[dict[str, float]]]:
    """Train with each in fresh processes, in turn; what each round measured."""
    prepare(directory, answers)
    path = os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    commands = [
        Command(name, [sys.executable, __file__, "--worker", name, str(directory), str(answers)], directory,
                variables=variables)
        for name in ("trl", "alignkit")
    ]  # fmt: skip
    found = {name: read_results(each) for name, each in alternate(commands, runs=runs, warmups=0, at_once=2).items()}
    work = {(int(each["tokens"]), int(each["steps"])) for rounds in found.values() for each in rounds}
    if len(work) > 1:
        raise RuntimeError(f"tokens and steps differ: {work}")
    return found


def measure_grpo(directory: Path, *, runs: int) -> list[Row]:
    """The rows of the table."""
    found = train_both(directory, answers=128, runs=runs)
    rows = []
    for what, key, unit, bar in (
        ("grpo 13.0 M", "processor", "answers/processor s", ">= 1.0"),
        ("grpo 13.0 M, peak memory", "peak_megabytes", "MiB", "<= 1.0"),
    ):
        mine, other, ratio = compare(found, "alignkit", key)
        rows.append(Row(what, f"{mine:,.2f} {unit}", f"{other:,.2f} {unit}", "trl's GRPOTrainer", ratio, bar))
    return rows


if __name__ == "__main__":
    if "--worker" in sys.argv:
        worker(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        with tempfile.TemporaryDirectory(prefix="alignkit-grpo-") as place:
            runs = int(sys.argv[sys.argv.index("--runs") + 1]) if "--runs" in sys.argv else 3
            for row in measure_grpo(Path(place), runs=runs):
                print(row)
