"""The TRL fields that alignkit sets when a recipe does not, where TRL's own default does not fit.

A pure table: it looks at nothing but its arguments. Sources of the numbers: TRL 1.16's documentation and example
scripts (LoRA takes ten times the learning rate of full fine-tuning), the alignment-handbook's Zephyr recipes, and
GPT-1 section 4.1 for training from scratch.
"""

from __future__ import annotations

from typing import Any

# learning rate with LoRA, and of all weights
_LEARNING_RATES = {"sft": (2e-4, 2e-5), "rm": (1e-4, 1e-5), "dpo": (5e-6, 5e-7), "ppo": (1e-5, 1e-6)}
_FROM_SCRATCH = 2.5e-4


def choose_defaults(method: str, *, lora: bool, scratch: bool, builtin: bool, evaluates: bool) -> dict[str, Any]:
    """Return alignkit's defaults of TRL fields for a stage; `builtin`: a tiny model that ships with alignkit."""
    with_lora, full = _LEARNING_RATES[method]
    defaults: dict[str, Any] = {
        "learning_rate": _FROM_SCRATCH if scratch else with_lora if lora else full,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # a share of all steps
        "max_grad_norm": 1.0,
        "max_length": 1024,
        "num_train_epochs": 1.0,
        "logging_steps": 10,
        "save_steps": 100,
    }
    if method == "ppo":  # Adam's eps as in lm-human-preferences; prompt and answer are bounded by max_new_tokens
        defaults |= {"adam_epsilon": 1e-5}
        del defaults["max_length"]
        evaluates = False  # rollouts are the evaluation; held-out prompts are for samples
    if builtin:  # recomputing activations only pays where they are large
        defaults["gradient_checkpointing"] = False
    if evaluates:
        defaults |= {"eval_strategy": "steps", "eval_steps": 0.1}
    return defaults
