"""One optimisation whatever the number of processes: equal curves, equal weights, checkpoints that all can read.

Real processes, joined by gloo: one, two with DDP, two with FSDP (really sharded, on the CPU). Each group of them
trains a list of stages, so that the libraries are imported once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forks import Forks
from ranked_runs import largest_difference, outcome, read_curve, start, weight_difference

STRATEGIES = ("ddp", "fsdp")
RUNS = [("sft", "full"), ("rm", "full"), ("dpo", "full"), ("dpo", "lora")]  # method, mode
STEPS = 6
# 8 rows a step in two micro batches, or in one on each of two processes; the last batch of an epoch is incomplete.
COMMON = (
    f"eval: 0.2, batch_size: 8, micro_batch_size: 4, max_steps: {STEPS}, learning_rate: 1e-3, logging_steps: 1, "
    "eval_strategy: steps, eval_steps: 3, save_steps: 3, samples: {num: 2, max_new_tokens: 6}"
)
RECIPE = f"""
name: ranks
model: {{path: builtin:tiny-llama}}
sft: {{data: {{path: builtin:instructions, max_rows: 42}}, {COMMON}}}
rm: {{data: {{path: builtin:ranked, max_rows: 30}}, normalize: bias, center_rewards_coefficient: 0.1, {COMMON}}}
dpo: {{data: {{path: builtin:preferences, max_rows: 42}}, {COMMON}}}
"""
LORA = "lora: {r: 4, alpha: 8}\n"


def write_recipes(directory: Path) -> None:
    (directory / "full.yaml").write_text(RECIPE)
    (directory / "lora.yaml").write_text(RECIPE + LORA)
    (directory / "dropout.yaml").write_text(RECIPE + "lora: {r: 4, alpha: 8, dropout: 0.2}\n")


def job(directory: Path, strategy: str, method: str, mode: str, **more: Any) -> dict[str, Any]:
    out = directory / strategy / f"{method}-{mode}"
    return {"recipe": str(directory / f"{mode}.yaml"), "stage": method, "out": str(out)} | more


RESUMES = [
    # from, to, method, mode
    ("one", "fsdp", "sft", "full"), ("one", "fsdp", "dpo", "lora"), ("fsdp", "fsdp", "sft", "full"),
    ("one", "ddp", "sft", "full"), ("one", "ddp", "dpo", "lora"), ("fsdp", "ddp", "rm", "full"),
    ("ddp", "one", "sft", "full"), ("fsdp", "one", "dpo", "lora"), ("fsdp", "one", "rm", "full"),
]  # fmt: skip


def resumes_to(directory: Path, strategy: str) -> list[dict[str, Any]]:
    """Return the jobs that go on with a strategy from the third step of another one's run."""
    return [
        job(directory, f"{before}-to-{after}", method, mode)
        | {"from": str(directory / before / f"{method}-{mode}"), "step": 3}
        for before, after, method, mode in RESUMES
        if after == strategy
    ]


@pytest.fixture(scope="module")
def runs(forks: Forks, shared_directory: Callable) -> Path:
    """Train everything that the tests of this module look at; return the directory of the runs."""
    return shared_directory("ranks", lambda directory: train_all(forks, directory))


def train_all(forks: Forks, directory: Path) -> None:
    write_recipes(directory)
    curves = {
        strategy: [job(directory, strategy, method, mode) for method, mode in RUNS]
        for strategy in ("one", *STRATEGIES)
    }
    start(forks, directory, "one", curves["one"])
    start(forks, directory, "fsdp", [*curves["fsdp"], *resumes_to(directory, "fsdp")])
    stopped = job(directory, "stopped", "sft", "dropout", terminate={"rank": 1, "step": 2})
    stopped["set"] = ["sft.save_steps=100"]
    other = job(directory, "other", "sft", "full", rank_set={"1": ["seed=1"]})
    broken = job(directory, "broken", "sft", "full", set=["sft.learning_rate=1e25", "sft.max_grad_norm=0"])
    unread = job(directory, "unread", "sft", "full", set=["sft.special_tokens_in_text=error"])
    unread["recipe"] = str(directory / "unread.yaml")
    Path(unread["recipe"]).write_text(
        RECIPE.replace("{path: builtin:instructions, max_rows: 42}", str(directory / "rows.jsonl"))
    )
    (directory / "rows.jsonl").write_text('{"prompt": "<|im_start|>", "completion": "x"}\n')
    start(
        forks,
        directory,
        "ddp",
        [
            *curves["ddp"],
            job(directory, "ddp", "sft", "dropout"),
            *resumes_to(directory, "ddp"),
            stopped,
            {name: value for name, value in stopped.items() if name != "terminate"},
            other,
            broken,
            unread,
        ],
    )
    start(forks, directory, "one", resumes_to(directory, "one"))


def test_every_method_has_one_curve_on_one_process_two_with_ddp_and_two_with_fsdp(runs: Path) -> None:
    for method, mode in RUNS:
        one = runs / "one" / f"{method}-{mode}"
        for strategy in STRATEGIES:
            found = largest_difference(one, runs / strategy / f"{method}-{mode}")
            weights = weight_difference(one, runs / strategy / f"{method}-{mode}")
            worst = max(found, key=lambda name: found[name])
            print(f"{method:4} {mode:5} {strategy:5} loss {found['loss']:.1e} weights {weights:.1e} "
                  f"worst {worst} {found[worst]:.1e}")  # fmt: skip
            assert found["loss"] < 1e-5 and found["grad_norm"] < 1e-4 and found["eval_loss"] < 1e-5, found
            assert found["num_tokens"] == 0 and max(found.values()) < 1e-3, found
            assert weights < 2e-5
        losses = [row["loss"] for row in read_curve(one) if "loss" in row]
        assert len(losses) == STEPS and len(set(losses)) > 3  # a curve, and one that moves


def test_every_strategy_leaves_the_same_files(runs: Path) -> None:
    for name in ("sft-full", "dpo-lora"):
        one = runs / "one" / name
        wanted = {str(path.relative_to(one)) for path in one.rglob("*") if path.is_file()}
        for strategy in STRATEGIES:
            run = runs / strategy / name
            found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
            assert {name for name in found if "rng_state" not in name} == {n for n in wanted if "rng_state" not in n}
            assert len([name for name in found if "rng_state" in name]) == 4  # two checkpoints of two ranks
            assert (run / "samples.jsonl").read_text() == (one / "samples.jsonl").read_text()
            assert read_config(run) == read_config(one)


def read_config(run: Path) -> dict[str, Any]:
    """Return the final model's configuration without paths and without the order of what is a set."""
    (path,) = [
        path for path in (run / "model").glob("*config.json") if path.name in ("config.json", "adapter_config.json")
    ]
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k != "base_model_name_or_path"}
    return kept | {"target_modules": sorted(kept.get("target_modules", ()))}


@pytest.mark.parametrize(("before", "after", "method", "mode"), RESUMES)
def test_a_run_goes_on_with_other_processes_as_if_nothing_had_happened(
    before: str, after: str, method: str, mode: str, runs: Path
) -> None:
    whole, resumed = runs / before / f"{method}-{mode}", runs / f"{before}-to-{after}" / f"{method}-{mode}"
    found = largest_difference(whole, resumed)
    assert found["loss"] < 1e-5 and max(found.values()) < 1e-3, found
    difference = weight_difference(whole, resumed)
    assert difference < 1e-5
    if before == after:
        assert difference == 0, "with the same processes it is the same to the last bit"


def test_sigterm_to_one_rank_stops_all_at_the_same_step_and_the_run_goes_on_exactly(runs: Path) -> None:
    # The same job ran twice: what it left the first time was overwritten by the second, but for the checkpoint's step.
    assert outcome(runs, "stopped/sft-dropout", 0)["step"] == STEPS
    run = runs / "stopped" / "sft-dropout"
    steps = sorted(int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("checkpoint-*"))
    assert steps[0] in (2, 3, 4, 5) and steps[-1] == STEPS  # the first one was written because of the signal
    assert weight_difference(run, runs / "ddp" / "sft-dropout") == 0  # to the last bit, dropout included


def test_ranks_that_were_given_different_recipes_refuse_to_start(runs: Path) -> None:
    for rank in range(2):
        found = outcome(runs, "other/sft-full", rank)
        assert found["error"] == "RunError" and "do not do the same work: recipe is" in found["text"]
        assert found["shared"] == (rank == 1)


def test_a_step_that_is_not_finite_stops_all_ranks_before_the_optimizer(runs: Path) -> None:
    for rank in range(2):
        found = outcome(runs, "broken/sft-full", rank)
        assert found["error"] == "NonFiniteError" and found["code"] == 3, found


def test_an_error_of_rank_0_is_the_error_of_all_ranks_and_told_once(runs: Path) -> None:
    first, second = (outcome(runs, "unread/sft-full", rank) for rank in range(2))
    assert first["error"] == second["error"] == "DataError" and "rows.jsonl:1" in second["text"]
    assert first["text"] == second["text"] and (first["shared"], second["shared"]) == (False, True)


PAIRS = "data: {path: builtin:preferences, max_rows: 42}"
ROWS = "data: {path: builtin:instructions, max_rows: 42}"
AUTO = COMMON.replace(" micro_batch_size: 4,", "")  # 8 rows in one process, 4 in each of two
START = f"sft: {{{ROWS}, {COMMON}}}\n"
LLAMA = "model: {path: builtin:tiny-llama}\n"
GPT2 = "model: {path: builtin:tiny-gpt2}\n"
MORE = {
    # name: (recipe, stage); the name says what differs from the recipes above
    "gpt2-sft": (f"{GPT2}sft: {{{ROWS}, {AUTO}}}", "sft"),
    "gpt2-lora-dpo": (f"{GPT2}{LORA}dpo: {{{PAIRS}, {AUTO}}}", "dpo"),
    "recomputed-lora-dpo": (f"{LLAMA}{LORA}dpo: {{{PAIRS}, gradient_checkpointing: true, {COMMON}}}", "dpo"),
    "packed-sft": (f"{LLAMA}sft: {{{ROWS}, packing: true, max_length: 256, {COMMON}}}", "sft"),
    "lm-sft": (
        f"{LLAMA}sft: {{data: {{path: builtin:reviews, max_rows: 60}}, objective: lm, max_length: 64, {COMMON}}}",
        "sft",
    ),
    "precomputed-dpo": (f"{LLAMA}dpo: {{{PAIRS}, precompute_ref_log_probs: true, {COMMON}}}", "dpo"),
    "precomputed-lora-dpo": (f"{LLAMA}{LORA}dpo: {{{PAIRS}, precompute_ref_log_probs: true, {COMMON}}}", "dpo"),
    "continued-dpo": (f"{LLAMA}{LORA}{START}dpo: {{start_from: sft, {PAIRS}, {COMMON}}}", "dpo"),
    "stacked-dpo": (f"{LLAMA}{LORA}{START}dpo: {{start_from: sft, adapter: stack, {PAIRS}, {COMMON}}}", "dpo"),
    "merged-dpo": (f"{LLAMA}{LORA}{START}dpo: {{start_from: sft, adapter: merge, {PAIRS}, {COMMON}}}", "dpo"),
    "cdpo-lora": (f"{LLAMA}{LORA}dpo: {{{PAIRS}, loss_type: cdpo, label_smoothing: 0.1, {COMMON}}}", "dpo"),
    "soft-dpo": (f"{LLAMA}dpo: {{data: ./soft.jsonl, {COMMON}}}", "dpo"),
    "sft-part-dpo": (f"{LLAMA}dpo: {{{PAIRS}, loss_type: [sigmoid, sft], loss_weights: [1.0, 0.5], {COMMON}}}", "dpo"),
    "kto": (f"{LLAMA}dpo: {{{PAIRS}, loss_type: kto, {AUTO}}}", "dpo"),
    "kto-lora": (f"{LLAMA}{LORA}dpo: {{{PAIRS}, loss_type: kto, {AUTO}}}", "dpo"),
    "lora-sft": (f"{LLAMA}{LORA}sft: {{{ROWS}, {COMMON}}}", "sft"),
    "lora-rm": (f"{LLAMA}{LORA}rm: {{data: {{path: builtin:ranked, max_rows: 30}}, {COMMON}}}", "rm"),
    "best-of-rm": (f"{LLAMA}rm: {{data: {{path: builtin:ranked, max_rows: 30}}, loss: best_of, {COMMON}}}", "rm"),
    "nf4-dpo": (f"model: {{path: builtin:tiny-llama, quantization: nf4}}\n{LORA}dpo: {{{PAIRS}, {COMMON}}}", "dpo"),
    "bf16-lora-sft": (f"model: {{path: builtin:tiny-llama, dtype: bfloat16}}\n{LORA}sft: {{{ROWS}, {COMMON}}}", "sft"),
    "mixed-lora-dpo": (f"{LLAMA}launch: {{mixed_precision: bf16}}\n{LORA}dpo: {{{PAIRS}, {COMMON}}}", "dpo"),
}


@pytest.mark.slow
def test_every_kind_of_reference_loss_and_precision_has_one_curve(forks: Forks, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"say {n}", "chosen": "yes" * (n % 4 + 1), "rejected": "no" * (n % 3 + 1),
         "label": (0.25, 0.75, 1.0)[n % 3]}
        for n in range(30)
    ]  # fmt: skip
    (tmp_path / "soft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, (recipe, _) in MORE.items():
        (tmp_path / f"{name}.yaml").write_text(f"name: more\n{recipe}")
    first = {"recipe": str(tmp_path / "continued-dpo.yaml"), "stage": "sft", "out": str(tmp_path / "runs/more/sft")}
    for strategy in ("one", *STRATEGIES):
        jobs = [
            {"recipe": str(tmp_path / f"{name}.yaml"), "stage": stage, "out": str(tmp_path / strategy / name)}
            for name, (_, stage) in MORE.items()
            if not (strategy == "fsdp" and "nf4" in name)
        ]
        start(forks, tmp_path, strategy, [first, *jobs] if strategy == "one" else jobs)
    for name in MORE:
        for strategy in STRATEGIES:
            if (tmp_path / strategy / name).exists():
                found = largest_difference(tmp_path / "one" / name, tmp_path / strategy / name)
                print(f"{name:24} {strategy:5} loss {found['loss']:.1e} eval {found['eval_loss']:.1e}")
                assert found["loss"] < 1e-3 and found["eval_loss"] < 1e-3, (name, strategy, found)


@pytest.mark.slow
def test_three_processes_have_the_curve_of_one(forks: Forks, tmp_path: Path) -> None:
    write_recipes(tmp_path)
    for strategy in ("one", "ddp"):
        more = {"set": ["sft.batch_size=12", "sft.micro_batch_size=2"]}
        start(forks, tmp_path, strategy, [job(tmp_path, strategy, "sft", "full", **more)], processes=3)
    found = largest_difference(tmp_path / "one" / "sft-full", tmp_path / "ddp" / "sft-full")
    assert max(found.values()) < 1e-4, found


@pytest.mark.slow
def test_the_best_weights_are_those_of_one_process_and_of_a_run_that_was_stopped(forks: Forks, tmp_path: Path) -> None:
    write_recipes(tmp_path)
    keys = {"keep_best": "-loss", "patience": 2, "evaluate_every": 1, "eval_steps": 1, "eval_share": "null",
            "save_steps": 1, "keep_checkpoints": 1, "learning_rate": 0.1, "lr_scheduler_type": "constant",
            "max_steps": 12, "adam_epsilon": 1e-5}  # fmt: skip
    # The epsilon keeps gradients that are nothing but rounding from steps of the whole rate.
    sets = ["evaluate={max_rows: 4, max_new_tokens: 4}", *(f"sft.{key}={value}" for key, value in keys.items())]
    one, *several = (job(tmp_path, strategy, "sft", "lora", set=sets) for strategy in ("one", *STRATEGIES, "stopped"))
    stopped = several.pop()
    start(forks, tmp_path, "one", [one])
    start(forks, tmp_path, "ddp", [several[0], stopped | {"terminate": {"rank": 1, "step": 1}}, stopped])
    start(forks, tmp_path, "fsdp", several[1:])
    whole = outcome(tmp_path, "one/sft-lora", 0)
    best, last = whole["metrics"]["kept_step"], whole["step"]
    assert last == best + 2 < 12  # two evaluations were no better
    measured = [row["step"] for row in read_curve(tmp_path / "one/sft-lora") if "eval_perplexity" in row]
    assert measured == list(range(last + 1))  # before the first step too
    for other in (*STRATEGIES, "stopped"):
        run = tmp_path / other / "sft-lora"
        found, ended = largest_difference(tmp_path / "one/sft-lora", run), outcome(tmp_path, f"{other}/sft-lora", 0)
        print(f"{other}: step {best} of {last}, {found}")
        assert (ended["step"], ended["metrics"]["kept_step"]) == (last, best)
        assert found["eval_loss"] < 1e-3 and found["loss"] < 1e-3, found
        assert weight_difference(tmp_path / "one/sft-lora", run) < 1e-3
    assert outcome(tmp_path, "stopped/sft-lora", 0)["metrics"] == outcome(tmp_path, "ddp/sft-lora", 0)["metrics"]
    assert weight_difference(tmp_path / "ddp/sft-lora", tmp_path / "stopped/sft-lora") == 0
    assert read_curve(tmp_path / "ddp/sft-lora") == read_curve(tmp_path / "stopped/sft-lora")
