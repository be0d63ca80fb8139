"""The fields of TRL's config classes (in `fields.json`) as a recipe may use them, and advice on other names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any


def _by_name(names: Mapping[str, str]) -> dict[str, str]:
    """Turn a table of what is said, each with the names it is said of, into one by name."""
    return {name: what for what, listed in names.items() for name in listed.split()}


# Fields of GRPOConfig that are keys of alignkit's own, with their own ranges.
OWN = ("temperature", "num_generations", "top_p", "top_k", "scale_rewards")

# What a ppo stage cannot set.
PPO_CONTROLLED = _by_name({
    "PPO samples from the policy itself, or the ratios and the KL would be of something else; set temperature, top_p "
    "or top_k": "min_p repetition_penalty",
    "set temperature, top_p, top_k, stop, max_new_tokens and min_new_tokens": "generation_kwargs",
    "rollouts take the prompts from a stream of their own; there is no loader to set up":
        "dataloader_num_workers dataloader_prefetch_factor dataloader_persistent_workers dataloader_pin_memory "
        "dataloader_drop_last dataloader_multiprocessing_context",
    "dropout is always off in PPO: at the first step the ratio must be exactly 1": "disable_dropout",
    "log-probabilities are computed in float32; set model.dtype: float32 for the whole model": "cast_lm_head_to_fp32",
    "set max_new_tokens": "max_completion_length",
    "rollouts are measured at every step, and the prompts of `eval:` are answered at the end":
        "num_generations_eval eval_strategy eval_steps eval_on_start eval_delay eval_accumulation_steps "
        "per_device_eval_batch_size",
    "sharding belongs to the launcher": "ds3_gather_for_generation",
    "a rollout is batch_size x minibatches answers; set those": "generation_batch_size steps_per_generation",
    "set ppo_epochs": "num_iterations",
    "set model.chat_template_kwargs": "chat_template_kwargs",
    "set generation: {engine: vllm, mode: colocate or server, url, gpu_memory_utilization}":
        "use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex "
        "vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port "
        "vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size",
    "set generation.importance_cap":
        "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max "
        "vllm_importance_sampling_clip_min vllm_importance_sampling_cap off_policy_mask_threshold",
    "set generation: {engine: vllm} for fast sampling":
        "use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged",
    "set kl_coef, the factor of the KL (kl_in: reward or loss)": "beta",
    "the KL in the loss is k3 as it stands; set kl_in: loss": "use_bias_correction_kl",
    "set cliprange": "epsilon",
    "set cliprange_high": "epsilon_high",
    "the ratio has two bounds: cliprange and cliprange_high": "delta",
    "set importance: token or sequence": "importance_sampling_level",
    "set loss_normalization: token (dapo), sequence (grpo) or constant (dr_grpo), or preset:": "loss_type",
    "PPO has one loss; set advantage: gae, rloo, grpo or reinforce":
        "sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg "
        "vespo_lambda_neg top_entropy_quantile",
    "give reward: a list of {model or function, weight}, which is summed": "reward_weights multi_objective_aggregation",
    "set overlong: {filter: true}": "mask_truncated_completions",
    "alignkit's PPO has no entropy bonus, as its papers have none; kl_coef keeps the policy broad":
        "entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target",
    "an answer is one turn; tools are not called": "max_tool_calling_iterations",
    "samples.jsonl and metrics.jsonl hold the answers and their rewards; set samples":
        "log_completions log_multimodal num_completions_to_print log_unique_prompts",
    "alignkit sends nothing anywhere; samples.jsonl holds the answers": "log_completions_hub_repo",
    "PPO has no labels to smooth": "label_smoothing_factor",
    "noise in the embeddings would change the probabilities of what was sampled": "neftune_noise_alpha",
    "rollouts are padded once, to their longest answer": "pad_to_multiple_of",
    "PPO has no auxiliary loss of the experts' router": "router_aux_loss_coef",
})  # fmt: skip

# TRL's old PPOConfig (0.x and experimental up to 1.12), LLaMA-Factory, OpenRLHF, verl and TRLX.
PPO_MOVED = _by_name({
    "it is ppo_epochs": "num_ppo_epochs max_epochs",
    "it is minibatches": "num_mini_batches",
    "it is batch_size, answers per optimizer step over all devices": "mini_batch_size ppo_mini_batch_size",
    "it is minibatches: a rollout is batch_size x minibatches answers": "rollout_batch_size ppo_buffer_size",
    "it is micro_batch_size":
        "backward_batch_size micro_train_batch_size micro_rollout_batch_size local_rollout_forward_batch_size "
        "forward_batch_size",
    "it is max_steps": "num_total_batches",
    "it is total_episodes": "num_episodes episodes",
    "it is samples": "num_sample_generations",
    "it is max_new_tokens": "response_length generate_max_len max_response_length",
    "a prompt may take what max_new_tokens leaves of the context; longer ones are counted (max_truncated)":
        "max_prompt_length prompt_max_len",
    "an answer has at most max_new_tokens, and a prompt what they leave of the context": "max_length",
    "it is min_new_tokens": "min_length",
    "it is truncate: {token: TEXT}; the end-of-turn token always ends an answer": "stop_token stop_token_id",
    "it is stop": "stop_strings stop_sequences",
    "it is overlong: {filter: true}": "overlong_filter overlong_filtering mask_truncated",
    "it is overlong: {buffer, penalty}": "overlong_buffer soft_max_length soft_cache_length",
    "it is dynamic_sampling": "dynamic_sample filter_groups max_resample_times active_sampling",
    "it is loss_normalization": "loss_agg_mode loss_reduction token_level_loss use_token_level_loss",
    "it is missing_eos: {penalty: x}": "missing_eos_penalty penalise_no_eos non_eos_penalty",
    "it is kl_in: reward (k1, as in Ziegler 2019) or loss (k3)":
        "kl_estimator kl_penalty kl_loss_type use_kl_loss use_kl_in_reward",
    "it is kl_in: loss with kl_coef": "kl_loss_coef",
    "it is kl_coef, where an adaptive one starts": "init_kl_coef",
    "it is kl_coef": "kl_coeff",
    "it is kl_target: a target makes kl_coef adaptive": "adap_kl_ctrl kl_ctrl",
    "it is kl_target, in nats per sequence": "target ppo_target",
    "it is kl_target, in nats per sequence (other tools count per token), or max_kl to stop the run": "target_kl",
    "it is max_kl": "early_stopping",
    "it is kl_horizon, in episodes": "horizon",
    "it is cliprange": "eps_clip clip_ratio clip_range clip_ratio_low eps_clip_low epsilon_low",
    "it is cliprange_high": "clip_ratio_high eps_clip_high",
    "it is cliprange_value": "value_clip clip_range_value",
    "it is lam": "lambd gae_lambda",
    "it is advantage: gae, rloo, grpo or reinforce": "advantage_estimator adv_estimator",
    "it is num_generations": "rloo_k n_samples_per_prompt",
    "it is reward_normalize: gain_and_bias":
        "use_score_scaling use_score_norm ppo_score_norm normalize_reward scale_reward",
    "it is reward_clip": "score_clip cliprange_reward",
    "it is reward_clip: one number for both sides": "reward_clip_range",
    "it is whiten_rewards": "ppo_whiten_rewards",
    "it is reward": "reward_model_path reward_model reward_pretrain",
    "it is reward: {function: pkg.module:name}": "reward_funcs",
    "it is reward: a model, or a function that asks your server": "remote_rm_url",
    "it is value_init": "critic_pretrain value_model",
    "it is start_from": "sft_model_path",
    "it is learning_rate": "actor_learning_rate",
    "it is critic_learning_rate": "critic_lr value_learning_rate",
    "it is ema": "ema_beta",
    "it is ema, a decay such as 0.992": "enable_ema",
    "it is ptx: {data, coef}": "ptx_coef pretrain_data",
})  # fmt: skip


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

# What TRL leaves open. "typical" is shown in messages and in the schema's descriptions.
_LIMITS: dict[str, Fragment] = {
    "learning_rate": {"exclusiveMinimum": 0, "typical": "1e-6 to 5e-4"},
    "beta": {"exclusiveMinimum": 0, "typical": "0.05 to 0.5"},
    "num_train_epochs": {"exclusiveMinimum": 0, "typical": "1 to 3"},
    "max_steps": {"minimum": -1},
    "max_length": {"minimum": 2, "typical": "512 to 4096"},
    "warmup_steps": {"minimum": 0, "typical": "0.03 to 0.1 of all steps, or a count; the first step is above 0"},
    "weight_decay": {"minimum": 0, "typical": "0 to 0.1"},
    "max_grad_norm": {"minimum": 0, "typical": "0.3 to 1"},
    "label_smoothing": {"minimum": 0, "exclusiveMaximum": 1, "typical": "0.1"},
    "neftune_noise_alpha": {"exclusiveMinimum": 0, "typical": "5 to 15"},
    "center_rewards_coefficient": {"minimum": 0, "typical": "0.01"},
    "adam_beta1 adam_beta2 label_smoothing_factor": {"minimum": 0, "exclusiveMaximum": 1},
    "adam_epsilon logging_steps save_steps eval_steps discopop_tau": {"exclusiveMinimum": 0},
    "eval_delay dataloader_num_workers router_aux_loss_coef loss_weights": {"minimum": 0},
    "desirable_weight undesirable_weight": {"minimum": 0},
    "eval_accumulation_steps per_device_eval_batch_size torch_empty_cache_steps dataset_num_proc "
    "dataloader_prefetch_factor ddp_bucket_cap_mb pad_to_multiple_of precompute_ref_batch_size "
    "ref_model_sync_steps": {"minimum": 1},
    "ld_alpha ref_model_mixup_alpha": {"minimum": 0, "maximum": 1},
}  # fmt: skip
_RANGES = {name: limits for names, limits in _LIMITS.items() for name in names.split()}
_CHOICES = {
    "include_num_input_tokens_seen": ("no", "all", "non_padding"),
    "pad_to_multiple_of": ("auto",),
    "save_strategy": ("no", "steps", "epoch"),  # best needs load_best_model_at_end
    "debug": ("underflow_overflow", "tpu_metrics_debug"),
    "torch_compile_backend": ("inductor", "eager", "aot_eager", "cudagraphs", "onnxrt", "openxla", "tvm"),
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
}


# Fields of TRL that alignkit sets itself: the reason, and what to write instead.
CONTROLLED = _by_name({
    "the run directory is runs/NAME/STAGE, or --out DIR on the command line": "output_dir",
    "set batch_size (over all devices) and, if needed, micro_batch_size (per device)": "per_device_train_batch_size",
    "it follows from batch_size and micro_batch_size": "gradient_accumulation_steps",
    "set micro_batch_size: auto instead": "auto_find_batch_size",
    "set the recipe's top-level `seed`": "seed data_seed",
    "set model.dtype instead": "bf16 fp16 bf16_full_eval fp16_full_eval",
    "set launch.device: cpu": "use_cpu",
    "gloo on the CPU, nccl on CUDA": "ddp_backend",
    "write the options in the model: section (dtype, attn_implementation, revision, ...)": "model_init_kwargs",
    "a recipe cannot allow code to run; give --trust-code on the command line": "trust_remote_code",
    "set model.chat_template": "chat_template_path",
    "the tokenizer and model.chat_template decide it": "eos_token pad_token",
    "alignkit prepares the rows; rename columns with data.columns":
        "dataset_text_field dataset_kwargs remove_unused_columns label_names length_column_name",
    "the order of rows is fixed by `seed`, so that a resumed run is exact; see batching":
        "shuffle_dataset dataloader_in_order",
    "set batching: grouped or shuffled": "train_sampling_strategy",
    "set launch.strategy: ddp, fsdp, zero2 or zero3":
        "accelerator_config parallelism_config fsdp fsdp_config deepspeed",
    "the launcher sets it": "local_rank",
    "set launch.timeout_seconds": "ddp_timeout",
    "set keep_checkpoints": "save_total_limit",
    "the reference stays fixed: a moving one is in no checkpoint, and a resumed run would differ":
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
    "the start of a row is kept, and what is cut is counted; raise max_length": "truncation_mode",
    "a checkpoint without the optimizer cannot be resumed; model/ has the final weights alone": "save_only_model",
    "checkpoints are written once and sealed": "save_on_each_node",
    "SIGTERM, SIGINT and SIGUSR1 save at the end of the step anyway": "enable_jit_checkpoint",
    "resuming is automatic: give the same command again": "resume_from_checkpoint",
    "a resumed run must be exact, so this is not a choice": "ignore_data_skip restore_callback_states_from_checkpoint",
    "it is keep_best: NAME, the weights of the best evaluation; +NAME: higher is better, -NAME: lower":
        "load_best_model_at_end metric_for_best_model greater_is_better",
    "alignkit sends nothing anywhere; upload the run's model/ yourself":
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
    "a loss that is not finite stops the run; nothing is filtered": "logging_nan_inf_filter",
    "progress is drawn on a terminal and printed in lines elsewhere": "disable_tqdm",
    "the command decides what is done": "do_train do_predict",
    "give `eval:` to evaluate": "do_eval",
    "alignkit computes its own metrics":
        "prediction_loss_only include_for_metrics batch_eval_metrics eval_do_concat_batches eval_use_gather_object",
    "the cache is off in training: with it, packed documents see each other": "use_cache",
    "TRL has deprecated it; the trainers fuse the LM head themselves": "use_liger_kernel liger_kernel_config",
})  # fmt: skip

# Names from other tools and older versions: where the thing lives now.
MOVED = _by_name({
    "it is model.dtype": "torch_dtype dtype bnb_4bit_compute_dtype",
    "it is warmup_steps: a number below 1 is a share of all steps": "warmup_ratio",
    "it is max_length": "max_seq_length max_seq_len cutoff_len sequence_len max_token_length model_max_length max_len",
    "TRL has removed it; max_length bounds prompt and answer together": "max_prompt_length max_completion_length",
    "it is micro_batch_size": "micro_batch ppo_micro_batch_size_per_gpu log_prob_micro_batch_size_per_gpu",
    "it is batch_size, over all devices": "train_batch_size global_batch_size",
    "it is num_train_epochs": "epochs num_epochs max_epochs",
    "it is learning_rate": "lr",
    "it is lr_scheduler_type": "lr_scheduler scheduler",
    "it is optim": "optimizer",
    "it is model.quantization: nf4": "load_in_4bit",
    "it is model.quantization: int8": "load_in_8bit",
    "it is model.quantization: nf4 or fp4": "bnb_4bit_quant_type",
    "it is model.double_quantization": "use_bnb_nested_quant bnb_4bit_use_double_quant",
    "give a lora: section": "use_peft use_lora adapter finetuning_type tuner_type train_type peft",
    "it is lora.r": "lora_r lora_rank",
    "it is lora.alpha": "lora_alpha",
    "it is lora.dropout": "lora_dropout",
    "it is lora.target_modules": "lora_target_modules lora_target lora_attn_modules",
    "it is lora.target_modules: all-linear": "lora_target_linear apply_lora_to_mlp",
    "it is lora.modules_to_save": "lora_modules_to_save",
    "the method decides it": "lora_task_type",
    "it is lora.use_rslora": "use_rslora",
    "it is lora.use_dora": "use_dora",
    "it is model.path": "model_name_or_path base_model model_name model_id checkpoint_dir",
    "it is model.revision": "model_revision",
    "it is model.tokenizer": "tokenizer_name_or_path tokenizer_name tokenizer",
    "it is model.attn_implementation": "attn_implementation flash_attn flash_attention attn_impl attention_backend",
    "it is data.path, a file, a directory or a hub id": "dataset_name dataset_path dataset train_dataset dataset_id",
    "it is data.max_rows": "max_samples max_train_samples",
    "it is data.columns": "field_messages field_chosen field_rejected input_key output_key chosen_key rejected_key",
    "it is data.name": "dataset_config",
    "it is data.split": "dataset_train_split dataset_splits dataset_mixer_list_splits",
    "it is eval: with its own split": "dataset_test_split",
    "it is data: a list of sources, each with a weight": "dataset_mixer dataset_mixture dataset_mixer_list datasets",
    "it is eval: a share of the data, such as 0.05": "val_set_size split_dataset_ratio test_split_size val_size",
    "it is eval: a source, or a share of the data": "dataset_mixer_eval_list eval_dataset val_dataset",
    "--force moves the old run aside": "overwrite_output_dir",
    "it is launch.device: cpu": "no_cuda",
    "it is batching: grouped": "group_by_length batching_strategy",
    "it is packing": "sample_packing pack packed",
    "it is eval_packing": "eval_sample_packing",
    "it is gradient_checkpointing": "enable_activation_checkpointing "
        "enable_gradient_checkpointing gradient_checkpointing_enable recompute_granularity",
    "it is activation_offloading": "enable_activation_offloading",
    "it is torch_compile": "compile",
    "it is logging_steps": "log_every_n_steps logging_interval",
    "it is save_steps": "save_freq checkpointing_steps checkpoint_every save_interval checkpoint_state_freq",
    "it is save_steps: a number below 1 is a share of all steps, so n an epoch are 1 / (n x num_train_epochs)":
        "saves_per_epoch",
    "it is eval_steps": "eval_interval local_eval_every eval_freq",
    "it is eval_steps: a number below 1 is a share of all steps, so n an epoch are 1 / (n x num_train_epochs)":
        "evals_per_epoch",
    "it is max_steps, over all epochs": "max_steps_per_epoch",
    "it is keep_checkpoints": "keep_last_n_checkpoints",
    "it is patience, with keep_best: loss": "early_stopping_patience early_stopping",
    "it is beta": "pref_beta",
    "it is run_name": "exp_name swanlab_experiment_name wandb_name",
    "it is report_to: wandb": "use_wandb with_tracking use_swanlab enable_wandb",
    "it is project": "wandb_project swanlab_project",
    "it is dataset_num_proc": "preprocessing_num_workers",
    "it is torch_empty_cache_steps": "empty_device_cache_steps",
    "it is per_device_eval_batch_size": "eval_batch_size",
    "it is loss_type: orpo with beta": "orpo_alpha",
    "it is lr_scheduler_kwargs: {min_lr: x} with lr_scheduler_type: cosine_with_min_lr": "eta_min",
    "it is model.chat_template": "template chat_template chat_template_name",
    "it is model.init: scratch": "load_pretrained_weights",
    "it is evaluate.tasks: lm_eval:TASK, measured after training": "oe_eval_tasks",
    "the section's name says the method, or method: sft | rm | dpo | ppo":
        "stage rl rlhf_type trainer_type training_type task_type",
    "it is launch.processes": "num_gpus num_gpus_per_node n_gpus_per_node nproc_per_node num_learners_per_node",
    "it is launch.nodes": "nnodes num_nodes",
    "it is launch.strategy: zero2 or zero3": "deepspeed_stage zero_stage",
    "it is launch.strategy: fsdp": "fsdp_version enable_fsdp dist_config",
    "alignkit shards data, optimizer and weights (launch.strategy), and no layer over several devices":
        "tensor_parallel_size context_parallel_size tensor_model_parallel_size pipeline_model_parallel_size "
        "expert_model_parallel_size sequence_parallel sequence_parallel_size",
    "kernels are those of the installed libraries; see model.attn_implementation":
        "liger_rope liger_rms_norm liger_layer_norm liger_glu_activation liger_fused_linear_cross_entropy "
        "enable_liger_kernel lora_mlp_kernel lora_qkv_kernel lora_o_kernel use_v1_kernels kernel_config plugins",
    "the checkpoint says it":
        "model_type tokenizer_type model_class strict use_slow_tokenizer is_llama_derived_model special_tokens",
    "rows are read once, kept by their content and ordered by seed": "dataset_prepared_path overwrite_cache shuffle "
        "load_from_cache_file dataset_mix_dir",
    "the run's directory is for it: report.html, metrics.jsonl, result.json": "plot_loss log_peak_memory_stats",
    "a loss that is not finite stops the run": "loss_watchdog_threshold loss_watchdog_patience",
    "batches are padded to their longest row": "pad_to_sequence_len",
    "there is no training with simulated quantisation; model.quantization: nf4 trains adapters on a 4-bit base": "qat",
    "there is no distillation from a teacher": "teacher_model lmbda offload_teacher_model",
    "logs are written to the run directory": "logging_dir",
    "weights are always safetensors": "save_safetensors",
    "TRL has removed it": "reference_free",
    "TRL has removed it; write loss_type: [sigmoid, sft] with loss_weights": "rpo_alpha",
    "the reference is the model the stage starts from": "ref_model",
    "the reference is loaded like the model": "ref_model_init_kwargs",
    "alignkit sends nothing anywhere; upload the run's model/ yourself": "hub_model_revision",
    "a recipe cannot set environment variables": "env",
    "it is beta in a dpo stage": "dpo_beta",
    "it is label_smoothing in a dpo stage": "label_smoothing_loss",
})  # fmt: skip


# Methods of other tools and of TRL's other trainers, asked for as a section, a method or a loss.
ELSEWHERE = _by_name({
    "write `ppo:` with advantage: grpo, or preset: grpo for its paper's values": "grpo",
    "write `ppo:` with advantage: rloo, or preset: rloo for its paper's values": "rloo",
    "write `ppo:` with preset: dapo": "dapo",
    "write `ppo:` with preset: drgrpo": "drgrpo dr_grpo",
    "write `ppo:` with preset: gspo": "gspo",
    "write `ppo:` with advantage: reinforce": "reinforce",
    "write `dpo:` with loss_type: kto": "kto",
    "write `dpo:` with loss_type: ipo": "ipo",
    "write `dpo:` with loss_type: cdpo": "cdpo",
    "write `dpo:` with loss_type: bco_pair": "bco",
    "write `dpo:` with loss_type: orpo": "orpo",
    "write `dpo:` with loss_type: simpo": "simpo",
    "write `dpo:` with loss_type: cpo": "cpo",
    "write `dpo:` with loss_type: dpop": "dpop",
    "write `rm:`": "reward reward_modeling",
    "write `sft:` with objective: lm": "pretrain pt",
    "alignkit has no such method; `dpo:` learns from pairs, `ppo:` from a reward":
        "gkd online_dpo nash_md xpo prm",
})  # fmt: skip


# By method, with what is said of all of them.
CONTROLLED_IN = {"ppo": CONTROLLED | PPO_CONTROLLED}
MOVED_IN = {"ppo": MOVED | PPO_MOVED}


@cache
def read_snapshot() -> dict[str, dict[str, Any]]:
    """The generated snapshot of TRL as it is."""
    data: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "fields.json").read_text(encoding="utf-8"))
    return data


@cache
def trl_fields(config: str) -> dict[str, Fragment]:
    """Every field of a config class ("sft", "rm", "dpo", "kto", "ppo"), narrowed; CONTROLLED ones included."""
    snapshot = read_snapshot()
    return {name: _narrow(name, fragment) for name, fragment in {**snapshot["common"], **snapshot[config]}.items()}


@cache
def method_fields(method: str) -> dict[str, Fragment]:
    """The fields a stage of this method may set, none if it trains nothing; dpo takes KTO's too, for loss_type kto."""
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
    refused = CONTROLLED_IN.get(method, CONTROLLED).keys() | (OWN if method == "ppo" else ())
    return {name: fragment for name, fragment in fields.items() if name not in refused}


def _narrow(name: str, fragment: Fragment) -> Fragment:
    """Put alignkit's range and choices on the option of the matching type, in a copy."""
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
