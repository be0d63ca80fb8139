from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig

from alignkit.errors import ModelError
from alignkit.models.generation import (
    InverseTransform,
    generate_answers,
    generate_batch,
    generate_continuous,
    stream_tokens,
    usual_length,
)
from alignkit.models.start import builtin_config, random_model


def greedy_by_hand(model: torch.nn.Module, prompt: list[int], count: int, eos_ids: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        if ids[-1] in eos_ids:
            break
    return ids[len(prompt) :]


def test_answers_equal_one_token_at_a_time_whatever_the_padding() -> None:
    for name in ("builtin:tiny-gpt2", "builtin:tiny-llama"):
        model = random_model(builtin_config(name), seed=3, dtype=torch.float32).eval()
        prompts = [[60, 61, 62], [99] * 20, [70]]
        found = generate_answers(model, prompts, max_new_tokens=6, eos_ids=[508], pad_id=509)
        assert found == [greedy_by_hand(model, prompt, 6, [508]) for prompt in prompts]


def test_answer_ends_with_the_first_stop_token_and_a_long_prompt_keeps_its_end() -> None:
    model = random_model(builtin_config("builtin:tiny-gpt2"), seed=3, dtype=torch.float32).eval()
    free = generate_answers(model, [[60, 61]], max_new_tokens=8, eos_ids=[508], pad_id=509)[0]
    stopped = generate_answers(model, [[60, 61], [77] * 5], max_new_tokens=8, eos_ids=[508, free[0]], pad_id=509)[0]
    assert stopped == free[:1]
    long = [40 + number % 400 for number in range(700)]
    found = generate_answers(model, [long], max_new_tokens=4, eos_ids=[508], pad_id=509)[0]
    assert found == greedy_by_hand(model, long[-508:], 4, [508])


def sharp_model() -> torch.nn.Module:
    model = random_model(builtin_config("builtin:tiny-gpt2"), seed=3, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def test_sampling_has_the_frequencies_of_the_softmax() -> None:
    model, count = sharp_model(), 4000
    prompt = [60, 61, 62]
    with torch.no_grad():
        wanted = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(-1)
    found = generate_answers(
        model, [prompt] * count, range(count), temperature=0.7, max_new_tokens=1, eos_ids=[508], pad_id=509
    )
    counts = torch.bincount(torch.tensor([row[0] for row in found]), minlength=len(wanted))
    expected = wanted * count
    large = expected > 5  # chi-square needs some of each; the rest is one class
    observed = torch.cat([counts[large], counts[~large].sum()[None]]).double()
    means = torch.cat([expected[large], expected[~large].sum()[None]]).double()
    statistic = float(((observed - means) ** 2 / means).sum())
    freedom = len(means) - 1
    assert freedom > 10
    assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5


def test_top_k_and_top_p_cut_the_tail_and_leave_the_odds_of_the_rest() -> None:
    model, settings = sharp_model(), {"max_new_tokens": 1, "eos_ids": [508], "pad_id": 509, "temperature": 2.0}
    prompt = [60, 61, 62]
    with torch.no_grad():
        (odds, tokens) = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / 2.0).softmax(-1).topk(3)
    share = float(odds[:2].sum()) + float(odds[2]) / 2  # reached by the third

    def draw(**cuts: float) -> list[int]:
        return [row[0] for row in generate_answers(model, [prompt] * 600, range(600), **settings, **cuts)]

    assert set(draw()) > set(tokens.tolist())
    for cuts in ({"top_k": 3}, {"top_p": share}, {"top_k": 3, "top_p": 0.999}):
        found = draw(**cuts)
        assert set(found) == set(tokens.tolist())
        wanted = float(odds[0] / odds.sum())
        assert abs(found.count(int(tokens[0])) / 600 - wanted) < 4 * (wanted * (1 - wanted) / 600) ** 0.5
    streamed = [
        next(stream_tokens(model, prompt, top_k=2, generator=torch.Generator().manual_seed(seed), **{
            key: settings[key] for key in ("temperature", "max_new_tokens", "eos_ids")
        }))
        for seed in range(40)
    ]  # fmt: skip
    assert set(streamed) == set(tokens[:2].tolist())


def test_an_answer_may_be_long_where_a_model_chats_and_has_room() -> None:
    chats, plain = SimpleNamespace(has_template=True), SimpleNamespace(has_template=False)
    asked = [(chats, 8192), (chats, None), (chats, 512), (plain, 8192)]
    assert [usual_length(chat, positions, short=48) for chat, positions in asked] == [256, 256, 48, 48]


def test_a_sampled_answer_depends_on_its_seed_and_its_own_end_and_not_on_its_batch() -> None:
    model = sharp_model()
    prompts = [[60, 61, 62], [99] * 20, [70], [60, 61, 62]]
    settings = {"temperature": 1.0, "max_new_tokens": 8, "eos_ids": [508], "pad_id": 509}
    together = generate_answers(model, prompts, [1, 2, 3, 4], **settings)
    alone = [generate_answers(model, [prompt], [seed], **settings)[0] for seed, prompt in enumerate(prompts, 1)]
    assert together == alone
    assert together[0] != together[3]
    # A row ends when it has said enough.
    (free,) = generate_answers(model, [[60]], [7], **settings)
    (cut,) = generate_answers(model, [[60]], [7], is_over=lambda tail: free[2] in tail, **settings)
    assert cut == free[: free.index(free[2]) + 1]
    cold = settings | {"temperature": 0.0}
    (free,) = generate_answers(model, [[60]], [7], **cold)
    (cut,) = generate_answers(model, [[60]], [7], is_over=lambda tail: free[2] in tail, **cold)
    assert cut == free[: free.index(free[2]) + 1]


def test_the_bases_generation_config_acts_on_nothing_and_is_kept() -> None:
    model = random_model(builtin_config("builtin:tiny-llama"), seed=3, dtype=torch.float32).eval()
    settings = {"max_new_tokens": 8, "eos_ids": [508], "pad_id": 509}
    free = generate_answers(model, [[60, 61]], **settings)
    cold = generate_answers(model, [[60, 61]], [1], temperature=1e-4, **settings)
    model.generation_config.update(repetition_penalty=1.8, no_repeat_ngram_size=1, suppress_tokens=[free[0][0]])
    assert generate_answers(model, [[60, 61]], **settings) == free
    assert generate_answers(model, [[60, 61]], [1], temperature=1e-4, **settings) == cold
    assert model.generation_config.repetition_penalty == 1.8


@pytest.mark.parametrize("name", ["builtin:tiny-gpt2", "builtin:tiny-llama"])
def test_prompts_are_read_once_and_ended_answers_leave_the_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(builtin_config(name), seed=3, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    prompts = [[60, 61, 62]] * 5 + [[99] * 20] * 3 + [[70], [70]]
    settings = GenerationConfig(max_new_tokens=24, min_new_tokens=2, eos_token_id=[*range(0, 509, 9)], pad_token_id=509)
    uniforms, seen = torch.rand(len(prompts), 24, generator=torch.Generator().manual_seed(1)), []
    forward = model.forward

    def count(*args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    model.forward = functools.wraps(forward)(count)
    together = generate_batch(model, prompts, settings, draw=InverseTransform(uniforms, temperature=1.0))
    assert seen[:2] == [(3, 19), (10, 1)]  # each prompt once, all but its last token
    widths = [rows for rows, _ in seen[1:]]
    assert widths == sorted(widths, reverse=True) and widths[-1] <= 2 < len(set(widths))
    assert len({len(ids) for ids in together}) > 3 and min(map(len, together)) >= 2
    for row, prompt in enumerate(prompts):  # a row alone, all of whose tokens are read at once
        draw = InverseTransform(uniforms[[row]], temperature=1.0)
        assert generate_batch(model, [prompt], settings, draw=draw) == [together[row]]
    # Continuous batching, two at a time, draws by the same numbers.
    how = {"max_new_tokens": 24, "min_new_tokens": 2, "eos_ids": settings.eos_token_id, "pad_id": 509}
    for kind in ({"temperature": 0.8, "top_k": 50, "uniforms_BT": uniforms}, {}):
        plain, state = generate_answers(model, prompts, **how, **kind), torch.get_rng_state()
        assert generate_answers(model, prompts, **how, **kind, in_flight=2) == plain
        assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    # A row that says enough by its text leaves, too, and nothing comes after its end.
    cut = generate_batch(
        model, prompts, settings, draw=InverseTransform(uniforms, temperature=1.0), is_over=lambda ids: len(ids) >= 4
    )
    assert cut == [ids[:4] for ids in together]
    # Where ranks keep step the plain way is taken.
    seen.clear()
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    plain = generate_batch(model, prompts, settings, draw=InverseTransform(uniforms, temperature=1.0), in_step=True)
    assert plain == together and {rows for rows, _ in seen} == {10}


def test_continuous_batching_names_what_it_cannot_run() -> None:
    settings = GenerationConfig(max_new_tokens=4, eos_token_id=[2], pad_token_id=0)
    config = CONFIG_MAPPING["mamba"](vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4)
    mamba = AutoModelForCausalLM.from_config(config).train()
    with pytest.raises(ModelError, match="continuous batching cannot run a mamba model: .*; use engine: transformers"):
        generate_continuous(mamba, [[5, 6]], settings, draw=None, batch_size=2)
    assert mamba.training
