"""Every mistake has its place, its value, what is accepted and the nearest right name; all are told at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from alignkit.errors import count_edits, find_nearest
from alignkit.recipe import Recipe
from alignkit.recipe.words import KTO_LOSSES, OWN_LOSSES

Load = Callable[..., Recipe]
Complain = Callable[..., list[str]]

NUM_LOSSES = 15 + len(OWN_LOSSES) + len(KTO_LOSSES)  # TRL's, and those beside them
METHODS = "sft, rm, dpo, ppo, critique, label, rlaif"


def test_all_problems_are_told_at_once_in_the_order_of_lines(complain: Complain) -> None:
    text = """\
name: my run
modle:
  path: gpt2
sft:
  data: x/y
  learning_rat: 1e-4
  max_length: true
  gradient_checkpointing: no
  batch_size: 16.0
  save_steps: "10"
  logging_steps: 1_000
  weight_decay: .nan
  optim: adamw_troch
  num_train_epochs:
dpo:
  beta: -1
  loss_type: sgimoid
  micro_batch_size: "4"
"""
    assert complain(text) == [
        "a.yaml:1: name is \"my run\"; use letters, digits, '.', '_' and '-' only",
        "a.yaml:1: model is missing; add `model: {path: ...}`",
        "a.yaml:2: modle is not a key of a recipe; did you mean model?",
        "a.yaml:6: sft.learning_rat is not a key of sft; did you mean learning_rate?",
        "a.yaml:7: sft.max_length is true; it must be a whole number of at least 2 (typical: 512 to 4096)",
        "a.yaml:8: sft.gradient_checkpointing is no; it must be true or false; write false",
        "a.yaml:9: sft.batch_size is 16.0; it must be a whole number of at least 1; write 16",
        'a.yaml:10: sft.save_steps is "10"; it must be a number greater than 0; take the quotes off',
        "a.yaml:11: sft.logging_steps is 1_000; it must be a number greater than 0; write 1000",
        "a.yaml:12: sft.weight_decay is .nan; it must be a finite number (typical: 0 to 0.1)",
        "a.yaml:13: sft.optim is adamw_troch; it must be one of 41 names; did you mean adamw_torch?",
        "a.yaml:14: sft.num_train_epochs is empty; it must be a number greater than 0 (typical: 1 to 3)",
        "a.yaml:15: dpo.data is missing; add the rows to train on, here or as the recipe's own `data:`",
        "a.yaml:16: dpo.beta is -1; it must be greater than 0 (typical: 0.05 to 0.5)",
        f"a.yaml:17: dpo.loss_type is sgimoid; it must be one of {NUM_LOSSES} names; did you mean sigmoid?",
        'a.yaml:18: dpo.micro_batch_size is "4"; it must be a whole number of at least 1 or auto; take the quotes off',
    ]


STAGE = "model: {path: gpt2}\nsft:\n  data: x/y\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("beta: 0.1", "sft.beta is not a key of sft; it belongs in the dpo stage"),
        ("zebra: x", "sft.zebra is not a key of sft; `alignkit schema` lists its keys"),
        ("r: 8", "sft.r is not a key of sft; it belongs in lora:"),
        ("quantization: nf4", "sft.quantization is not a key of sft; it belongs in model:"),
        ("seed: 1", "sft.seed cannot be set: set the recipe's top-level `seed`; write seed: 1"),
        ("model: {path: y}", "sft.model is not a key of a stage; model belongs at the top level of the recipe"),
        ("torch_dtype: bfloat16",
         "sft.torch_dtype is not a key of a stage: it is model.dtype; write model: {dtype: bfloat16}"),
        (
            "warmup_ratio: 0.1",
            "sft.warmup_ratio is not a key of a stage: it is warmup_steps: a number below 1 is a share of all "
            "steps; write warmup_steps: 0.1",
        ),
        (
            "per_device_train_batch_size: 4",
            "sft.per_device_train_batch_size cannot be set: set batch_size (over all devices) and, if needed, "
            "micro_batch_size (per device); write micro_batch_size: 4",
        ),
        ("bf16: true", "sft.bf16 cannot be set: set model.dtype instead; write model: {dtype: bfloat16}"),
        (
            "resume_from_checkpoint: true",
            "sft.resume_from_checkpoint cannot be set: resuming is automatic: give the same command again",
        ),
        (
            "trust_remote_code: true",
            "sft.trust_remote_code cannot be set: a recipe cannot allow code to run; give --trust-code on the "
            "command line",
        ),
        ("objective: ml", "sft.objective is ml; it must be one of chat, lm, distill, seq2seq, classify, similarity, "
         "multiple_choice; did you mean lm?"),
        ("eval: 1.5", "sft.eval is 1.5; it must be greater than 0 and less than 1"),
        ("eval: {path: x/y, splt: test}", "sft.eval.splt is not a key of sft.eval; did you mean split?"),
        ("eval: []", "sft.eval is an empty list; give at least one entry"),
        ("eval: {path: x/y, dataset_config: z}", "sft.eval.dataset_config is not a key of sft.eval: it is data.name"),
        ("samples: {num: 1000}", "sft.samples.num is 1000; it must be at least 0 and at most 256"),
        (
            "micro_batch_size: outo",
            "sft.micro_batch_size is outo; it must be auto; did you mean auto?",
        ),
        (
            "micro_batch_size: [1]",
            "sft.micro_batch_size is [1]; it must be a whole number of at least 1 or auto",
        ),
        ("lr_scheduler_kwargs: 3", "sft.lr_scheduler_kwargs is 3; it must be a mapping"),
        ("report_to: all", "sft.report_to is all; it must be one of none, azure_ml, clearml, codecarbon, "
         "comet_ml, dagshub, dvclive, flyte, kubeflow, mlflow, neptune, swanlab, tensorboard, trackio, wandb"),
        ('run_name: ""', "sft.run_name is empty text"),
        ("max_steps: 999999999999999999999999999999999999999999", "sft.max_steps is 1e+42; it must be a whole "
         "number of at least -1"),
    ],
)  # fmt: skip
def test_message_of_a_stage_key(complain: Complain, line: str, message: str) -> None:
    assert complain(f"{STAGE}  {line}\n") == [f"a.yaml:4: {message}"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rate: 1e-4", "learning_rate is not a key at the top level; it belongs in a stage, such as sft"),
        ("beta: 0.1", "beta is not a key at the top level; it belongs in the dpo stage"),
        ("output_dir: out", "output_dir is not a key here: the run directory is runs/NAME/STAGE, or --out DIR on "
         "the command line"),
        ("dataset_mixer: {a: 1}", "dataset_mixer is not a key here: it is data: a list of sources, each with a "
         "weight"),
        ("trust_remote_code: true", "trust_remote_code: a recipe cannot allow code to run; give --trust-code on "
         "the command line"),
        ("ppoo: 1", "ppoo is not a key of a recipe; did you mean ppo?"),
        ("warm: {data: x/y}", f"warm is not a section; a stage of this name needs `method:` ({METHODS})"),
        ("warm: {method: sfd}", f"warm.method is sfd; it must be one of {METHODS}; did you mean sft?"),
        ("warm: {method: 1}", f"warm.method is 1; it must be one of {METHODS}"),
        ("a b: {method: sft}", "stage a b: use letters, digits, '_' and '-' in a stage's name only"),
        ("dpo: x/y", "dpo is x/y; a stage is a mapping with at least `data:`"),
        ("dpo:", "dpo is empty; a stage is a mapping with at least `data:`"),
        ("lora:", "lora is empty; write {} for its defaults, or take the key out"),
        ("lora: {lora_alpha: 8}", "lora.lora_alpha is not a key of lora: it is lora.alpha; write lora: {alpha: 8}"),
        ("lora: {rank: 8}", "lora.rank is not a key of lora: it is lora.r; write lora: {r: 8}"),
        ("lora: {r: 8.5}", "lora.r is 8.5; it must be a whole number of at least 1 and at most 4096"),
        ("launch: {devise: cpu}", "launch.devise is not a key of launch; did you mean device?"),
        ("stages: [sft, dppo]", "stages names dppo, which is not a stage here; there are sft"),
        ("name: ..", "name is ..; use letters, digits, '.', '_' and '-' only"),
        ("rm: {data: {split: train}}",
         "rm.data.path is missing; a file, a pattern such as data/*.jsonl, a directory, a hub id, or builtin:NAME"),
        ("rm: {data: {path: x/y, chat: maybe}}", "rm.data.chat is maybe; it must be one of auto, true, false"),
        ("rm: {data: [x/y, 3]}", "rm.data[1] is 3; it must be text or a mapping"),
        ("label: {data: x/y, judge: x/j, constitution: builtin:harmlessness, cot: true, clamp: [0.1, 0.2, 0.9]}",
         "label.clamp is [0.1, 0.2, 0.9]; it must have 2 entries"),
        ("dpo: {data: x/y, loss_type: 3}", f"dpo.loss_type is 3; it must be one of {NUM_LOSSES} names or a list"),
        ("rm: {data: {path: x/y, weight: 0}}", "rm.data.weight is 0; it must be greater than 0 and at most 1000"),
    ],
)  # fmt: skip
def test_message_of_a_top_level_key(complain: Complain, line: str, message: str) -> None:
    assert complain(f"{STAGE}{line}\n") == [f"a.yaml:4: {message}"]


def test_model_section_points_to_new_names(complain: Complain) -> None:
    text = (
        "model:\n  path: gpt2\n  torch_dtype: float32\n  trust_remote_code: true\n  load_in_4bit: true\n" + STAGE[20:]
    )
    assert complain(text) == [
        "a.yaml:3: model.torch_dtype is not a key of model: it is model.dtype; write model: {dtype: float32}",
        "a.yaml:4: model.trust_remote_code: a recipe cannot allow code to run; give --trust-code on the command line",
        "a.yaml:5: model.load_in_4bit is not a key of model: "
        "it is model.quantization: nf4; write model: {quantization: nf4}",
    ]


def test_a_section_named_after_a_method_is_that_method(complain: Complain) -> None:
    assert complain(f"{STAGE}  method: dpo\n") == [
        "a.yaml:2: sft.method is dpo; a section named sft is an sft stage: take method out, or rename the section"
    ]


def test_a_recipe_without_stages_is_refused(complain: Complain) -> None:
    assert complain("model: {path: gpt2}\n") == [f"a.yaml:1: there is no stage; add a section such as {METHODS}"]


START = "model: {path: gpt2}\ndata: x/y\n"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("sft: {start_from: sft}", "sft.start_from goes round in a circle: sft -> sft"),
        ("sft: {start_from: sftt}", "sft.start_from is sftt, which is neither a stage nor a path that exists; "
         "did you mean sft?"),
        ("sft: {start_from: gpt2}", "sft.start_from is gpt2, which is neither a stage nor a path that exists; "
         "it must be a stage (sft), a run directory or a model"),
        ("dpo: {start_from: rm}\nrm: {}", "dpo.start_from is rm, a reward model; a dpo stage starts from a "
         "language model"),
    ],
)  # fmt: skip
def test_message_of_start_from(complain: Complain, stages: str, message: str) -> None:
    assert complain(f"{START}{stages}\n") == [f"a.yaml:3: {message}"]


def test_a_circle_of_stages_is_told_at_each_of_them(complain: Complain) -> None:
    stages = "a: {method: sft, start_from: b}\nb: {method: sft, start_from: a}\nc: {method: sft, start_from: a}\n"
    assert complain(START + stages) == [
        "a.yaml:3: a.start_from goes round in a circle: a -> b -> a",
        "a.yaml:4: b.start_from goes round in a circle: b -> a -> b",
    ]


def test_a_number_may_be_whole_and_null_is_a_value_where_trl_says_so(load: Load) -> None:
    recipe = load(STAGE + "  learning_rate: 1\n  max_length: null\n  neftune_noise_alpha: 5\n")
    assert recipe.stages["sft"].trainer == {"learning_rate": 1, "max_length": None, "neftune_noise_alpha": 5}


def test_stages_read_the_recipes_own_data(load: Load) -> None:
    recipe = load("model: {path: gpt2}\ndata: [x/y, {path: x/z, weight: 2}]\neval: 0.1\nsft: {}\nrm: {data: x/w}\n")
    sft, rm = recipe.stages["sft"].options, recipe.stages["rm"].options
    assert [(source.path, source.weight) for source in sft.data] == [("x/y", 1), ("x/z", 2)]
    assert [source.path for source in rm.data] == ["x/w"]
    assert sft.eval == rm.eval == 0.1
    assert recipe.origins["sft.data.1.weight"] == "a.yaml:2"
    assert recipe.origins["rm.data.0"] == "a.yaml:5"


def test_edits_are_counted_with_swaps() -> None:
    pairs = [("beta", "beta"), ("beta", "bta"), ("beta", "ebta"), ("beta", "betta"), ("optim", "potmi"), ("a", "long")]
    assert [count_edits(a, b) for a, b in pairs] == [0, 1, 1, 1, 2, 3]


def test_short_words_are_not_like_everything() -> None:
    assert find_nearest("xy", ["r", "lm"]) is None
    assert find_nearest("ml", ["chat", "lm"]) == "lm"
