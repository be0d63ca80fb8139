"""Models made from code and random weights: the embedded tiny ones with their tokenizer, and `init: scratch`."""

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from alignkit.errors import ModelError, Problem, suggest
from alignkit.models.files import BUILTIN_PREFIX, KNOWN, find_model_dir
from alignkit.models.rnnsearch import RnnSearchConfig

END_OF_TEXT, PAD, IM_START, IM_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
_MERGES = Path(__file__).with_name("tiny_merges.txt")
_POSITIONS = 512


def builtin_config(path: str) -> PreTrainedConfig:
    """Make the configuration behind `builtin:NAME`; a ModelError names the nearest name that exists."""
    find_model_dir(path)
    tokenizer = builtin_tokenizer()
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    name = path.removeprefix(BUILTIN_PREFIX)
    if name.startswith("rnn"):
        return RnnSearchConfig(attention=name == "rnnsearch")
    # GPT-2 has about 0.32 M parameters and no dropout: two forward passes of the same weights are equal in every stage;
    # Llama about 0.16 M, grouped-query attention and an untied head.
    return AutoConfig.for_model(**KNOWN["builtin_models"][name], **ids)


def builtin_tokenizer() -> PreTrainedTokenizerFast:
    """Make the tokenizer of every builtin model: 256 bytes, 252 merges and four control tokens, 512 in all.

    It adds no BOS; the end of a text is <|endoftext|>, of a chat turn <|im_end|>.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend_json()), bos_token=END_OF_TEXT, eos_token=END_OF_TEXT,
        pad_token=PAD, extra_special_tokens=[IM_START, IM_END], model_max_length=_POSITIONS,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


@cache
def _backend_json() -> str:  # a text, so that every caller gets an object of its own to change
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(pair[0], pair[1]) for pair in map(str.split, _MERGES.read_text(encoding="utf-8").splitlines())]
    tokens = alphabet + [left + right for left, right in merges]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in (END_OF_TEXT, PAD, IM_START, IM_END)])
    return backend.to_str()


_START_TOKENS = ["<pad>", "</s>", "<unk>"]


def learn_tokenizer(kind: str, texts: Iterable[str], vocab_size: int) -> str:
    """Learn words between blanks or byte-level BPE (Sennrich et al. 2016), commonest first, and give the JSON of it.

    Equal texts give equal bytes.
    """
    options: Any = {"vocab_size": vocab_size, "special_tokens": _START_TOKENS, "show_progress": False}
    if kind == "builtin:words":
        backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer: Any = trainers.WordLevelTrainer(**options)
    else:
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(**options, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    backend.train_from_iterator(texts, trainer)
    return backend.to_str()


def learnt_tokenizer(backend: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer of what `learn_tokenizer` gave; like T5's it has no BOS."""
    pad, eos, unknown = _START_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend), pad_token=pad, eos_token=eos, unk_token=unknown,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def override_config(
    config: PreTrainedConfig, overrides: dict[str, Any], *, where: str | None = None
) -> PreTrainedConfig:
    """Make a config with the overrides in force; `hidden_size` and GPT-2's `n_embd` are one attribute."""
    values = {key: value for key, value in config.to_dict().items() if key not in KNOWN["no_architecture"]}
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


def choose_family(config: PreTrainedConfig, *, reward: bool = False) -> Any:
    """Choose the class of transformers that makes a reward model or a language model of a config."""
    if reward:
        return AutoModelForSequenceClassification
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def random_model(
    config: PreTrainedConfig, *, seed: int, dtype: torch.dtype, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Build a language model with random weights on the CPU; equal seeds give equal bytes.

    Weights are drawn in float32 and then cast, so that bfloat16 is the rounding of the float32 model.
    """
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = choose_family(config).from_config(config, dtype=torch.float32, **options)
        except ValueError as error:
            raise ModelError(f"model.config does not make a {config.model_type} model: {error}") from error
    return model.to(dtype)
