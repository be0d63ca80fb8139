"""Any sequence classifier as a reward model: loaded safely, frozen, with the tokenizer that belongs to it.

Deliberately scores nothing; what its labels mean for a reward is the business of `train.reward_model`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from alignkit.errors import ModelError
from alignkit.models.bases import keep_four_bit_layout, pick_device
from alignkit.models.configs import know_classifier, read_config
from alignkit.models.files import ModelFiles, find_model_dir, inspect_model_dir
from alignkit.models.hub import explain_hub_errors, fetch_adapter, quiet_transformers
from alignkit.models.load import load_trained

_FAMILY = "ForSequenceClassification"


@dataclass
class Classifier:
    """A frozen classifier with one or two labels."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerFast
    num_labels: int
    is_own: bool  # saved by alignkit: trained on whole answers, their end token included
    positions: int | None  # the longest text it can read, in tokens


def load_classifier(source: str, *, device: str = "auto", trust_code: bool = False) -> Classifier:
    """Load a classifier from a run, a directory or a hub id; safetensors only.

    Raises ModelError for a language model, for more than two labels, for pickles and for a missing tokenizer.
    """
    directory = find_model_dir(source) or fetch_adapter(source, None)
    files = inspect_model_dir(directory, trust_code=trust_code) if directory else None
    place = str(directory or source)
    config = read_config(place, trust_code=trust_code) if files is None or files.kind == "full" else None
    _require_classifier(place, files, config)
    tokenizer = _load_tokenizer(place, files, trust_code=trust_code)
    model: PreTrainedModel | PeftModel
    if config is None or (files is not None and files.record):
        assert directory is not None
        model = load_trained(directory, device=device, reward=True, trust_code=trust_code)
    else:
        model = _load_full(place, config, device=device, trust_code=trust_code)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if inner.config.pad_token_id is None:
        inner.config.pad_token_id = tokenizer.pad_token_id
    positions = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    is_own = files is not None and bool(files.record)
    return Classifier(model, tokenizer, inner.config.num_labels, is_own, positions)


def hold_on_base(directory: Path, model: PeftModel, *, trust_code: bool = False) -> Classifier:
    """Describe a reward adapter that a policy's base carries: it reads its own tokenizer and template all the same."""
    files = inspect_model_dir(directory, trust_code=trust_code)
    tokenizer = _load_tokenizer(str(directory), files, trust_code=trust_code)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return Classifier(model, tokenizer, 1, bool(files.record), positions)


def _require_classifier(source: str, files: ModelFiles | None, config: PreTrainedConfig | None) -> None:
    """Refuse what has no head for scores: transformers would draw one at random and only say so in a log."""
    if config is None:
        if files is not None and not files.reward:
            raise ModelError(f"{source} is the adapter of a language model, not of a reward model")
        return
    kinds = config.architectures or []
    if not any(kind.endswith(_FAMILY) for kind in kinds):
        found = ", ".join(kinds) or "a model without architectures in its config.json"
        raise ModelError(f"{source} is {found}; a reward model is a ...{_FAMILY}, such as an rm stage makes")
    if config.num_labels > 2:
        raise ModelError(
            f"{source} has {config.num_labels} labels; a reward needs one (its logit) or two (their log-odds)"
        )


def _load_tokenizer(source: str, files: ModelFiles | None, *, trust_code: bool) -> PreTrainedTokenizerFast:
    if files is not None and not files.has_tokenizer:
        raise ModelError(f"{source} has no tokenizer; copy the one it was trained with into it")
    with explain_hub_errors(source), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_code)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{source} has no fast tokenizer (tokenizer.json); convert it once")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"the tokenizer of {source} has neither a pad nor an eos token; set one in its config")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_full(source: str, config: PreTrainedConfig, *, device: str, trust_code: bool) -> PreTrainedModel:
    where = pick_device(device)
    # Half precision is slow on a CPU, and a foreign model says nothing of how it was trained.
    dtype = torch.float32 if where == "cpu" else (config.dtype or torch.float32)
    know_classifier(config)
    with explain_hub_errors(source), quiet_transformers():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=trust_code, output_loading_info=True
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"{len(missing)} tensors are missing, first {missing[0]}; the copy is incomplete", where=source
        )
    loaded: PreTrainedModel = model.to(where).requires_grad_(False).eval()
    return keep_four_bit_layout(loaded)


def name_source(source: str) -> str:
    """Return a short name for a model in metrics: of runs/NAME/STAGE/model the stage, else the last part."""
    parts = [part for part in Path(source).parts if part not in ("/", "model")]
    return parts[-1] if parts else source
