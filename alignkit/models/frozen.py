"""Frozen models that answer, judge or score: any language model and any classifier, with the tokenizer of its own."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from alignkit.errors import ModelError, RewardError
from alignkit.models.chat import Chat, ConversationError, read_tokenizer, require_eos, set_pad_token
from alignkit.models.files import REWARD_NORM, find_model_dir, fingerprint_weights, inspect_model_dir, is_builtin
from alignkit.models.hub import fetch_adapter
from alignkit.models.kernels import leave_out_unread
from alignkit.models.load import Model, load_trained, pick_device
from alignkit.models.logprobs import pad
from alignkit.models.start import builtin_tokenizer, find_base, read_config
from alignkit.recipe.methods import SftOptions
from alignkit.recipe.stage import Stage

ScoreIds = Callable[[list[list[int]]], Tensor]


@dataclass
class Causal:
    """A language model in eval mode."""

    model: Model
    tokenizer: PreTrainedTokenizerFast
    positions: int | None  # the longest text it can read, in tokens
    fingerprint: str  # of its weights on disk; the name of a hub id


@dataclass
class Classifier:
    """A classifier in eval mode, with one or two labels."""

    model: Model
    tokenizer: PreTrainedTokenizerFast
    num_labels: int
    is_own: bool  # saved by alignkit: trained on whole answers, their end token included
    positions: int | None  # the longest text it can read, in tokens


def load_causal(
    source: str, *, device: str = "auto", trust_code: bool = False, encoder_decoder: bool = False
) -> Causal:
    """Load a language model from a run, a directory or a hub id; with `encoder_decoder` one with an encoder too."""
    if is_builtin(source):
        raise ModelError(f"{source} has random weights, which can neither answer nor judge; name a trained model")
    directory, where = find_model_dir(source) or fetch_adapter(source, None), pick_device(device)
    record = inspect_model_dir(directory, trust_code=trust_code).record if directory else {}
    dtype = _reading_dtype(record, where) if directory else torch.bfloat16
    if where == "cpu" and not record:  # half precision is slow there
        dtype = torch.float32
    model = load_trained(directory or source, device=where, dtype=dtype, trust_code=trust_code)
    if model.config.is_encoder_decoder and not encoder_decoder:
        raise ModelError(f"{source} is an encoder-decoder model, which can be trained, measured and talked to, no more")
    leave_out_unread(model.get_base_model() if isinstance(model, PeftModel) else model)
    tokenizer = load_tokenizer_of(source if directory is None else str(directory), trust_code=trust_code)
    return Causal(model, tokenizer, _positions(model), fingerprint_causal(source))


def _reading_dtype(record: dict[str, Any], device: str) -> torch.dtype | None:
    """What reads a model that was trained in float32 under autocast: what that rounds to, where it is fast."""
    fast = device.startswith("cuda") and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if fast and record.get("dtype") == "float32" else None


def _positions(model: Model) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def fingerprint_causal(source: str) -> str:
    """The fingerprint `load_causal` would give, without loading; the source itself where it is no directory."""
    directory = None if is_builtin(source) else find_model_dir(source)
    if directory is None:
        return source
    files = inspect_model_dir(directory, trust_code=True)
    if files.kind != "adapter":
        return fingerprint_weights(directory)
    base = find_model_dir(find_base(files))
    return fingerprint_weights(directory) + (fingerprint_weights(base) if base is not None else find_base(files))


def load_tokenizer_of(source: str, *, trust_code: bool = False) -> PreTrainedTokenizerFast:
    """Load the tokenizer that belongs to a run, a model or adapter directory, or a hub id."""
    if is_builtin(source):
        return builtin_tokenizer()
    if (directory := find_model_dir(source)) is not None:
        files = inspect_model_dir(directory, trust_code=trust_code)
        source = str(directory) if files.has_tokenizer or files.kind == "full" else find_base(files)
    tokenizer = read_tokenizer(source, trust_code=trust_code)
    require_eos(tokenizer, source)
    set_pad_token(tokenizer)
    return tokenizer


def require_same_tokens(stage: Stage, tokenizer: Any) -> None:
    """Raise ModelError unless a teacher on this machine has the student's tokens under the same numbers."""
    source = getattr(stage.expect(SftOptions).teacher, "model", None)
    if source is None:
        return
    own, theirs = tokenizer.get_vocab(), load_tokenizer_of(source, trust_code=stage.trust_code).get_vocab()
    differing = sorted(token for token in own.keys() | theirs.keys() if own.get(token) != theirs.get(token))
    if differing:
        what = f"{len(differing)} tokens differ, first {differing[0]!r}: number {theirs.get(differing[0])} in the "
        what += f"teacher, {own.get(differing[0])} in the student"
        where = stage.where(f"{stage.name}.teacher")
        raise ModelError(f"{source} has another vocabulary than the student: {what}", where=where)


def load_classifier(
    source: str, *, device: str = "auto", on_base: PeftModel | None = None, dtype: torch.dtype | None = None,
    trust_code: bool = False,
) -> Classifier:  # fmt: skip
    """Load a classifier from a run, a directory or a hub id; of one that `on_base` carries, only the tokenizer."""
    directory = find_model_dir(source) or fetch_adapter(source, None)
    files = inspect_model_dir(directory, trust_code=trust_code) if directory else None
    place, is_own = str(directory or source), files is not None and bool(files.record)
    if files is not None and files.head:
        raise ModelError(f"{place} is a classifier of labelled texts, and a reward scores answers; name an rm stage")
    config = read_config(place, trust_code=trust_code) if files is None or files.kind == "full" else None
    # What has no head for scores is refused: transformers would draw one at random and only say so in a log.
    if config is None and files is not None and not files.reward:
        raise ModelError(f"{place} is the adapter of a language model, not of a reward model")
    family = "ForSequenceClassification"
    if config is not None and not any(kind.endswith(family) for kind in config.architectures or ()):
        found = ", ".join(config.architectures or ()) or "a model without architectures in its config.json"
        raise ModelError(f"{place} is {found}; a reward model is a ...{family}, such as an rm stage makes")
    if config is not None and config.num_labels > 2:
        raise ModelError(f"{place} has {config.num_labels} labels; a reward needs one (its logit) or two (log-odds)")
    tokenizer = read_tokenizer(place, trust_code=trust_code)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"the tokenizer of {place} has neither a pad nor an eos token; set one in its config")
        tokenizer.pad_token = tokenizer.eos_token
    if on_base is not None:
        return Classifier(on_base, tokenizer, 1, is_own, _positions(on_base))
    where, labels = pick_device(device), 1
    dtype = dtype or _reading_dtype(files.record if files else {}, where)
    if config is not None and not is_own:
        labels = config.num_labels
        # Half precision is slow on a CPU, and a foreign model says nothing of how it was trained.
        dtype = dtype or (torch.float32 if where == "cpu" else (config.dtype or torch.float32))
    model = load_trained(place, device=where, dtype=dtype, reward=True, num_labels=labels, trust_code=trust_code)
    if config is not None and not is_own and model.score_is_new:
        raise ModelError("its score head is missing; the copy is incomplete", where=place)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return Classifier(model, tokenizer, model.config.num_labels, is_own, _positions(model))


def read_norm(source: str) -> tuple[float, float]:
    """Read gain and bias of a reward model's reward_norm.json; 1 and 0 without one."""
    directory = find_model_dir(source)
    if directory is None or not (file := directory / REWARD_NORM).is_file():
        return 1.0, 0.0
    try:
        norm = json.loads(file.read_text(encoding="utf-8"))
        return float(norm["gain"]), float(norm["bias"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ModelError("does not hold gain and bias; train the rm stage again", where=str(file)) from error


@torch.no_grad()
def score_ids(model: Any, sequences: Sequence[Sequence[int]], *, pad_id: int, batch_size: int = 16) -> Tensor:
    """Score token sequences by a classifier in eval mode: its logit, or the log-odds of two; (B,), float32, CPU."""
    device = next(model.parameters()).device
    scores_B = torch.empty(len(sequences))
    # Like lengths together: less padding, and which answers share a batch changes nothing.
    order = sorted(range(len(sequences)), key=lambda number: len(sequences[number]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        input_ids_BT, mask_BT = pad([sequences[number] for number in chosen], pad_id)
        logits = model(input_ids=input_ids_BT.to(device), attention_mask=mask_BT.to(device)).logits.float()
        scores_B[chosen] = (logits[:, 0] if logits.size(1) == 1 else logits[:, 1] - logits[:, 0]).cpu()
    return scores_B


def encode_own(
    chat: Chat, prompts: Sequence[Any], completions: Sequence[Any], ended: Sequence[bool], *, name: str
) -> list[list[int]]:
    """Write prompt and answer as the rm stage did; an answer that did not end loses the end it would be given."""
    _require_template(chat.tokenizer.chat_template, prompts, name)
    try:
        splits = chat.encode_prompt_completion(prompts, completions)
    except ConversationError as error:
        raise RewardError(f"the reward model {name} cannot read answer {error.index}: {error}") from error
    pairs = zip((split.ids for split in splits), ended, strict=True)
    return [ids if has_ended or ids[-1] not in chat.stop_ids else ids[:-1] for ids, has_ended in pairs]


def encode_foreign(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Any], completions: Sequence[Any], *, name: str
) -> list[list[int]]:
    """Write conversations with the classifier's own template, texts with whatever its tokenizer puts around them."""
    _require_template(tokenizer.chat_template, prompts, name)
    sequences: list[list[int]] = []
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if isinstance(prompt, str):
            sequences.append(list(tokenizer(prompt + completion).input_ids))
            continue
        try:
            text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        except Exception as error:  # a template raises what it likes
            raise RewardError(
                f"the chat template of the reward model {name} refuses answer {number}: {error}"
            ) from error
        sequences.append(list(tokenizer(text, add_special_tokens=False).input_ids))
    if any(not ids for ids in sequences):
        raise RewardError(f"the reward model {name} has no token for an empty prompt with an empty answer")
    return sequences


def _require_template(template: Any, prompts: Sequence[Any], name: str) -> None:
    if template is None and any(not isinstance(prompt, str) for prompt in prompts):
        what = f"the reward model {name} has no chat template and the prompts are conversations; add one "
        raise RewardError(f"{what}(chat_template.jinja) to its directory, or give prompts as text")
