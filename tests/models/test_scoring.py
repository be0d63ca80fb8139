"""Log-probabilities of given tokens are those of the model's own logits, whatever stands around its head."""

from __future__ import annotations

import random
from itertools import chain
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GPT2Config, LlamaConfig

from alignkit.models import scoring
from alignkit.models.kernels import leave_out_unread
from alignkit.models.scoring import can_share, follow_greedily, iter_scores, score_tokens

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 1},
    "gemma2": {"num_key_value_heads": 1, "final_logit_softcapping": 2.0},
    "cohere": {"num_key_value_heads": 1, "logit_scale": 0.25},
    "granite": {"num_key_value_heads": 1, "logits_scaling": 4.0},
    "opt": {"word_embed_proj_dim": 8, "ffn_dim": 32, "do_layer_norm_before": True},
    "modernbert-decoder": {"global_attn_every_n_layers": 1},  # has a layer between trunk and head
    "mamba": {},
}


@pytest.mark.parametrize("kind", [*MODELS, "an adapter on the head"])
@torch.no_grad()
def test_log_probabilities_are_those_of_the_models_own_logits(kind: str) -> None:
    name = kind if kind in MODELS else "llama"
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = CONFIG_MAPPING[name](**{**SMALL, **MODELS[name]}, vocab_size=40, max_position_embeddings=32, **ids)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.normal_(0, 0.3)
    if kind != name:
        model = get_peft_model(model, LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    model.eval()
    sequences = [([5, 6, 7], [8, 9]), ([], [3, 4, 5]), ([7], []), ([11, 12], [13, 14, 15, 16])]
    found = score_tokens(model, sequences, pad_id=0, temperature=0.7, batch_size=2)
    on_a_cache = dict(chain(*iter_scores(model, sequences * 2, pad_id=0, temperature=0.7, share=True)))
    for number, ((context, tail), logps) in enumerate(zip(sequences, found, strict=True)):
        assert on_a_cache.get(number + 4, []) == pytest.approx(logps, abs=1e-5)
        whole = torch.tensor([[*context, *tail]])
        logits = model(input_ids=whole).logits[0].float() / 0.7
        start = max(len(context), 1)
        wanted = logits.log_softmax(-1)[start - 1 : -1].gather(1, whole[0, start:, None])[:, 0]
        assert logps == pytest.approx(wanted[len(wanted) - len(logps) :].tolist(), abs=2e-5)
        assert len(logps) == len(context) + len(tail) - start


@pytest.mark.parametrize(("kind", "tokens_at_once", "long"), [
    ("rotary", 2048, 1024), ("learned", 2048, 1024), ("rotary", 64, 1024), ("rotary", 600, 20),
])  # fmt: skip
def test_sequences_that_begin_alike_are_read_once_and_score_as_each_alone(
    kind: str, tokens_at_once: int, long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_CPU_TOKENS", tokens_at_once)
    monkeypatch.setattr(scoring, "_LONG_BEGINNING", long)
    sizes: dict[str, int] = {"vocab_size": 61, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    config = (LlamaConfig(**sizes, intermediate_size=64, num_key_value_heads=2, max_position_embeddings=512)
              if kind == "rotary" else GPT2Config(**sizes, n_positions=512))  # fmt: skip
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    draw = random.Random(2)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(61) for _ in range(count)]

    sequences = []
    for examples in (tokens(150), tokens(90), []):  # two stems and none; pairs that begin alike; one to three tails
        for _ in range(5):
            question = examples + tokens(draw.randrange(20, 60))
            for context in (question + tokens(draw.randrange(1, 9)), question + tokens(draw.randrange(1, 9))):
                sequences += [(context, tokens(draw.randrange(1, 4))) for _ in range(draw.randrange(1, 4))]
    sequences += [([], [5, 6, 7]), ([9], [3]), (sequences[0][0] + sequences[0][1], [4])]
    draw.shuffle(sequences)
    alone: dict[int, list[float]] = {}  # by the model's own logits
    with torch.no_grad():
        for place, (context, tail) in enumerate(sequences):
            whole = torch.tensor([[*context, *tail]])
            found = model(whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])[:, 0].tolist()
            alone[place] = found[max(len(context) - 1, 0) :]
    leave_out_unread(model)
    last = (getattr(model.base_model, "layers", None) or model.base_model.h)[-1]
    fed: list[int] = []  # tokens that the last layer's feed-forward is given
    last.mlp.register_forward_pre_hook(lambda _, given: fed.append(given[0].shape[:-1].numel()))
    read: list[int] = []  # tokens
    model.register_forward_pre_hook(lambda *given: read.append(given[2]["input_ids"].numel()), with_kwargs=True)
    plain = list(iter_scores(model, sequences, pad_id=0, batch_size=4, share=False))
    num_plain, read[:] = sum(read), []
    assert 0 < sum(fed) <= sum(map(len, alone.values()))  # no more than are scored, repeats once
    shared = list(iter_scores(model, sequences, pad_id=0, batch_size=4, share=True))
    assert sum(read) < (0.45 if long > 20 else 0.55) * num_plain
    wanted, found = dict(chain(*plain)), dict(chain(*shared))
    assert score_tokens(model, sequences, pad_id=0, batch_size=4) == [found[at] for at in range(len(sequences))]
    assert wanted.keys() == found.keys() == set(range(len(sequences)))
    for place, logps in wanted.items():
        assert found[place] == pytest.approx(logps, abs=2e-6)
        assert alone[place] == pytest.approx(logps, abs=2e-6)
    done = [place for place, _ in shared[0]]
    again = list(iter_scores(model, sequences, pad_id=0, batch_size=4, share=True, known=done))
    assert again == shared[1:]  # to the last bit: batches are those of the whole list


@pytest.mark.parametrize(("kind", "shares"), [("llama", True), ("falcon", False), ("gpt_neo", False)])
def test_models_with_attention_of_their_own_are_given_no_masks(kind: str, shares: bool) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_layers": 2, "num_heads": 2} if kind == "gpt_neo" else {"intermediate_size": 32}
    own: dict[str, Any] = {"attention_types": [[["global", "local"], 1]]} if kind == "gpt_neo" else {}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes, **own, alibi=True)).eval()
    assert can_share(model) is shares


def _make_llama(vocab_size: int) -> Any:
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=vocab_size, intermediate_size=64, max_position_embeddings=512)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)  # so that greedy answers vary
    return model


@torch.no_grad()
def test_greedy_answers_after_the_read_that_scores_are_those_of_the_model_alone() -> None:
    model, draw = _make_llama(50), random.Random(5)
    asked = [
        ([draw.randrange(50) for _ in range(draw.randrange(5, 90))], [draw.randrange(50) for _ in range(3)])
        for _ in range(9)
    ]
    lengths = [1 + 9 * (place % 5) for place in range(9)]  # up to 37, more than a buffer's room
    alone: list[list[int]] = []
    for place, (context, tail) in enumerate(asked):
        ids = list(context)
        while len(ids) < len(context) + lengths[place]:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        alone.append(ids[len(context) :])
        if place % 2:
            asked[place] = context, (alone[place] + tail)[:4]  # begins as the answer does
    found: dict[int, tuple[list[float], list[int]]] = {}
    batches = []
    for batch in follow_greedily(
        model, asked, pad_id=0, batch_size=4, goes_on=lambda place, ids: len(ids) < lengths[place], first=[8, 2, 5]
    ):
        batches.append({place for place, *_ in batch})
        found |= {place: (logps, ids) for place, logps, ids in batch}
    assert {8, 2, 5} < batches[0] and len({tuple(ids) for ids in alone}) > 5
    assert [found[place][1] for place in range(9)] == alone
    for place, (context, tail) in enumerate(asked):
        whole = torch.tensor([[*context, *tail]])
        wanted = model(whole).logits[0, :-1].log_softmax(-1).gather(1, whole[0, 1:, None])[len(context) - 1 :, 0]
        assert found[place][0] == pytest.approx(wanted.tolist(), abs=2e-6)
