"""What both sides of a comparison read: a small Llama on disk and rows in TRL's own formats.

Plain prompts and completions, so that no chat template stands between the two.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TEXT = (
    "the film was slow but its end made up for it and we left the house late with a strange kind of joy that stayed "
    "long after rain had come over our small town by the river where nobody ever asks who wrote this story or why"
)
_WORDS = _TEXT.split()


def write_model(
    directory: Path, *, hidden_size: int = 64, num_layers: int = 2, positions: int = 512, template: str | None = None
) -> Path:
    """Write a Llama with random weights and a byte-level tokenizer; 0.14 M parameters unless told otherwise."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("<pad>", special=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    tokenizer.chat_template = template
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=positions,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_rows(
    directory: Path, kind: str, num: int, *, seed: int = 0, words: int | None = None, turns: bool = False
) -> Path:
    """Write `num` rows for sft, rm or dpo, or conversations, as train.jsonl in a new directory; return the directory.

    With `words` every answer has that many; with `turns` prompts and answers are turns of a conversation.
    """
    roles = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}
    directory.mkdir(parents=True)
    with (directory / "train.jsonl").open("w", encoding="utf-8") as file:
        for row in make_rows(kind, num, seed=seed, words=words):
            if turns:
                row = {name: [{"role": roles[name], "content": text.strip()}] for name, text in row.items()}
            file.write(json.dumps(row) + "\n")
    return directory


def make_rows(kind: str, num: int, *, seed: int = 0, words: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield rows whose lengths vary as those of dialogues do: many short ones, a few long ones."""
    draw = random.Random(seed)
    for number in range(num):
        prompt = f"{number}: {_sentence(draw, 4, 12)}?"
        if kind == "chats":  # every third has two questions
            messages = []
            for turn in range(2 - (number % 3 > 0)):
                messages.append({"role": "user", "content": f"{prompt} {turn}"})
                messages.append({"role": "assistant", "content": f"{_sentence(draw, 3, 50)}."})
            yield {"messages": messages}
        elif kind == "sft":
            yield {"prompt": prompt, "completion": f" {_sentence(draw, words or 3, words or 50)}."}
        else:
            yield {"prompt": prompt, "chosen": f" {_sentence(draw, 3, 40)}.", "rejected": f" {_sentence(draw, 3, 40)}!"}


def _sentence(draw: random.Random, shortest: int, longest: int) -> str:
    spread = longest - shortest
    length = min(shortest + int(draw.expovariate(3 / spread)), longest) if spread else longest
    return " ".join(draw.choices(_WORDS, k=length))
