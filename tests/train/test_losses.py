"""The losses against the papers' own code (tests/golden, float64) and against plain loops."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from alignkit.train.losses import Pairs, best_of_loss, cdpo, ipo_sum, kway_loss, pairwise_losses, sequence_logps

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def golden(name: str) -> dict:
    return json.loads((GOLDEN / name).read_text())


def tensor(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


DPO = golden("dpo.json")


@pytest.mark.parametrize("case", DPO["cases"], ids=lambda case: json.dumps(case["kwargs"]))
def test_preference_losses_rewards_and_gradients_equal_the_authors_code(case: dict) -> None:
    kwargs = case["kwargs"]
    chosen = tensor(DPO["policy_chosen"]).requires_grad_()
    rejected = tensor(DPO["policy_rejected"]).requires_grad_()
    tokens, label = torch.ones(len(chosen)), torch.ones_like(chosen)
    reference = [] if kwargs.get("reference_free") else [tensor(DPO["ref_chosen"]), tensor(DPO["ref_rejected"])]
    pairs = Pairs(chosen, rejected, tokens, tokens, label, *reference)
    if kwargs.get("ipo"):
        losses = ipo_sum(pairs, beta=kwargs["beta"])
    else:
        losses = cdpo(pairs, beta=kwargs["beta"], label_smoothing=kwargs.get("label_smoothing", 0.0))
    torch.testing.assert_close(losses, tensor(case["losses"]), rtol=0, atol=1e-6)
    rewards = kwargs["beta"] * (chosen.detach() - tensor(DPO["ref_chosen"]))
    torch.testing.assert_close(rewards, tensor(case["chosen_rewards"]), rtol=0, atol=1e-6)
    losses.mean().backward()
    torch.testing.assert_close(chosen.grad, tensor(case["grad_policy_chosen"]), rtol=0, atol=1e-6)
    torch.testing.assert_close(rejected.grad, tensor(case["grad_policy_rejected"]), rtol=0, atol=1e-6)


def test_sequence_logps_equal_the_authors_code() -> None:
    case = DPO["logps"]
    logits, labels = tensor(case["logits"]), torch.tensor(case["labels"])
    targets, mask = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
    token_logps = logits[:, :-1].log_softmax(-1).gather(2, targets[..., None]).squeeze(2)
    torch.testing.assert_close(sequence_logps(token_logps, mask), tensor(case["sum"]), rtol=0, atol=1e-6)


def test_soft_labels_interpolate_between_both_orders() -> None:
    margins, ones = tensor([3.0, -1.0]), torch.ones(2)
    soft, one, other = (cdpo(Pairs(margins, 0 * ones, ones, ones, label * ones), beta=0.5) for label in (0.75, 1, 0))
    torch.testing.assert_close(soft, 0.75 * one + 0.25 * other)


REWARD = golden("reward_model.json")


def test_kway_loss_equals_the_reference_implementation() -> None:
    scores, ends = tensor(REWARD["scores"]), REWARD["cu_lengths"]
    better, worse, prompt = [], [], []
    for number, (start, end) in enumerate(itertools.pairwise(ends)):
        for i, j in itertools.combinations(range(start, end), 2):
            better.append(i), worse.append(j), prompt.append(number)
    loss = kway_loss(pairwise_losses(scores[better], scores[worse]), torch.tensor(prompt), len(ends) - 1)
    assert loss.item() == pytest.approx(REWARD["kway_mean_over_prompts_beta0"], abs=1e-6)


def test_kway_loss_ignores_a_prompt_whose_answers_all_tie() -> None:
    losses = tensor([1.0, 3.0])
    assert kway_loss(losses, torch.tensor([0, 2]), 3).item() == 2.0


def test_pairwise_loss_equals_the_reference_implementation() -> None:
    case = REWARD["pairwise"]
    loss = pairwise_losses(tensor(case["chosen"]), tensor(case["rejected"])).mean()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-6)


def test_a_margin_shifts_the_difference_and_a_soft_label_weighs_both_sides() -> None:
    better, worse = tensor([2.0]), tensor([0.5])
    by_hand = -0.7 * math.log(1 / (1 + math.exp(-1.0))) - 0.3 * math.log(1 / (1 + math.exp(1.0)))
    assert pairwise_losses(better, worse, label_P=0.7, margin_P=0.5).item() == pytest.approx(by_hand, abs=1e-12)


def test_best_of_four_loss_equals_the_reference_value() -> None:
    case = REWARD["ziegler_best_of_4"]
    loss = best_of_loss(tensor(case["logits"]), torch.tensor(case["best"]))
    assert loss.item() == pytest.approx(case["loss"], abs=1e-6)


def test_best_of_loss_leaves_out_answers_that_are_not_there() -> None:
    scores = tensor([[1.0, 0.0, -math.inf]])
    assert best_of_loss(scores, torch.tensor([0])).item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-12)


ONE_PAIR = {"chosen_B": -6.0, "rejected_B": -8.0, "chosen_tokens_B": 3.0, "rejected_tokens_B": 2.0, "label_B": 1.0}
REFERENCE = {"ref_chosen_B": -5.0, "ref_rejected_B": -9.0}


def softplus(value: float) -> float:
    return math.log1p(math.exp(value))


@pytest.mark.parametrize(
    ("name", "beta", "options", "reference", "expected"),
    [
        # margin (-6 + 5) - (-8 + 9) = -2; log pi_ref - log pi of the chosen answer is 1
        ("dpop", 0.1, {"dpop_lambda": 5.0}, True, softplus(-0.1 * (-2 - 5 * 1))),
        ("ipo_sum", 0.1, {}, True, (-2 - 5.0) ** 2),
        ("cdpo", 0.1, {}, True, softplus(0.2)),
        # means over tokens: -2 and -4
        ("simpo", 2.0, {"simpo_gamma": 0.5}, False, softplus(-(2.0 * 2 - 0.5))),
        ("cpo", 0.1, {"cpo_alpha": 0.5}, False, softplus(-0.1 * 2) + 0.5 * 2),
        ("orpo", 0.25, {}, False, 2 + 0.25 * softplus(-(2 - math.log1p(-math.exp(-2)) + math.log1p(-math.exp(-4))))),
    ],
)
def test_preference_losses_worked_by_hand(
    name: str, beta: float, options: dict, reference: bool, expected: float
) -> None:
    from alignkit.train.losses import Pairs, pick_loss

    values = ONE_PAIR | (REFERENCE if reference else {})
    loss = pick_loss(name, options, beta=beta, label_smoothing=0.0)
    found = loss(Pairs(**{key: tensor([value]) for key, value in values.items()}))
    assert found.tolist() == [pytest.approx(expected, abs=1e-12)]


def test_every_loss_of_the_table_has_its_function() -> None:
    from alignkit.recipe.words import OWN_LOSSES
    from alignkit.train.losses import pick_loss

    for name in OWN_LOSSES:
        assert callable(pick_loss(name, {}, beta=0.1, label_smoothing=0.0)), name
