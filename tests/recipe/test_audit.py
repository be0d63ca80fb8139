"""Options without effect, and options that contradict each other, are refused with the reason and the alternative."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from alignkit.recipe import Recipe, resolve
from alignkit.recipe.check import accepted_keys
from alignkit.recipe.rules import CONFLICTS, find_optimizer
from alignkit.recipe.schema import RecipeOptions
from alignkit.recipe.words import read_snapshot

Load = Callable[..., Recipe]
Complain = Callable[..., list[str]]

START = "model: {path: gpt2}\ndata: x/y\n"


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("sft: {batch_size: 16, micro_batch_size: 3}", "sft.micro_batch_size is 3, which does not divide batch_size "
         "16"),
        ("sft: {eval_steps: 5}", "sft.eval_steps has no effect without `eval:`; add eval: 0.05 (a share of the data) "
         "or a source"),
        ("sft: {save_steps: 2.5}", "sft.save_steps is 2.5; it must be a whole number of steps, or a share of all steps "
         "below 1"),
        ("sft: {max_steps: 0}", "sft.max_steps is 0; it must be at least 1, or -1 to train num_train_epochs"),
        ("sft: {max_steps: 9, num_train_epochs: 2}", "sft.num_train_epochs has no effect with max_steps; take one of "
         "them out, or set max_steps: -1"),
        ("sft: {save_strategy: epoch, save_steps: 5}", "sft.save_steps has no effect with save_strategy: epoch"),
        ("sft: {adapter: merge}", "sft.adapter has no effect without start_from; it says what happens to the adapter a "
         "stage starts from"),
        ("sft: {adapter: stack, start_from: x/y}", "sft.adapter is stack, which puts a new adapter on top; add a lora: "
         "section"),
        ("sft: {gradient_checkpointing: false, gradient_checkpointing_kwargs: {use_reentrant: true}}",
         "sft.gradient_checkpointing_kwargs has no effect with gradient_checkpointing: false"),
        ("sft: {dataloader_prefetch_factor: 2}", "sft.dataloader_prefetch_factor has no effect without "
         "dataloader_num_workers"),
        ("sft: {objective: lm, assistant_only_loss: true}", "sft.assistant_only_loss has no effect with objective: lm, "
         "which trains on every token; use objective: chat"),
        ("sft: {objective: lm, packing: true}", "sft.packing has no effect with objective: lm, which packs its text "
         "already"),
        ("sft: {packing_strategy: wrapped}", "sft.packing_strategy has no effect without packing: true"),
        ("sft: {packing: true, max_length: null}", "sft.packing needs max_length, the size of a block"),
        ("sft: {padding_free: true}", "sft.padding_free does not enforce max_length; use packing: true, or set "
         "max_length: null"),
        ("sft: {streaming: true}", "sft.streaming needs max_steps: the number of rows is not known"),
        *(
            (f"sft: {{streaming: true, max_steps: 9, {key}: {value}}}", f"sft.{key} is {what}")
            for key, value, what in (
                ("eval", "0.1", "a share, which streaming cannot hold out; name a source of held-out rows"),
                ("dedupe", "true", "true, which streaming cannot do; take one of the two out"),
                ("packing", "true", "true, which streaming cannot do; take one of the two out"),
                ("batching", "shuffled", "shuffled, which streaming cannot do; take one of the two out"),
                ("on_bad_row", "skip", "skip, which streaming cannot do; take one of the two out"),
            )
        ),
        ("dpo: {streaming: true}", "dpo.streaming is not a key of dpo; it belongs in the sft stage"),
        ("sft: {packing: true, batching: grouped}", "sft.batching has no effect with packing: true, which fills every "
         "block to the same length"),
        ("rm: {loss: best_of, grouping: pairs}", "rm.grouping is pairs, but loss: best_of compares all answers of a "
         "prompt; use grouping: kway"),
        ("rm: {normalize_rows: 9}", "rm.normalize_rows has no effect without normalize: bias or gain_and_bias"),
        ("rm: {label_smoothing_factor: 0.1}", "rm.label_smoothing_factor has no effect on the loss of rm; soft labels "
         "are a column"),
        ("dpo: {label_smoothing: 0.1}", "dpo.label_smoothing has no effect with loss_type sigmoid; use loss_type: "
         "cdpo"),
        ("dpo: {label_smoothing: 0.1, loss_type: [ipo, hinge]}", "dpo.label_smoothing has no effect with loss_type "
         "ipo, hinge; only cdpo, robust, exo_pair, aot, aot_unpaired read it"),
        ("dpo: {loss_type: cdpo}", "dpo.loss_type is cdpo; cdpo needs label_smoothing between 0 and 0.5: the share of "
         "flipped labels"),
        ("dpo: {loss_type: cdpo, label_smoothing: 0.5}", "dpo.label_smoothing is 0.5; cdpo needs label_smoothing "
         "between 0 and 0.5: the share of flipped labels"),
        ("dpo: {loss_type: robust, label_smoothing: 0.6}", "dpo.label_smoothing is 0.6; robust needs label_smoothing "
         "below 0.5"),
        ("dpo: {loss_type: exo_pair}", "dpo.loss_type is exo_pair; exo_pair needs label_smoothing above 0 (typical: "
         "0.001)"),
        ("dpo: {loss_type: [sigmoid, sft], loss_weights: [1]}", "dpo.loss_weights has 1 weights for 2 losses in "
         "loss_type"),
        ("dpo: {discopop_tau: 0.1}", "dpo.discopop_tau has no effect without loss_type: discopop"),
        ("dpo: {use_weighting: true, loss_type: aot}", "dpo.use_weighting does not work with aot and aot_unpaired, "
         "which sort the rows of a batch"),
        ("dpo: {f_divergence_type: js_divergence, loss_type: [sigmoid, nca_pair]}", "dpo.f_divergence_type is "
         "js_divergence, which nca_pair cannot use; use reverse_kl"),
        ("dpo: {f_alpha_divergence_coef: 0.3}", "dpo.f_alpha_divergence_coef has no effect without f_divergence_type: "
         "alpha_divergence"),
        ("dpo: {padding_free: true}", "dpo.padding_free is accepted and then switched off by TRL's DPOTrainer; use "
         "batching: grouped"),
        ("dpo: {sync_ref_model: true}", "dpo.sync_ref_model cannot be set: the reference stays fixed: a "
         "moving one is in no checkpoint, and a resumed run would differ"),
        ("dpo: {truncation_mode: keep_end}", "dpo.truncation_mode cannot be set: the start of a row is kept, "
         "and what is cut is counted; raise max_length"),
        ("dpo: {loss_type: [cdpo, sft, hinge], label_smoothing: 0.1}", "dpo.loss_type mixes cdpo with others; only sft "
         "may stand beside it"),
        ("dpo: {loss_type: ipo_sum, ld_alpha: 0.5}", "dpo.ld_alpha has no effect with loss_type: ipo_sum"),
        ("dpo: {loss_type: kto, batching: grouped}", "dpo.batching is grouped; KTO pairs each prompt with its "
         "neighbour's answer, so rows are only shuffled"),
        ("dpo: {adapter: stack, start_from: x/y, precompute_ref_log_probs: true}\nlora: {}", "dpo.adapter is stack, "
         "which does not work with precompute_ref_log_probs; use continue or merge"),
        ("dpo: {precompute_ref_batch_size: 9}", "dpo.precompute_ref_batch_size has no effect without "
         "precompute_ref_log_probs: true"),
        ("dpo: {desirable_weight: 2}", "dpo.desirable_weight has no effect without loss_type: kto"),
        ("dpo: {loss_type: [kto, sigmoid]}", "dpo.loss_type mixes kto with others; it is computed on single answers "
         "and must stand alone"),
        ("dpo: {loss_type: kto, ld_alpha: 0.5}", "dpo.ld_alpha has no effect with loss_type: kto"),
        ("dpo: {loss_type: kto, micro_batch_size: 1}", "dpo.micro_batch_size is 1; KTO estimates its KL term across a "
         "batch and needs at least 2"),
    ],
)  # fmt: skip
def test_stage_rules(complain: Complain, stage: str, message: str) -> None:
    assert complain(f"{START}{stage}\n") == [f"a.yaml:3: {message}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {path: gpt2, quantization: nf4}", "a.yaml:1: model.quantization is nf4, and quantised weights cannot "
         "be trained; add a lora: section"),
        ("launch: {strategy: ddp, offload: all}\nmodel: {path: gpt2}", "a.yaml:1: launch.offload is all, which ddp "
         "does not do; fsdp (all), zero2 (optimizer), zero3 (optimizer or all) do"),
        ("launch: {strategy: zero2, offload: all}\nmodel: {path: gpt2}", "a.yaml:1: launch.offload is all, which zero2 "
         "does not do; fsdp (all), zero2 (optimizer), zero3 (optimizer or all) do"),
        ("lora: {}\nmodel: {path: gpt2, quantization: nf4}\nlaunch: {strategy: fsdp}", "a.yaml:3: launch.strategy is "
         "fsdp, which cannot shard nf4 weights; ddp holds the quantised base on every device, zero2 shards the rest, "
         "and fsdp takes nf4 with one dtype for all: model: {dtype: bfloat16, quantization_storage: bfloat16}"),
        ("model: {path: gpt2, quantization_storage: bfloat16}", "a.yaml:1: model.quantization_storage has no effect "
         "without quantization: nf4 or fp4"),
        ("launch: {device: mps, processes: 2}\nmodel: {path: gpt2}", "a.yaml:1: launch.device is mps, which runs one "
         "process; set launch.processes: 1"),
        ("model: {path: gpt2, double_quantization: false}", "a.yaml:1: model.double_quantization has no effect without "
         "quantization: nf4 or fp4"),
        ("model: {path: gpt2, config: {n_layer: 2}}", "a.yaml:1: model.config has no effect without init: scratch; "
         "pretrained weights fix the shape"),
        ("model: {path: gpt2, init: scratch}\nlora: {}", "a.yaml:2: lora has no effect: every stage starts from random "
         "weights, and trains all of them"),
        ("model: {path: gpt2}\nlora: {target_modules: [q_proj, lm_head]}", "a.yaml:2: lora.target_modules names "
         "lm_head, whose adapter would never be trained; use all-linear"),
    ],
)  # fmt: skip
def test_model_and_lora_rules(complain: Complain, text: str, message: str) -> None:
    assert complain(f"{text}\nsft: {{data: x/y}}\n") == [message]


def test_keys_of_the_table_of_conflicts_exist() -> None:
    for row in CONFLICTS:
        methods = ("sft", "rm", "dpo", "ppo") if row.methods == "train" else row.methods.split()
        known = {key for method in methods for key in accepted_keys(method)} | {*RecipeOptions.model_fields}
        for key in row.keys.split():
            assert key.lstrip("+").split(".")[0] in known, key


def test_a_key_is_idle_although_another_value_is_wrong(complain: Complain) -> None:
    assert sorted(complain(f"{START}label: {{reward: x/r, clamp: [1], cot_tokens: 9, cot: no}}\n")) == [
        "a.yaml:3: label.clamp is [1]; it must have 2 entries",
        "a.yaml:3: label.cot is no; it must be true or false; write false",
        "a.yaml:3: label.cot_tokens has no effect with reward:, which compares by itself; take one of them out",
    ]


def test_checkpointing_is_asked_for_in_one_place(load: Load, complain: Complain) -> None:
    text = "model: {path: gpt2}\nlaunch: {activation_checkpointing: true}\n"
    text += "sft: {data: x/y, gradient_checkpointing: KEY}\n"
    load(text.replace("KEY", "true"))
    assert complain(text.replace("KEY", "false")) == [
        "a.yaml:3: sft.gradient_checkpointing is false, but launch.activation_checkpointing is true; keep one"
    ]


def test_scratch_with_start_from_everywhere_is_refused(complain: Complain) -> None:
    assert complain("model: {path: gpt2, init: scratch}\nsft: {data: x/y, start_from: runs/a/b}\n") == [
        "a.yaml:1: model.init is scratch, but every stage has start_from, so nothing starts from random weights"
    ]


def test_a_rule_waits_for_the_values_it_reads(complain: Complain) -> None:
    """loss_type is wrong in itself; whether label_smoothing has an effect cannot be known."""
    lines = complain(
        f"{START}dpo: {{loss_type: [sigmod], label_smoothing: 0.1, discopop_tau: 0.1, padding_free: true}}\n"
    )
    assert [line.split(" ")[1] for line in lines] == ["dpo.loss_type[0]", "dpo.padding_free"]


def test_rules_are_told_together_with_unknown_keys(complain: Complain) -> None:
    assert complain(f"{START}dpo:\n  label_smoothing: 0.1\n  betta: 1\n") == [
        "a.yaml:4: dpo.label_smoothing has no effect with loss_type sigmoid; use loss_type: cdpo",
        "a.yaml:5: dpo.betta is not a key of dpo; did you mean beta?",
    ]


@pytest.mark.parametrize(
    "stage",
    [
        "dpo: {loss_type: cdpo, label_smoothing: 0.1}",
        "dpo: {loss_type: [sigmoid, sft], loss_weights: [1, 0.1]}",
        "dpo: {loss_type: cdpo, label_smoothing: 0.1}",
        "dpo: {loss_type: robust, label_smoothing: 0}",
        "dpo: {loss_type: kto, desirable_weight: 1.3, beta: 0.2}",
        "dpo: {loss_type: apo_zero_unpaired}",
        "dpo: {f_divergence_type: alpha_divergence, f_alpha_divergence_coef: 0.3}",
        "sft: {packing: true, packing_strategy: wrapped, eval: 0.1, eval_packing: false}",
        "sft: {padding_free: true, max_length: null}",
        "sft: {adapter: merge, start_from: x/y}",
        "sft: {warmup_steps: 0.1, save_steps: 0.5, logging_steps: 5.0}",
        "rm: {normalize: bias, normalize_data: x/z, normalize_rows: 9, loss: best_of}",
    ],
)
def test_what_fits_together_is_accepted(load: Load, stage: str) -> None:
    assert load(f"{START}{stage}\n").stage_names == [stage.split(":")[0]]


def test_max_steps_on_the_command_line_shortens_a_recipe_with_epochs(load: Load) -> None:
    assert load(f"{START}sft: {{num_train_epochs: 3}}\n", "sft.max_steps=2").stages["sft"].trainer["max_steps"] == 2


def test_epochs_on_the_command_line_are_not_ignored_beside_max_steps(load: Load, complain: Complain) -> None:
    text = f"{START}sft: {{max_steps: 9}}\n"
    (line,) = complain(text, "sft.num_train_epochs=2")
    assert line.startswith("--set: sft.num_train_epochs has no effect with max_steps")
    assert load(text, "sft.num_train_epochs=2", "sft.max_steps=-1").stage_names == ["sft"]


@pytest.mark.parametrize(
    ("text", "off", "moot"),
    [
        ("model: {path: gpt2, quantization: nf4, double_quantization: true}\nlora: {}\n", "model.quantization=none",
         "model.double_quantization=true"),
        ("model: {path: gpt2}\nlaunch: {nodes: 2, main_address: head}\n", "launch.nodes=1",
         "launch.main_address=head"),
    ],
)  # fmt: skip
def test_the_command_line_switches_off_what_a_recipe_has(
    load: Load, complain: Complain, text: str, off: str, moot: str
) -> None:
    text += "sft: {data: x/y}\n"
    assert load(text, off).stage_names == ["sft"]
    (line,) = complain(text, off, moot)
    assert line.startswith(f"--set: {moot.partition('=')[0]} has no effect with")


def test_an_address_that_is_null_is_none(load: Load) -> None:
    assert load("model: {path: gpt2}\nlaunch: {main_address: null}\nsft: {data: x/y}\n").stage_names == ["sft"]


@pytest.mark.parametrize(
    ("lines", "messages"),
    [
        ("  optim_args: betaa=3\n", [
            "4: sft.optim_args names betaa, which optim: adamw_torch_fused does not know; it takes none",
        ]),
        ("  optim: sgd\n  optim_args: momentun=0.9\n", [
            "5: sft.optim_args names momentun, which optim: sgd does not know; it takes momentum, dampening, "
            "weight_decay, nesterov; did you mean momentum?",
        ]),
        ("  optim: sgd\n  optim_args: 'momentum=high, nesterov=maybe'\n", [
            "5: sft.optim_args has momentum high; it must be a number",
            "5: sft.optim_args has nesterov maybe; it must be true or false",
        ]),
        ("  optim: sgd\n  optim_args: momentum\n", [
            "5: sft.optim_args holds momentum; write name=value, with commas between",
        ]),
        ("  optim: galore_adamw\n", [
            "2: sft.optim_target_modules is missing, and optim: galore_adamw needs it; write all-linear, or names"
            " of modules",
        ]),
        ("  optim_target_modules: all-linear\n", [
            "4: sft.optim_target_modules has no effect with optim: adamw_torch_fused; galore and apollo "
            "optimizers read it",
        ]),
        ("  lr_scheduler_type: warmup_stable_decay\n", [
            "2: sft.lr_scheduler_kwargs lacks num_decay_steps, which lr_scheduler_type: warmup_stable_decay "
            "needs, such as {num_decay_steps: 100}",
        ]),
        ("  lr_scheduler_type: cosine_with_min_lr\n", [
            "2: sft.lr_scheduler_kwargs has neither of min_lr and min_lr_rate; lr_scheduler_type: "
            "cosine_with_min_lr needs one, such as {min_lr_rate: 0.1}",
        ]),
        ("  lr_scheduler_type: cosine\n  lr_scheduler_kwargs: {min_lr_rate: 0.1}\n", [
            "5: sft.lr_scheduler_kwargs names min_lr_rate, which lr_scheduler_type: cosine does not know; it "
            "takes num_cycles",
        ]),
        ("  lr_scheduler_type: reduce_lr_on_plateau\n", [
            "4: sft.lr_scheduler_type is reduce_lr_on_plateau, which goes by an evaluation's loss; add eval: "
            "0.05, or a source",
        ]),
        ("  torch_compile_mode: fast\n", [
            "4: sft.torch_compile_mode is fast; it must be one of default, reduce-overhead, max-autotune, "
            "max-autotune-no-cudagraphs",
        ]),
        ("  gradient_checkpointing_kwargs: {use_reentrent: true}\n", [
            "4: sft.gradient_checkpointing_kwargs names use_reentrent, which torch does not know; it takes "
            "use_reentrant, preserve_rng_state, determinism_check, debug, early_stop; did you mean use_reentrant?",
        ]),
        ("  gradient_checkpointing_kwargs: {use_reentrant: 3}\n", [
            "4: sft.gradient_checkpointing_kwargs has use_reentrant 3; it must be true or false",
        ]),
    ],
)  # fmt: skip
def test_what_would_only_fail_in_train_is_said_first(complain: Complain, lines: str, messages: list[str]) -> None:
    found = complain(f"model: {{path: gpt2}}\nsft:\n  data: x/y\n{lines}")
    assert sorted(found) == sorted(f"a.yaml:{message}" for message in messages)


def test_every_schedule_and_optimizer_has_settings_that_are_accepted(load: Callable[..., Recipe]) -> None:
    schedules, optimizers = read_snapshot()["schedulers"], read_snapshot()["common"]["optim"]["enum"]
    assert schedules.keys() == set(read_snapshot()["common"]["lr_scheduler_type"]["enum"])
    needed = {"warmup_stable_decay": "{num_decay_steps: 2}", "cosine_with_min_lr": "{min_lr: 0}",
              "cosine_warmup_with_min_lr": "{min_lr_rate: 0.1}"}  # fmt: skip
    for name in schedules:
        schedule = f"lr_scheduler_type: {name}, lr_scheduler_kwargs: {needed.get(name, '{}')}"
        load(f"model: gpt2\nsft: {{data: x/y, eval: 0.1, {schedule}}}\n")
    for name in optimizers:
        targets = ", optim_target_modules: all-linear" if find_optimizer(name).targets else ""
        load(f"model: gpt2\nsft: {{data: x/y, optim: {name}{targets}}}\n")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("grpo: {data: x/y}", "a.yaml:2: grpo is not a section here: write `ppo:` with advantage: grpo"),
        ("KTO: {data: x/y}", "a.yaml:2: KTO is not a section here: write `dpo:` with loss_type: kto"),
        ("a: {method: rloo, data: x/y}", "write `ppo:` with advantage: rloo"),
        ("dpo: {data: x/y, loss_type: xpo}", "alignkit has no such method"),
    ],
)
def test_methods_of_other_tools_have_a_place(complain: Complain, section: str, message: str) -> None:
    (found,) = complain(f"model: gpt2\n{section}\n")
    assert message in found and "did you mean" not in found


def test_a_model_may_be_a_text(load: Callable[..., Recipe]) -> None:
    recipe = load("model: builtin:tiny-gpt2\nsft: {data: x/y}\n")
    assert recipe.model.path == "builtin:tiny-gpt2" and recipe.origins["model.path"] == "a.yaml:1"


def test_a_long_chain_of_stages_is_read_in_linear_time(load: Callable[..., Recipe]) -> None:
    """Steps of the interpreter are counted, not seconds: 4 times the stages, at most 5 times the work."""
    counts = []
    for num in (25, 100):
        lines = [f"s{i}: {{method: sft{f', start_from: s{i - 1}' if i else ''}}}" for i in range(num)]
        text = "model: gpt2\ndata: x/y\n" + "\n".join(lines) + "\n"
        count = 0

        def step(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(step)
        try:
            recipe = load(text)
            [resolve(recipe, name) for name in recipe.order]
        finally:
            sys.setprofile(None)
        counts.append(count)
    assert counts[1] < 5 * counts[0]
