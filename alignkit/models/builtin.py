"""The embedded models: tiny GPT-2 and Llama configurations with a byte-level tokenizer, made from code alone.

Deliberately no files of weights and no network: `scratch` draws the weights from the stage's seed.
The merges in `tiny_merges.txt` were counted once on English dialogues; they only keep sequences short.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GPT2Config, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast

from alignkit.models.files import BUILTIN_PREFIX, find_model_dir

END_OF_TEXT, PAD, IM_START, IM_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
_MERGES = Path(__file__).with_name("tiny_merges.txt")
_POSITIONS = 512


def builtin_config(path: str) -> PreTrainedConfig:
    """Return the configuration behind `builtin:NAME`; a ModelError names the nearest name that exists."""
    find_model_dir(path)
    return {"tiny-gpt2": _tiny_gpt2, "tiny-llama": _tiny_llama}[path.removeprefix(BUILTIN_PREFIX)]()


def builtin_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of every builtin model: 256 bytes, 252 merges and four control tokens, 512 in all.

    It adds no BOS; the end of a text is <|endoftext|>, of a chat turn <|im_end|>.
    """
    # from_str on the cached text: every caller gets its own object to change.
    backend = Tokenizer.from_str(_backend_json())
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=[IM_START, IM_END],
        model_max_length=_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


@cache
def _backend_json() -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(pair[0], pair[1]) for pair in map(str.split, _MERGES.read_text(encoding="utf-8").splitlines())]
    tokens = alphabet + [left + right for left, right in merges]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in (END_OF_TEXT, PAD, IM_START, IM_END)])
    return backend.to_str()


def _tiny_gpt2() -> GPT2Config:
    """About 0.32 M parameters. No dropout: two forward passes of the same weights are equal in every stage."""
    return GPT2Config(
        vocab_size=512, n_positions=_POSITIONS, n_embd=96, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_token_ids(),
    )  # fmt: skip


def _tiny_llama() -> LlamaConfig:
    """About 0.16 M parameters, with grouped-query attention and an untied head."""
    return LlamaConfig(
        vocab_size=512, max_position_embeddings=_POSITIONS, hidden_size=64, intermediate_size=176,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **_token_ids(),
    )  # fmt: skip


def _token_ids() -> dict[str, int]:
    tokenizer = builtin_tokenizer()
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
