"""RNNsearch against the authors' numbers, as a model of transformers, and tokenizers learnt from rows."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM

from alignkit.models.chat import Chat, ConversationError
from alignkit.models.generation import generate_answers
from alignkit.models.rnnsearch import RnnSearchConfig, RnnSearchForConditionalGeneration
from alignkit.models.scoring import score_tokens
from alignkit.models.start import learn_tokenizer, learnt_tokenizer
from alignkit.train.recorder import align

GOLDEN = Path(__file__).parents[1] / "golden" / "bahdanau_step.json"
SOURCES, TARGETS = [[5, 6, 7, 8, 1], [9, 4, 1]], [[6, 9, 1], [5, 1]]


def build(**config: Any) -> RnnSearchForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 8, "embedding_size": 6, "alignment_size": 5, "maxout_size": 4}
    return RnnSearchForConditionalGeneration(RnnSearchConfig(**sizes | config)).eval()


def test_one_step_is_that_of_the_authors_code() -> None:
    # GroundHog multiplies from the right, so that its matrices are the transposed ones of nn.Linear.
    given = {key: torch.tensor(value, dtype=torch.float64) for key, value in json.loads(GOLDEN.read_text()).items()
             if isinstance(value, list)}  # fmt: skip
    decoder = build(hidden_size=4, alignment_size=4).double().decoder
    weights = {
        decoder.unit.candidate: [given["U"]], decoder.unit.gates: [given["U_z"], given["U_r"]],
        decoder.query: [given["W_a_T"]], decoder.key: [given["U_a_T"]], decoder.energy: [given["v_a"]],
        decoder.contexts: [given["C_T"], given["C_z_T"], given["C_r_T"]],
    }  # fmt: skip
    annotations, mask = given["annotations"].transpose(0, 1), given["src_mask"].T
    projected = torch.cat([given["y_proj"], given["z_proj"], given["r_proj"]], dim=-1)
    with torch.no_grad():
        for layer, parts in weights.items():
            layer.weight.copy_(torch.cat(parts, dim=1).T)
        context, alpha = decoder.attend(given["s_prev"], decoder.key(annotations), annotations, mask)
        state = decoder.unit(projected + decoder.contexts(context), given["s_prev"])
    for found, name in ((alpha.T, "alpha"), (context, "context"), (state, "s_new")):
        torch.testing.assert_close(found, given[name], rtol=0, atol=1e-9)
    assert torch.equal(alpha == 0, mask == 0)
    torch.testing.assert_close(alpha.sum(dim=1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("attention", [True, False])
def test_the_rivals_save_load_search_and_do_not_see_padding(tmp_path: Path, attention: bool) -> None:
    model = build(attention=attention)
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    together = score_tokens(again, list(zip(SOURCES, TARGETS, strict=True)), pad_id=0)
    for source, target, logps in zip(SOURCES, TARGETS, together, strict=True):
        shifted = torch.tensor([[0, *target[:-1]]])
        with torch.no_grad():
            alone = model(torch.tensor([source]), decoder_input_ids=shifted).logits.log_softmax(-1)[0]
        torch.testing.assert_close(torch.tensor(logps), alone[torch.arange(len(target)), torch.tensor(target)])
    settings = {"max_new_tokens": 4, "eos_ids": [1], "pad_id": 0}
    answers = [answer for beams in (12, 1) for answer in generate_answers(again, SOURCES, num_beams=beams, **settings)]
    likely = score_tokens(again, list(zip(SOURCES * 2, answers, strict=True)), pad_id=0)
    assert all(sum(likely[row]) >= sum(likely[row + 2]) - 1e-5 for row in (0, 1))
    weights = align(again, SOURCES[0], TARGETS[0])
    assert (weights is not None) == attention
    if weights is not None:
        assert [len(row) for row in weights] == [5, 5, 5]
        assert [sum(row) for row in weights] == pytest.approx([1, 1, 1])


def test_beam_search_finds_the_likeliest_of_all_short_targets() -> None:
    model = build(vocab_size=5)
    ended = [[*head, 1] for size in (0, 1, 2) for head in product([0, 2, 3, 4], repeat=size)]
    answers = ended + [list(cut) for cut in product([0, 2, 3, 4], repeat=3)]
    scores = [sum(row) for row in score_tokens(model, [([3, 4, 1], answer) for answer in answers], pad_id=0)]
    (found,) = generate_answers(model, [[3, 4, 1]], max_new_tokens=3, eos_ids=[1], pad_id=0, num_beams=100)
    assert found == answers[scores.index(max(scores))]


def test_tokenizers_are_learnt_from_rows() -> None:
    texts = ["il gran lupa .", "il lupa vede"]
    words = learnt_tokenizer(learn_tokenizer("builtin:words", texts, 100))
    assert words.convert_ids_to_tokens(range(len(words))) == [
        "<pad>", "</s>", "<unk>", "il", "lupa", ".", "gran", "vede"]  # fmt: skip
    assert len(learnt_tokenizer(learn_tokenizer("builtin:words", texts, 5))) == 5
    bpe = learnt_tokenizer(learn_tokenizer("builtin:bpe", texts, 270))
    assert (len(bpe), bpe.decode(bpe("lupa é").input_ids)) == (270, "lupa é")
    assert learn_tokenizer("builtin:bpe", texts, 270) == learn_tokenizer("builtin:bpe", texts, 270)
    chat = Chat(words, encoder_decoder=True)
    (one,) = chat.encode_prompt_completion(["il lupa \n"], [" gran lupa"])
    assert (one.ids, one.prompt_length, one.labels) == ([3, 4, 1, 6, 4, 1], 3, [-100, -100, -100, 6, 4, 1])
    assert chat.encode_prompts(["il", [{"role": "user", "content": "lupa"}]]) == [[3, 1], [4, 1]]
    with pytest.raises(ConversationError, match="reads one text, and this is a conversation of several turns"):
        chat.encode_prompts([[{"role": "user", "content": "il"}, {"role": "user", "content": "il"}]])
