"""The fields of TRL's config classes as a recipe may use them: what TRL says, narrowed to what makes sense here.

`fields.json` is the generated snapshot of TRL; this module adds ranges and alignkit's own losses, and says for
each field that a recipe cannot set why, and what to write instead. It never imports TRL.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from alignkit.recipe.ppo_fields import OWN, PPO_CONTROLLED, PPO_MOVED

Fragment = dict[str, Any]

# Losses that alignkit adds to TRL's DPO losses, and those that TRL's KTOTrainer computes, on single answers.
OWN_LOSSES = ("cdpo", "ipo_sum")
KTO_LOSSES = ("kto", "apo_zero_unpaired")

_POSITIVE: Fragment = {"exclusiveMinimum": 0}
_NOT_NEGATIVE: Fragment = {"minimum": 0}
_AT_LEAST_ONE: Fragment = {"minimum": 1}
_SHARE: Fragment = {"minimum": 0, "maximum": 1}
_BELOW_ONE: Fragment = {"minimum": 0, "exclusiveMaximum": 1}

# What TRL leaves open. "typical" is shown in messages and in the schema's descriptions.
_RANGES: dict[str, Fragment] = {
    "learning_rate": {**_POSITIVE, "typical": "1e-6 to 5e-4"},
    "beta": {**_POSITIVE, "typical": "0.05 to 0.5"},
    "num_train_epochs": {**_POSITIVE, "typical": "1 to 3"},
    "max_steps": {"minimum": -1},
    "max_length": {"minimum": 2, "typical": "512 to 4096"},
    "warmup_steps": {**_NOT_NEGATIVE, "typical": "0.03 to 0.1 of all steps, or a count"},
    "weight_decay": {**_NOT_NEGATIVE, "typical": "0 to 0.1"},
    "adam_beta1": _BELOW_ONE,
    "adam_beta2": _BELOW_ONE,
    "adam_epsilon": _POSITIVE,
    "max_grad_norm": {**_NOT_NEGATIVE, "typical": "0.3 to 1"},
    "label_smoothing_factor": _BELOW_ONE,
    "label_smoothing": {**_BELOW_ONE, "typical": "0.1"},
    "neftune_noise_alpha": {**_POSITIVE, "typical": "5 to 15"},
    "logging_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "eval_delay": _NOT_NEGATIVE,
    "eval_accumulation_steps": _AT_LEAST_ONE,
    "per_device_eval_batch_size": _AT_LEAST_ONE,
    "torch_empty_cache_steps": _AT_LEAST_ONE,
    "dataset_num_proc": _AT_LEAST_ONE,
    "dataloader_num_workers": _NOT_NEGATIVE,
    "dataloader_prefetch_factor": _AT_LEAST_ONE,
    "ddp_bucket_cap_mb": _AT_LEAST_ONE,
    "pad_to_multiple_of": _AT_LEAST_ONE,
    "router_aux_loss_coef": _NOT_NEGATIVE,
    "center_rewards_coefficient": {**_NOT_NEGATIVE, "typical": "0.01"},
    "precompute_ref_batch_size": _AT_LEAST_ONE,
    "ld_alpha": _SHARE,
    "discopop_tau": _POSITIVE,
    "ref_model_mixup_alpha": _SHARE,
    "ref_model_sync_steps": _AT_LEAST_ONE,
    "desirable_weight": _NOT_NEGATIVE,
    "undesirable_weight": _NOT_NEGATIVE,
    "loss_weights": _NOT_NEGATIVE,
}
_CHOICES = {
    "include_num_input_tokens_seen": ("no", "all", "non_padding"),
    "pad_to_multiple_of": ("auto",),
    "save_strategy": ("no", "steps", "epoch"),  # best needs load_best_model_at_end
    "debug": ("underflow_overflow", "tpu_metrics_debug"),
    "torch_compile_backend": ("inductor", "eager", "aot_eager", "cudagraphs", "onnxrt", "openxla", "tvm"),
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
}

_HUB = "alignkit sends nothing anywhere; upload the run's model/ yourself"
_DTYPE = "set model.dtype instead"
_METRICS = "alignkit computes its own metrics"
_LAUNCHER = "set launch.strategy: ddp, fsdp, zero2 or zero3"
_ORDER = "the order of rows is fixed by `seed`, so that a resumed run is exact; see batching"
_BEST = "a run keeps its last weights; bound it with num_train_epochs or max_steps"
_COLUMNS = "alignkit prepares the rows; rename columns with data.columns"
_MOVING = "the reference stays fixed: a moving one is in no checkpoint, and a resumed run would differ"
_ALWAYS = "a resumed run must be exact, so this is not a choice"
_TOKENIZER = "the tokenizer and model.chat_template decide it"

# Fields of TRL that alignkit sets itself: the reason, and what to write instead.
CONTROLLED: dict[str, str] = {
    "output_dir": "the run directory is runs/NAME/STAGE, or --out DIR on the command line",
    "per_device_train_batch_size": "set batch_size (over all devices) and, if needed, micro_batch_size (per device)",
    "gradient_accumulation_steps": "it follows from batch_size and micro_batch_size",
    "auto_find_batch_size": "set micro_batch_size: auto instead",
    "seed": "set the recipe's top-level `seed`",
    "data_seed": "set the recipe's top-level `seed`",
    "bf16": _DTYPE,
    "fp16": _DTYPE,
    "bf16_full_eval": _DTYPE,
    "fp16_full_eval": _DTYPE,
    "use_cpu": "set launch.device: cpu",
    "ddp_backend": "gloo on the CPU, nccl on CUDA",
    "model_init_kwargs": "write the options in the model: section (dtype, attn_implementation, revision, ...)",
    "trust_remote_code": "a recipe cannot allow code to run; give --trust-code on the command line",
    "chat_template_path": "set model.chat_template",
    "eos_token": _TOKENIZER,
    "pad_token": _TOKENIZER,
    "dataset_text_field": _COLUMNS,
    "dataset_kwargs": _COLUMNS,
    "remove_unused_columns": _COLUMNS,
    "label_names": _COLUMNS,
    "length_column_name": _COLUMNS,
    "shuffle_dataset": _ORDER,
    "train_sampling_strategy": "set batching: grouped or shuffled",
    "dataloader_in_order": _ORDER,
    "accelerator_config": _LAUNCHER,
    "parallelism_config": _LAUNCHER,
    "fsdp": _LAUNCHER,
    "fsdp_config": _LAUNCHER,
    "deepspeed": _LAUNCHER,
    "local_rank": "the launcher sets it",
    "ddp_timeout": "set launch.timeout_seconds",
    "save_total_limit": "set keep_checkpoints",
    "sync_ref_model": _MOVING,
    "ref_model_mixup_alpha": _MOVING,
    "ref_model_sync_steps": _MOVING,
    "truncation_mode": "the start of a row is kept, and what is cut is counted; raise max_length",
    "save_only_model": "a checkpoint without the optimizer cannot be resumed; model/ has the final weights alone",
    "save_on_each_node": "checkpoints are written once and sealed",
    "enable_jit_checkpoint": "SIGTERM, SIGINT and SIGUSR1 save at the end of the step anyway",
    "resume_from_checkpoint": "resuming is automatic: give the same command again",
    "ignore_data_skip": _ALWAYS,
    "restore_callback_states_from_checkpoint": _ALWAYS,
    "load_best_model_at_end": _BEST,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": _HUB,
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "logging_nan_inf_filter": "a loss that is not finite stops the run; nothing is filtered",
    "disable_tqdm": "progress is drawn on a terminal and printed in lines elsewhere",
    "do_train": "the command decides what is done",
    "do_eval": "give `eval:` to evaluate",
    "do_predict": "the command decides what is done",
    "prediction_loss_only": _METRICS,
    "include_for_metrics": _METRICS,
    "batch_eval_metrics": _METRICS,
    "eval_do_concat_batches": _METRICS,
    "eval_use_gather_object": _METRICS,
    "use_cache": "the cache is off in training: with it, packed documents see each other",
    "use_liger_kernel": "TRL has deprecated it; the trainers fuse the LM head themselves",
    "liger_kernel_config": "TRL has deprecated it; the trainers fuse the LM head themselves",
}

# Names from other tools and older versions: where the thing lives now.
MOVED: dict[str, str] = {
    "torch_dtype": "it is model.dtype",
    "dtype": "it is model.dtype",
    "warmup_ratio": "it is warmup_steps: a number below 1 is a share of all steps",
    "max_seq_length": "it is max_length",
    "max_seq_len": "it is max_length",
    "cutoff_len": "it is max_length",
    "sequence_len": "it is max_length",
    "max_prompt_length": "TRL has removed it; max_length bounds prompt and answer together",
    "max_completion_length": "TRL has removed it; max_length bounds prompt and answer together",
    "micro_batch": "it is micro_batch_size",
    "train_batch_size": "it is batch_size, over all devices",
    "global_batch_size": "it is batch_size, over all devices",
    "epochs": "it is num_train_epochs",
    "num_epochs": "it is num_train_epochs",
    "lr": "it is learning_rate",
    "lr_scheduler": "it is lr_scheduler_type",
    "optimizer": "it is optim",
    "load_in_4bit": "it is model.quantization: nf4",
    "load_in_8bit": "it is model.quantization: int8",
    "bnb_4bit_quant_type": "it is model.quantization: nf4 or fp4",
    "use_bnb_nested_quant": "it is model.double_quantization",
    "bnb_4bit_use_double_quant": "it is model.double_quantization",
    "bnb_4bit_compute_dtype": "it is model.dtype",
    "use_peft": "give a lora: section",
    "lora_r": "it is lora.r",
    "lora_alpha": "it is lora.alpha",
    "lora_dropout": "it is lora.dropout",
    "lora_target_modules": "it is lora.target_modules",
    "lora_modules_to_save": "it is lora.modules_to_save",
    "lora_task_type": "the method decides it",
    "use_rslora": "it is lora.use_rslora",
    "use_dora": "it is lora.use_dora",
    "model_name_or_path": "it is model.path",
    "base_model": "it is model.path",
    "model_revision": "it is model.revision",
    "tokenizer_name_or_path": "it is model.tokenizer",
    "attn_implementation": "it is model.attn_implementation",
    "dataset_name": "it is data.path",
    "dataset_path": "it is data.path",
    "dataset_config": "it is data.name",
    "dataset_train_split": "it is data.split",
    "dataset_test_split": "it is eval: with its own split",
    "dataset_mixer": "it is data: a list of sources, each with a weight",
    "datasets": "it is data: a list of sources, each with a weight",
    "val_set_size": "it is eval: a share of the data, such as 0.05",
    "overwrite_output_dir": "--force moves the old run aside",
    "no_cuda": "it is launch.device: cpu",
    "group_by_length": "it is batching: grouped",
    "logging_dir": "logs are written to the run directory",
    "save_safetensors": "weights are always safetensors",
    "reference_free": "TRL has removed it",
    "rpo_alpha": "TRL has removed it; write loss_type: [sigmoid, sft] with loss_weights",
    "ref_model": "the reference is the model the stage starts from",
    "ref_model_init_kwargs": "the reference is loaded like the model",
    "hub_model_revision": _HUB,
    "env": "a recipe cannot set environment variables",
    "dpo_beta": "it is beta in a dpo stage",
    "label_smoothing_loss": "it is label_smoothing in a dpo stage",
}


# Methods of other tools and of TRL's other trainers, asked for as a section, a method or a loss.
ELSEWHERE: dict[str, str] = {
    "grpo": "write `ppo:` with advantage: grpo",
    "rloo": "write `ppo:` with advantage: rloo",
    "reinforce": "write `ppo:` with advantage: reinforce",
    "kto": "write `dpo:` with loss_type: kto",
    "ipo": "write `dpo:` with loss_type: ipo",
    "cdpo": "write `dpo:` with loss_type: cdpo",
    "bco": "write `dpo:` with loss_type: bco_pair",
    "reward": "write `rm:`",
    "reward_modeling": "write `rm:`",
    "pretrain": "write `sft:` with objective: lm",
    "pt": "write `sft:` with objective: lm",
    **dict.fromkeys(
        ("orpo", "simpo", "cpo", "gkd", "gspo", "dapo", "online_dpo", "nash_md", "xpo", "prm"),
        "alignkit has no such method; `dpo:` learns from pairs, `ppo:` from a reward",
    ),
}


def controlled_fields(method: str) -> dict[str, str]:
    """Return what a stage of this method cannot set: TRL's name, and what to write instead."""
    return CONTROLLED | PPO_CONTROLLED if method == "ppo" else CONTROLLED


def moved_names(method: str) -> dict[str, str]:
    """Return names from other tools and what they are called in a stage of this method."""
    return MOVED | PPO_MOVED if method == "ppo" else MOVED


@cache
def read_snapshot() -> dict[str, dict[str, Any]]:
    """Return fields.json as it is."""
    data: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "fields.json").read_text(encoding="utf-8"))
    return data


@cache
def trl_fields(config: str) -> dict[str, Fragment]:
    """Return every field of a config class ("sft", "rm", "dpo", "kto", "ppo"), narrowed; CONTROLLED ones included."""
    snapshot = read_snapshot()
    return {name: _narrow(name, fragment) for name, fragment in {**snapshot["common"], **snapshot[config]}.items()}


@cache
def method_fields(method: str) -> dict[str, Fragment]:
    """Return the fields a stage of this method may set; dpo also takes KTO's, for loss_type kto.

    critique and label have none: they train nothing.
    """
    if method not in read_snapshot():
        return {}
    fields = trl_fields(method)
    if method == "dpo":
        losses = [*fields["loss_type"]["items"]["enum"], *OWN_LOSSES, *KTO_LOSSES]
        item = {"type": "string", "enum": losses}
        several = {"type": "array", "items": item, "minItems": 1}
        fields = {**trl_fields("kto"), **fields, "loss_type": {**fields["loss_type"], "anyOf": [item, several]}}
        fields["loss_type"] = {key: fields["loss_type"][key] for key in ("anyOf", "default", "description")}
    refused = controlled_fields(method).keys() | (OWN if method == "ppo" else ())
    return {name: fragment for name, fragment in fields.items() if name not in refused}


def _narrow(name: str, fragment: Fragment) -> Fragment:
    """Return a copy with alignkit's range and choices put on the option of the matching type."""
    fragment = json.loads(json.dumps(fragment))
    limits = dict(_RANGES.get(name, {}))
    if "typical" in limits:
        fragment["typical"] = limits.pop("typical")
    for option in fragment.get("anyOf", [fragment]):
        target = option["items"] if option.get("type") == "array" else option
        if target.get("type") in ("integer", "number"):
            target.update(limits)
        if target.get("type") == "string" and name in _CHOICES:
            target["enum"] = list(_CHOICES[name])
    return fragment
