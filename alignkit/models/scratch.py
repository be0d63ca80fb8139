"""Random weights from a configuration: builtin models and `init: scratch`.

Deliberately reads no weights; the generator is forked, so nothing drawn elsewhere changes.
"""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from alignkit.errors import ModelError, Problem
from alignkit.recipe.nearest import suggest

# Keys of a config that describe a file or a task, not an architecture.
_NOT_ARCHITECTURE = frozenset(
    {"_name_or_path", "architectures", "auto_map", "dtype", "id2label", "label2id", "model_type", "num_labels",
     "problem_type", "transformers_version", "quantization_config"}
)  # fmt: skip


def override_config(
    config: PreTrainedConfig, overrides: dict[str, Any], *, where: str | None = None
) -> PreTrainedConfig:
    """Return a new config with the overrides in force.

    Both spellings of an attribute work (`hidden_size` and GPT-2's `n_embd`). Raises ModelError for names the
    architecture does not have, all at once, and for values it does not take.
    """
    values = {key: value for key, value in config.to_dict().items() if key not in _NOT_ARCHITECTURE}
    known = set(values) | set(config.attribute_map)
    unknown = [name for name in overrides if name not in known]
    if unknown:
        raise ModelError(
            Problem(f"model.config has no {name!r} in a {config.model_type} model{suggest(name, known)}", where)
            for name in unknown
        )
    renamed = {config.attribute_map.get(name, name): value for name, value in overrides.items()}
    if renamed.keys() & {"hidden_size", "num_attention_heads"} and "head_dim" not in renamed:
        values.pop("head_dim", None)  # derived from the two
    try:
        return type(config)(**values | renamed)
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelError(f"model.config does not fit a {config.model_type} model: {reason}", where=where) from error


def fit_config_to_tokenizer(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, overrides: dict[str, Any]
) -> PreTrainedConfig:
    """Set vocabulary size (unless overridden) and special token ids of a config that gets random weights."""
    if "vocab_size" not in overrides:
        config.vocab_size = len(tokenizer)
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    return config


def random_model(
    config: PreTrainedConfig, *, seed: int, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Build a causal language model with random weights on the CPU; equal seeds give equal bytes.

    Weights are drawn in float32 and then cast, so that bfloat16 is the rounding of the float32 model.
    """
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
        except ValueError as error:
            raise ModelError(f"model.config does not make a {config.model_type} model: {error}") from error
    return model.to(dtype)
