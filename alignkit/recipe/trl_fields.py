"""The fields of TRL's config classes as a recipe may use them: what TRL says, narrowed to what makes sense here.

`fields.json` is the generated snapshot of TRL; here are ranges, alignkit's own losses and, for each field that a recipe
cannot set and each name from elsewhere, what to write instead. TRL itself is never imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

# Fields of GRPOConfig that are keys of alignkit's own, with their own ranges.
OWN = ("temperature", "num_generations")

# What a ppo stage cannot set.
PPO_CONTROLLED: dict[str, str] = {
    **dict.fromkeys(
        ("top_p", "top_k", "min_p", "repetition_penalty"),
        "PPO samples from the policy itself, or the ratios and the KL would be of something else; set temperature",
    ),
    "generation_kwargs": "set temperature, max_new_tokens and min_new_tokens; all else of sampling is fixed by PPO",
    **dict.fromkeys(
        ("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers",
         "dataloader_pin_memory", "dataloader_drop_last", "dataloader_multiprocessing_context"),
        "rollouts take the prompts from a stream of their own; there is no loader to set up",
    ),
    "disable_dropout": "dropout is always off in PPO: at the first step the ratio must be exactly 1",
    "cast_lm_head_to_fp32": "log-probabilities are computed in float32; set model.dtype: float32 for the whole model",
    "max_completion_length": "set max_new_tokens",
    **dict.fromkeys(
        ("num_generations_eval", "eval_strategy", "eval_steps", "eval_on_start", "eval_delay",
         "eval_accumulation_steps", "per_device_eval_batch_size"),
        "rollouts are measured at every step, and the prompts of `eval:` are answered at the end",
    ),
    "ds3_gather_for_generation": "sharding belongs to the launcher",
    **dict.fromkeys(
        ("generation_batch_size", "steps_per_generation"),
        "a rollout is batch_size x minibatches answers; set those",
    ),
    "num_iterations": "set ppo_epochs",
    "chat_template_kwargs": "set model.chat_template_kwargs",
    **dict.fromkeys(
        ("use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex",
         "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
         "vllm_group_port", "vllm_gpu_memory_utilization", "vllm_max_model_length",
         "vllm_tensor_parallel_size"),
        "set generation: {engine: vllm, mode: colocate or server, url, gpu_memory_utilization}",
    ),
    **dict.fromkeys(
        ("vllm_importance_sampling_correction", "vllm_importance_sampling_mode",
         "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
         "vllm_importance_sampling_cap", "off_policy_mask_threshold"),
        "the trainer computes the log-probabilities of what was sampled itself, so there is nothing to correct",
    ),
    **dict.fromkeys(
        ("use_transformers_continuous_batching", "transformers_continuous_batching_config",
         "use_transformers_paged"),
        "set generation: {engine: vllm} for fast sampling",
    ),
    "beta": "set kl_coef, the factor of the KL in the reward",
    "use_bias_correction_kl": "the KL is part of the reward, not of the loss; set kl_coef",
    "epsilon": "set cliprange",
    **dict.fromkeys(("epsilon_high", "delta"), "set cliprange, the same on both sides"),
    **dict.fromkeys(
        ("loss_type", "sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_pos", "vespo_lambda_pos",
         "vespo_k_neg", "vespo_lambda_neg", "importance_sampling_level", "top_entropy_quantile"),
        "PPO has one loss; set advantage: gae, rloo, grpo or reinforce",
    ),
    **dict.fromkeys(
        ("reward_weights", "multi_objective_aggregation"),
        "give reward: a list of {model or function, weight}, which is summed",
    ),
    "scale_rewards": "set whiten_rewards or reward_normalize; the z-score of a group is advantage: grpo",
    "mask_truncated_completions": "set missing_eos: {penalty: x} or {score: x}",
    **dict.fromkeys(
        ("entropy_coef", "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta",
         "entropy_target"),
        "alignkit's PPO has no entropy bonus, as its papers have none; kl_coef keeps the policy broad",
    ),
    "max_tool_calling_iterations": "an answer is one turn; tools are not called",
    **dict.fromkeys(
        ("log_completions", "log_multimodal", "num_completions_to_print", "log_unique_prompts"),
        "samples.jsonl and metrics.jsonl hold the answers and their rewards; set samples",
    ),
    "log_completions_hub_repo": "alignkit sends nothing anywhere; samples.jsonl holds the answers",
    "label_smoothing_factor": "PPO has no labels to smooth",
    "neftune_noise_alpha": "noise in the embeddings would change the probabilities of what was sampled",
    "pad_to_multiple_of": "rollouts are padded once, to their longest answer",
    "router_aux_loss_coef": "PPO has no auxiliary loss of the experts' router",
}  # fmt: skip

# TRL's old PPOConfig (0.x and experimental up to 1.12), LLaMA-Factory, OpenRLHF, verl and TRLX.
PPO_MOVED: dict[str, str] = {
    **dict.fromkeys(("num_ppo_epochs", "max_epochs"), "it is ppo_epochs"),
    "num_mini_batches": "it is minibatches",
    **dict.fromkeys(
        ("mini_batch_size", "ppo_mini_batch_size"),
        "it is batch_size, answers per optimizer step over all devices",
    ),
    **dict.fromkeys(
        ("rollout_batch_size", "ppo_buffer_size"),
        "it is minibatches: a rollout is batch_size x minibatches answers",
    ),
    **dict.fromkeys(
        ("backward_batch_size", "micro_train_batch_size", "micro_rollout_batch_size",
         "local_rollout_forward_batch_size", "forward_batch_size"),
        "it is micro_batch_size",
    ),
    "num_total_batches": "it is max_steps",
    **dict.fromkeys(("num_episodes", "episodes"), "it is total_episodes"),
    "num_sample_generations": "it is samples",
    **dict.fromkeys(("response_length", "generate_max_len", "max_response_length"), "it is max_new_tokens"),
    **dict.fromkeys(
        ("max_prompt_length", "prompt_max_len"),
        "a prompt may take what max_new_tokens leaves of the context; longer ones are counted (max_truncated)",
    ),
    "max_length": "an answer has at most max_new_tokens, and a prompt what they leave of the context",
    "min_length": "it is min_new_tokens",
    **dict.fromkeys(
        ("stop_token", "stop_token_id"),
        "it is truncate: {token: TEXT}; the end-of-turn token always ends an answer",
    ),
    **dict.fromkeys(("missing_eos_penalty", "penalise_no_eos", "non_eos_penalty"), "it is missing_eos: {penalty: x}"),
    **dict.fromkeys(
        ("kl_estimator", "kl_penalty"),
        "the KL is log pi - log ref of the sampled tokens (k1), as in Ziegler 2019; take it out",
    ),
    "use_kl_loss": "the KL is part of the reward, not of the loss; set kl_coef",
    "init_kl_coef": "it is kl_coef, where an adaptive one starts",
    "kl_coeff": "it is kl_coef",
    **dict.fromkeys(("adap_kl_ctrl", "kl_ctrl"), "it is kl_target: a target makes kl_coef adaptive"),
    **dict.fromkeys(("target", "ppo_target"), "it is kl_target, in nats per sequence"),
    "target_kl": "it is kl_target, in nats per sequence (other tools count per token), or max_kl to stop the run",
    "early_stopping": "it is max_kl",
    "horizon": "it is kl_horizon, in episodes",
    **dict.fromkeys(("eps_clip", "clip_ratio", "clip_range"), "it is cliprange"),
    **dict.fromkeys(("value_clip", "clip_range_value"), "it is cliprange_value"),
    **dict.fromkeys(("lambd", "gae_lambda"), "it is lam"),
    **dict.fromkeys(("advantage_estimator", "adv_estimator"), "it is advantage: gae, rloo, grpo or reinforce"),
    **dict.fromkeys(("rloo_k", "n_samples_per_prompt"), "it is num_generations"),
    **dict.fromkeys(
        ("use_score_scaling", "use_score_norm", "ppo_score_norm", "normalize_reward", "scale_reward"),
        "it is reward_normalize: gain_and_bias",
    ),
    **dict.fromkeys(("score_clip", "cliprange_reward"), "it is reward_clip"),
    "reward_clip_range": "it is reward_clip: one number for both sides",
    "ppo_whiten_rewards": "it is whiten_rewards",
    **dict.fromkeys(("reward_model_path", "reward_model", "reward_pretrain"), "it is reward"),
    "reward_funcs": "it is reward: {function: pkg.module:name}",
    "remote_rm_url": "it is reward: a model, or a function that asks your server",
    **dict.fromkeys(("critic_pretrain", "value_model"), "it is value_init"),
    "sft_model_path": "it is start_from",
    "actor_learning_rate": "it is learning_rate",
    **dict.fromkeys(("critic_lr", "value_learning_rate"), "it is critic_learning_rate"),
    "ema_beta": "it is ema",
    "enable_ema": "it is ema, a decay such as 0.992",
    **dict.fromkeys(("ptx_coef", "pretrain_data"), "it is ptx: {data, coef}"),
}  # fmt: skip


Fragment = dict[str, Any]


@dataclass(frozen=True)
class OwnLoss:
    """A preference loss beside TRL's: the function of its name in train/losses.py computes it."""

    keys: Mapping[str, Fragment] = field(default_factory=dict)  # recipe keys that it alone reads
    has_reference: bool = True
    is_logistic: bool = False  # the cross-entropy of one margin: ln 2 at step 0, and it reads soft labels


def _own_key(default: float, description: str) -> Fragment:
    return {"type": "number", "minimum": 0, "default": default, "description": description}


OWN_LOSSES = {
    "cdpo": OwnLoss(is_logistic=True),
    "ipo_sum": OwnLoss(),
    "dpop": OwnLoss({"dpop_lambda": _own_key(50.0, "Weight of the penalty on chosen answers that lose probability.")}),
    "simpo": OwnLoss({"simpo_gamma": _own_key(0.5, "Margin that chosen answers must lead by.")}, has_reference=False),
    "cpo": OwnLoss({"cpo_alpha": _own_key(1.0, "Weight of the likelihood of chosen answers.")}, has_reference=False),
    "orpo": OwnLoss(has_reference=False),
}
# Those that TRL's KTOTrainer computes, on single answers.
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


# Fields of TRL that alignkit sets itself: the reason, and what to write instead.
CONTROLLED: dict[str, str] = {
    "output_dir": "the run directory is runs/NAME/STAGE, or --out DIR on the command line",
    "per_device_train_batch_size": "set batch_size (over all devices) and, if needed, micro_batch_size (per device)",
    "gradient_accumulation_steps": "it follows from batch_size and micro_batch_size",
    "auto_find_batch_size": "set micro_batch_size: auto instead",
    **dict.fromkeys(("seed", "data_seed"), "set the recipe's top-level `seed`"),
    **dict.fromkeys(("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"), "set model.dtype instead"),
    "use_cpu": "set launch.device: cpu",
    "ddp_backend": "gloo on the CPU, nccl on CUDA",
    "model_init_kwargs": "write the options in the model: section (dtype, attn_implementation, revision, ...)",
    "trust_remote_code": "a recipe cannot allow code to run; give --trust-code on the command line",
    "chat_template_path": "set model.chat_template",
    **dict.fromkeys(("eos_token", "pad_token"), "the tokenizer and model.chat_template decide it"),
    **dict.fromkeys(
        ("dataset_text_field", "dataset_kwargs", "remove_unused_columns", "label_names", "length_column_name"),
        "alignkit prepares the rows; rename columns with data.columns",
    ),
    **dict.fromkeys(
        ("shuffle_dataset", "dataloader_in_order"),
        "the order of rows is fixed by `seed`, so that a resumed run is exact; see batching",
    ),
    "train_sampling_strategy": "set batching: grouped or shuffled",
    **dict.fromkeys(
        ("accelerator_config", "parallelism_config", "fsdp", "fsdp_config", "deepspeed"),
        "set launch.strategy: ddp, fsdp, zero2 or zero3",
    ),
    "local_rank": "the launcher sets it",
    "ddp_timeout": "set launch.timeout_seconds",
    "save_total_limit": "set keep_checkpoints",
    **dict.fromkeys(
        ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
        "the reference stays fixed: a moving one is in no checkpoint, and a resumed run would differ",
    ),
    "truncation_mode": "the start of a row is kept, and what is cut is counted; raise max_length",
    "save_only_model": "a checkpoint without the optimizer cannot be resumed; model/ has the final weights alone",
    "save_on_each_node": "checkpoints are written once and sealed",
    "enable_jit_checkpoint": "SIGTERM, SIGINT and SIGUSR1 save at the end of the step anyway",
    "resume_from_checkpoint": "resuming is automatic: give the same command again",
    **dict.fromkeys(
        ("ignore_data_skip", "restore_callback_states_from_checkpoint"),
        "a resumed run must be exact, so this is not a choice",
    ),
    **dict.fromkeys(
        ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        "a run keeps its last weights; bound it with num_train_epochs or max_steps",
    ),
    **dict.fromkeys(
        ("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push",
         "hub_revision"),
        "alignkit sends nothing anywhere; upload the run's model/ yourself",
    ),
    "logging_nan_inf_filter": "a loss that is not finite stops the run; nothing is filtered",
    "disable_tqdm": "progress is drawn on a terminal and printed in lines elsewhere",
    **dict.fromkeys(("do_train", "do_predict"), "the command decides what is done"),
    "do_eval": "give `eval:` to evaluate",
    **dict.fromkeys(
        ("prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches",
         "eval_use_gather_object"),
        "alignkit computes its own metrics",
    ),
    "use_cache": "the cache is off in training: with it, packed documents see each other",
    **dict.fromkeys(
        ("use_liger_kernel", "liger_kernel_config"),
        "TRL has deprecated it; the trainers fuse the LM head themselves",
    ),
}  # fmt: skip

# Names from other tools and older versions: where the thing lives now.
MOVED: dict[str, str] = {
    **dict.fromkeys(("torch_dtype", "dtype", "bnb_4bit_compute_dtype"), "it is model.dtype"),
    "warmup_ratio": "it is warmup_steps: a number below 1 is a share of all steps",
    **dict.fromkeys(("max_seq_length", "max_seq_len", "cutoff_len", "sequence_len"), "it is max_length"),
    **dict.fromkeys(
        ("max_prompt_length", "max_completion_length"),
        "TRL has removed it; max_length bounds prompt and answer together",
    ),
    "micro_batch": "it is micro_batch_size",
    **dict.fromkeys(("train_batch_size", "global_batch_size"), "it is batch_size, over all devices"),
    **dict.fromkeys(("epochs", "num_epochs"), "it is num_train_epochs"),
    "lr": "it is learning_rate",
    "lr_scheduler": "it is lr_scheduler_type",
    "optimizer": "it is optim",
    "load_in_4bit": "it is model.quantization: nf4",
    "load_in_8bit": "it is model.quantization: int8",
    "bnb_4bit_quant_type": "it is model.quantization: nf4 or fp4",
    **dict.fromkeys(("use_bnb_nested_quant", "bnb_4bit_use_double_quant"), "it is model.double_quantization"),
    "use_peft": "give a lora: section",
    "lora_r": "it is lora.r",
    "lora_alpha": "it is lora.alpha",
    "lora_dropout": "it is lora.dropout",
    "lora_target_modules": "it is lora.target_modules",
    "lora_modules_to_save": "it is lora.modules_to_save",
    "lora_task_type": "the method decides it",
    "use_rslora": "it is lora.use_rslora",
    "use_dora": "it is lora.use_dora",
    **dict.fromkeys(("model_name_or_path", "base_model"), "it is model.path"),
    "model_revision": "it is model.revision",
    "tokenizer_name_or_path": "it is model.tokenizer",
    "attn_implementation": "it is model.attn_implementation",
    **dict.fromkeys(("dataset_name", "dataset_path"), "it is data.path"),
    "dataset_config": "it is data.name",
    "dataset_train_split": "it is data.split",
    "dataset_test_split": "it is eval: with its own split",
    **dict.fromkeys(("dataset_mixer", "datasets"), "it is data: a list of sources, each with a weight"),
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
    "hub_model_revision": "alignkit sends nothing anywhere; upload the run's model/ yourself",
    "env": "a recipe cannot set environment variables",
    "dpo_beta": "it is beta in a dpo stage",
    "label_smoothing_loss": "it is label_smoothing in a dpo stage",
}  # fmt: skip


# Methods of other tools and of TRL's other trainers, asked for as a section, a method or a loss.
ELSEWHERE: dict[str, str] = {
    "grpo": "write `ppo:` with advantage: grpo",
    "rloo": "write `ppo:` with advantage: rloo",
    "reinforce": "write `ppo:` with advantage: reinforce",
    "kto": "write `dpo:` with loss_type: kto",
    "ipo": "write `dpo:` with loss_type: ipo",
    "cdpo": "write `dpo:` with loss_type: cdpo",
    "bco": "write `dpo:` with loss_type: bco_pair",
    **{name: f"write `dpo:` with loss_type: {name}" for name in ("orpo", "simpo", "cpo", "dpop")},
    "reward": "write `rm:`",
    "reward_modeling": "write `rm:`",
    "pretrain": "write `sft:` with objective: lm",
    "pt": "write `sft:` with objective: lm",
    **dict.fromkeys(
        ("gkd", "gspo", "dapo", "online_dpo", "nash_md", "xpo", "prm"),
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
        fields |= {key: fragment for loss in OWN_LOSSES.values() for key, fragment in loss.keys.items()}
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
