from __future__ import annotations

import torch

from alignkit.models.builtin import builtin_config
from alignkit.models.generation import generate_greedy
from alignkit.models.scratch import random_model


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
        model = random_model(builtin_config(name), seed=3, dtype=torch.float32).train()
        prompts = [[60, 61, 62], [99] * 20, [70]]
        found = generate_greedy(model, prompts, max_new_tokens=6, eos_ids=[508], pad_id=509)
        assert model.training
        model.eval()
        assert found == [greedy_by_hand(model, prompt, 6, [508]) for prompt in prompts]


def test_answer_ends_with_the_first_stop_token() -> None:
    model = random_model(builtin_config("builtin:tiny-gpt2"), seed=3, dtype=torch.float32).eval()
    free = generate_greedy(model, [[60, 61]], max_new_tokens=8, eos_ids=[508], pad_id=509)[0]
    stopped = generate_greedy(model, [[60, 61], [77] * 5], max_new_tokens=8, eos_ids=[508, free[0]], pad_id=509)[0]
    assert stopped == free[:1]


def test_prompt_longer_than_the_model_keeps_its_end() -> None:
    model = random_model(builtin_config("builtin:tiny-gpt2"), seed=3, dtype=torch.float32).eval()
    long = [40 + number % 400 for number in range(700)]
    found = generate_greedy(model, [long], max_new_tokens=4, eos_ids=[508], pad_id=509)[0]
    assert found == greedy_by_hand(model, long[-508:], 4, [508])
