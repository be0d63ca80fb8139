"""Any causal language model as somebody who writes or judges: loaded safely, frozen, with its own tokenizer.

Deliberately trains nothing and knows nothing of a stage; the policy of a stage is the business of `load`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from alignkit.errors import ModelError
from alignkit.models.files import find_model_dir, fingerprint_weights, inspect_model_dir, is_builtin
from alignkit.models.hub import explain_hub_errors, fetch_adapter, quiet_transformers
from alignkit.models.load import Precision, load_trained, pick_device, read_base
from alignkit.models.start import find_base
from alignkit.models.tokens import set_pad_token


@dataclass
class Causal:
    """A frozen language model in eval mode."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerFast
    positions: int | None  # the longest text it can read, in tokens
    fingerprint: str  # of its weights on disk; the name of a hub id


def load_causal(source: str, *, device: str = "auto", trust_code: bool = False) -> Causal:
    """Load a language model from a run, a model or adapter directory, or a hub id; safetensors only.

    Raises ModelError for a reward model, a builtin name (its weights are random), pickles and a missing tokenizer;
    EnvironmentProblem when the hub cannot be reached.
    """
    if is_builtin(source):
        raise ModelError(f"{source} has random weights, which can neither answer nor judge; name a trained model")
    directory = find_model_dir(source) or fetch_adapter(source, None)
    where = pick_device(device)
    model: PreTrainedModel | PeftModel
    if directory is not None:
        files = inspect_model_dir(directory, trust_code=trust_code)
        # Half precision is slow on a CPU; how our own models were trained is in their record.
        dtype = torch.float32 if where == "cpu" and not files.record else None
        model = load_trained(directory, device=where, dtype=dtype, trust_code=trust_code)
    else:
        dtype = torch.float32 if where == "cpu" else torch.bfloat16
        model = read_base(source, Precision(dtype, where), trust_code=trust_code)
        model = model.to(where).requires_grad_(False).eval()
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    positions = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    tokenizer = load_tokenizer_of(source if directory is None else str(directory), trust_code=trust_code)
    return Causal(model, tokenizer, positions, fingerprint_causal(source))


def fingerprint_causal(source: str) -> str:
    """Return the fingerprint `load_causal` would give, without loading; the source itself where it is no directory."""
    directory = None if is_builtin(source) else find_model_dir(source)
    if directory is None:
        return source
    files = inspect_model_dir(directory, trust_code=True)
    if files.kind != "adapter":
        return fingerprint_weights(directory)
    base = find_model_dir(find_base(files))
    return fingerprint_weights(directory) + (fingerprint_weights(base) if base is not None else find_base(files))


def load_tokenizer_of(source: str, *, trust_code: bool = False) -> PreTrainedTokenizerFast:
    """Return the tokenizer that belongs to a run, a model or adapter directory, or a hub id."""
    directory = None if is_builtin(source) else find_model_dir(source)
    if directory is None:
        return _load_tokenizer(source, trust_code=trust_code)
    files = inspect_model_dir(directory, trust_code=trust_code)
    own = files.has_tokenizer or files.kind == "full"
    return _load_tokenizer(str(directory) if own else find_base(files), trust_code=trust_code)


def _load_tokenizer(source: str, *, trust_code: bool) -> PreTrainedTokenizerFast:
    with explain_hub_errors(source), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_code)
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(f"{source} has no fast tokenizer (tokenizer.json); convert it once")
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer of {source} has no eos token; set eos_token in its tokenizer_config.json")
    set_pad_token(tokenizer)
    return tokenizer
