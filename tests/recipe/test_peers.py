"""Training configurations of other tools as recipes: each is resolved and checked, and a table says what differs."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from alignkit.preflight.check import check_recipe
from alignkit.recipe import load_recipe, resolve

# What only this machine lacks: packages, devices.
LACKS = re.compile(
    r"needs \S+, not installed here|launch.device is npu, which torch|is vllm, which is not installed|vllm|"
    r"needs? the \S+ package|deepspeed|pip install"
)


class Peer(NamedTuple):
    number: str
    tool: str
    method: str
    verdict: str
    differs: str
    recipe: str


def read_peers() -> Iterator[Peer]:
    text = Path(__file__).with_name("peers.txt").read_text()
    for part in text.split("\n=== ")[1:]:
        head, _, recipe = part.partition("\n")
        yield Peer(*(word.strip() for word in head.split("|")), recipe)


PEERS = list(read_peers())


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with rows in the formats of those configurations, and tiny models of kinds that are not built in."""
    from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM

    from alignkit.models.chat import load_tokenizer

    folder = tmp_path_factory.mktemp("peers")
    words = ("red", "blue", "green", "grey", "white", "black", "brown", "pink")
    user = [[{"role": "user", "content": f"Is it {word}?"}] for word in words]
    yes, no = ([{"role": "assistant", "content": text}] for text in ("Yes, it is so.", "No, it is not so at all."))
    rows = {
        "chat": [{"messages": turns + yes} for turns in user],
        "pairs": [{"prompt": turns, "chosen": yes, "rejected": no} for turns in user],
        "pairs-system": [
            {"system": "Be brief.", "prompt": f"Is it {word}?", "chosen": f"Yes, {word}.", "rejected": "No."}
            for word in words
        ],
        "kto": [{"messages": turns + yes, "label": number % 2 == 0} for number, turns in enumerate(user)],
        "alpaca": [{"instruction": f"Say {word}.", "input": "", "output": f"{word}!"} for word in words],
        "questions": [{"question": f"Is it {word}?", "response": "Yes."} for word in words],
        "prompts": [{"prompt": turns} for turns in user],
        "parts": [
            {"messages": [{**turn, "content": [{"type": "text", "value": turn["content"]}]} for turn in turns + yes]}
            for turns in user
        ],
        "sums": [{"prompt": f"{n} + {n} =", "answer": str(2 * n), "pattern": str(2 * n)} for n in range(len(words))],
        "text": [{"text": f"All is {word} and nothing is {word}. " * 9} for word in words],
        "stack/train": [
            {"prompt": f"Is it {word}?", "chosen": f"Yes, {word}.", "rejected": f"No, not {word}."} for word in words
        ],
    }
    for name, each in rows.items():
        path = folder / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in each))
    (folder / "tulu.jinja").write_text(
        "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    (folder / "any.yaml").write_text("model: {path: builtin:tiny-llama}\nsft: {data: chat.jsonl}\n")
    tokenizer = load_tokenizer(resolve(load_recipe(folder / "any.yaml")))
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2)).save_pretrained(folder / "moe")
    for kind in ("gptq", "awq"):
        config = LlamaConfig(**sizes, architectures=["LlamaForCausalLM"])
        config.save_pretrained(folder / kind)
        values = json.loads((folder / kind / "config.json").read_text())
        values["quantization_config"] = {"quant_method": kind, "bits": 4, "group_size": 32}
        (folder / kind / "config.json").write_text(json.dumps(values))
        (folder / kind / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{      }")
    for name in ("moe", "gptq", "awq"):
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer.recipe.strip()], ids=lambda peer: peer.number)
def test_configuration_would_run(peer: Peer, stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stand_ins)
    path = stand_ins / f"{peer.number}.yaml"
    path.write_text(peer.recipe)
    recipe = load_recipe(path)
    for name in recipe.stage_names:
        resolve(recipe, name)
    for check in check_recipe(recipe).stages:
        assert not check.problems, check.problems
        strange = [line for text in check.environment for line in text.split("\n") if not LACKS.search(line)]
        assert not strange, strange


def test_table_is_that_of_the_configurations(repository: Path) -> None:
    table = (repository / "recipes" / "PEERS.md").read_text()
    rows = [f"| {p.number} | {p.tool} | {p.method} | {p.verdict} | {p.differs} |" for p in PEERS]
    assert [line for line in table.splitlines() if line[:3].strip("| ").isdecimal() or line[2:4].isdecimal()] == rows
    counts = Counter(peer.verdict for peer in PEERS)
    assert len(PEERS) == 40 and counts["full"] + counts["harmless"] >= 33
    assert all(bool(peer.recipe.strip()) == (peer.verdict != "cannot") for peer in PEERS)
