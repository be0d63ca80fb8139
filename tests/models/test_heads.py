"""The losses of GPT-1's fine-tuning against reference values, and the sequences that its tasks read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from alignkit.models.chat import Chat
from alignkit.models.heads import ScoreHead, arrange, encode_tasks, language_losses, row_logits, task_losses, write_task
from alignkit.models.load import load_reward_model
from alignkit.models.start import builtin_tokenizer

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "gpt1.json").read_text())


def _given(name: str) -> tuple[Any, Tensor, Tensor, Tensor]:
    """The reference's tokens as labels (S, T), its language logits (S, T, V), and the row of each sequence.

    It has logits of the first T - 1 positions, one after another; the last one predicts nothing.
    """
    golden = GOLDEN[name]
    tokens, mask = torch.tensor(golden["X"])[..., 0], torch.tensor(golden["M"])
    row_of = torch.arange(len(tokens)) if tokens.dim() == 2 else torch.arange(len(tokens)).repeat_interleave(2)
    labels = tokens.masked_fill(mask == 0, -100).view(-1, tokens.size(-1))
    logits = torch.tensor(golden["lm_logits"], dtype=torch.float64).view(len(labels), -1, 11)
    return golden, labels, torch.nn.functional.pad(logits, (0, 0, 0, 1)), row_of


@pytest.mark.parametrize("name", ["classification", "multiple_choice"])
def test_losses_are_those_of_the_reference(name: str) -> None:
    golden, labels, logits, row_of = _given(name)
    language = language_losses(logits, labels)
    assert language.tolist() == pytest.approx(golden["lm_losses"], abs=1e-6)
    scores = torch.tensor(golden["clf_logits"], dtype=torch.float64)
    objective = name
    if name == "multiple_choice":  # one score a sequence
        scores = scores.view(-1, 1)
    found = row_logits(objective, scores, row_of)
    assert found.tolist() == golden["clf_logits"]
    answers = torch.tensor(golden["Y"])
    single = [float(task_losses(found[[at]], answers[[at]], None, row_of, 0.0)[0]) for at in range(len(answers))]
    assert single == pytest.approx(golden["clf_losses"], abs=1e-6)
    total, task, lm = task_losses(found, answers, language, row_of, GOLDEN["lm_coef"])
    mean = sum(golden["clf_losses"]) / len(answers)
    assert float(task) == pytest.approx(mean, abs=1e-6)
    assert float(lm) == pytest.approx(sum(golden["lm_losses"]) / len(labels), abs=1e-6)
    assert float(total) == pytest.approx(golden.get("total_mean", mean + 0.5 * float(lm)), abs=1e-6)


def test_the_linear_schedule_is_that_of_the_reference_within_its_warm_up() -> None:
    """Theirs falls by the share of all steps, transformers' by the share of those after warm-up: 0.2 % at most."""
    steps = 10_000
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, int(0.002 * steps), steps).lr_lambdas[0]
    for point in GOLDEN["warmup_linear"]:
        assert schedule(round(point["x"] * steps)) == pytest.approx(point["value"], rel=0.0021)


def test_shorter_choices_have_no_logit() -> None:
    found = row_logits(
        "multiple_choice", torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]]), torch.tensor([0, 0, 1, 1, 1])
    )
    assert found.tolist() == [[1, 2, float("-inf")], [3, 4, 5]]


def test_both_orders_of_a_similarity_add_up() -> None:
    found = row_logits(
        "similarity", torch.tensor([[1.0, 2.0], [10.0, 20.0], [3.0, 0.0], [0.5, 1.0]]), torch.tensor([0, 0, 1, 1])
    )
    assert found.tolist() == [[11, 22], [3.5, 1.0]]


@pytest.fixture(scope="module")
def chat() -> Chat:
    tokenizer = builtin_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|delimiter|>", "<|extract|>"]})
    return Chat(tokenizer)


def test_each_task_reads_its_own_sequences(chat: Chat) -> None:
    def read(objective: str, prompt: str, *texts: str) -> list[str]:
        (sequences,) = encode_tasks(chat, objective, [(prompt, texts)])
        return [chat.tokenizer.decode(ids).replace("|", "") for ids in sequences]

    assert read("classify", "", "a film") == ["<start>a film<extract>"]
    assert read("classify", "", "it rains", "it pours") == ["<start>it rains<delimiter>it pours<extract>"]
    assert read("similarity", "", "up", "down") == [
        "<start>up<delimiter>down<extract>",
        "<start>down<delimiter>up<extract>",
    ]
    assert read("multiple_choice", "Who?", "Ann", "Bo", "Cy") == [
        f"<start>Who?<delimiter>{name}<extract>" for name in ("Ann", "Bo", "Cy")
    ]


def test_a_bos_stays_first_and_the_longest_text_is_cut(chat: Chat) -> None:
    encoded = chat.tokenize(write_task("", ["one two three four five six", "seven"]))
    start, delimiter, extract = encoded[0].ids
    long, short = encoded[1].ids, encoded[2].ids
    ((ids,), cut) = arrange("classify", encoded, limit=len(short) + 6)
    assert cut and ids == [start, *long[:3], delimiter, *short, extract]
    encoded[0].ids.insert(0, 7)  # as a tokenizer that begins every text with BOS has it
    ((ids,), cut) = arrange("classify", encoded)
    assert not cut and ids == [7, start, *long, delimiter, *short, extract]


def test_autocast_does_not_round_scores(make_stage: Callable, tmp_path: Path) -> None:
    hidden = torch.randn(3, 64)
    for lora in (None, {}):
        model = load_reward_model(make_stage("rm", path="builtin:tiny-llama", lora=lora), run_dir=tmp_path).model
        heads = [module for module in model.modules() if isinstance(module, ScoreHead)]
        assert len(heads) == (1 if lora is None else 2)  # the base's own, and the one that is trained
        exact = heads[-1](hidden)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(heads[-1](hidden.bfloat16().float()), heads[-1](hidden.bfloat16()))
            assert torch.equal(heads[-1](hidden), exact) and exact.dtype == torch.float32
            assert torch.nn.Linear.forward(heads[-1], hidden).dtype == torch.bfloat16
