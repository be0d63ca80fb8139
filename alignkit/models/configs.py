"""Configurations of models: read, held to sizes that can be built, and what they need to be loaded.

It reads configs, never weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.quantizers import AutoHfQuantizer

from alignkit.errors import AlignKitError, EnvironmentProblem, ModelError, Problem, first_line
from alignkit.models.files import find_model_dir, is_builtin
from alignkit.models.hub import explain_hub_errors
from alignkit.models.scratch import builtin_config

# The largest that can be meant: models have some hundred layers, and contexts of some ten million tokens.
_LIMITS = {
    "num_hidden_layers": 4096, "num_attention_heads": 2**16, "num_key_value_heads": 2**16, "head_dim": 2**16,
    "hidden_size": 2**20, "intermediate_size": 2**22, "vocab_size": 2**24, "max_position_embeddings": 2**28,
    "num_local_experts": 2**16, "num_experts": 2**16, "n_routed_experts": 2**16,
}  # fmt: skip

_GENERATION_NUMBERS = {
    "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size", "max_length",
    "max_new_tokens", "min_length", "num_beams",
}  # fmt: skip


def read_config(source: str, *, revision: str | None = None, trust_code: bool = False) -> PreTrainedConfig:
    """Return the config of a builtin name, a directory or a hub id.

    Raises ModelError for one that cannot be read or whose sizes cannot be meant, naming the file; EnvironmentProblem
    when the hub cannot be reached.
    """
    if is_builtin(source):
        return builtin_config(source)
    directory = find_model_dir(source)
    place = str(directory / "config.json") if directory else source
    try:
        with explain_hub_errors(source):
            config = AutoConfig.from_pretrained(
                str(directory or source), revision=revision, trust_remote_code=trust_code
            )
    except AlignKitError:
        raise
    except Exception as error:  # config classes check and compute as they like
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        remedy = "; put that right" if directory else ""
        raise ModelError(f"is not the config of a model: {reason[0].strip()}{remedy}", where=place) from error
    require_sizes(config, place)
    if directory and (directory / "generation_config.json").exists():
        _require_generation(directory)
    return config


def _require_generation(directory: Path) -> None:
    """Raise ModelError for a generation_config.json with words or negative numbers for its settings."""
    place = str(directory / "generation_config.json")
    try:
        settings = GenerationConfig.from_pretrained(str(directory)).to_diff_dict()
    except Exception as error:  # it computes with what stands there
        raise ModelError(f"cannot be read: {error}; mend it or take it away", where=place) from error
    wrong: dict[str, Any] = {
        name: settings[name]
        for name in _GENERATION_NUMBERS & settings.keys()
        if settings[name] is not None and not (isinstance(settings[name], int | float) and settings[name] >= 0)
    }
    if wrong:
        said = ", ".join(f"{name} is {value!r}" for name, value in sorted(wrong.items()))
        raise ModelError(f"{said}; these are numbers from 0; mend it or take it away", where=place)


def require_sizes(config: PreTrainedConfig, place: str | None) -> None:
    """Raise ModelError for every size of a config that is no positive whole number or larger than can be meant."""
    text = config.get_text_config()
    problems = []
    for name, limit in _LIMITS.items():
        value = getattr(text, name, None)
        sizes = value if isinstance(value, list) else [value]
        if any(size is not None and (not isinstance(size, int) or not 1 <= size <= limit) for size in sizes):
            own = text.attribute_map.get(name, name)
            problems.append(Problem(f"{own} is {value!r}; it must be a whole number from 1 to {limit:,}", place))
    if problems:
        raise ModelError(problems)


def require_packages(config: PreTrainedConfig, source: str) -> None:
    """Raise EnvironmentProblem where the packages or devices that a quantised base needs are not here."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    try:
        AutoHfQuantizer.from_config(stored, pre_quantized=True).validate_environment(device_map=None)
    except (ImportError, RuntimeError) as error:
        what = f"{source} has quantised weights that cannot be used here: {first_line(error)}"
        raise EnvironmentProblem(what) from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ModelError(f"its quantization_config cannot be used: {error}", where=source) from error


def know_classifier(config: PreTrainedConfig) -> None:
    """Let transformers' AutoModelForSequenceClassification build a score head on any causal language model.

    Granite, Cohere, OLMoE and others come without such a class. It is made as transformers makes Llama's: the trunk
    and a linear head, read at the last token that is not padding. Raises ModelError where there is no such trunk.
    """
    kind = type(config)
    known: Any = AutoModelForSequenceClassification._model_mapping
    if kind in known:
        return
    causal: Any = AutoModelForCausalLM._model_mapping
    trunks = [c for c in causal[kind].__mro__ if c.__name__.endswith("PreTrainedModel")] if kind in causal else []
    if not trunks or trunks[0] is PreTrainedModel:
        raise ModelError(f"a {config.model_type} model cannot be given a score head: transformers knows no trunk of it")
    name = causal[kind].__name__.replace("ForCausalLM", "").replace("LMHeadModel", "") + "ForSequenceClassification"
    made = type(name, (GenericForSequenceClassification, trunks[0]), {"__module__": trunks[0].__module__})
    AutoModelForSequenceClassification.register(kind, made, exist_ok=True)  # else it passes over its own configs
