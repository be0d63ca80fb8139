"""PPO's arithmetic against the reference implementations (tests/golden), plain loops and finite differences."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignkit.train.ppo.math import (
    adapt_kl_coef,
    answer_means,
    explained_variance,
    gae,
    group_advantages,
    kl_losses,
    masked_mean,
    policy_losses,
    sequence_kl,
    shaped_rewards,
    token_weights,
    value_losses,
    whiten,
)

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PPO = json.loads((GOLDEN / "ppo.json").read_text())
ADAPTIVE_KL = json.loads((GOLDEN / "adaptive_kl.json").read_text())


def tensor(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: torch.Tensor, expected: list | float) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_rewards_advantages_losses_and_gradients_equal_the_reference() -> None:
    hparams = PPO["hparams"]
    logps, values = tensor(PPO["logprobs"]), tensor(PPO["values"])
    mask = torch.ones_like(logps)
    rewards = shaped_rewards(
        tensor(PPO["scores"]), logps, tensor(PPO["ref_logprobs"]), mask, kl_coef=hparams["kl_coef"]
    )
    close(rewards, PPO["rewards"])
    whitened = whiten(rewards, mask, shift_mean=False)
    close(whitened, PPO["rewards_whitened_shift_mean_false"])
    found = {}
    for name, given_rewards in (("plain", rewards), ("whitened", whitened)):
        found[name] = gae(given_rewards, values, mask, gamma=hparams["gamma"], lam=hparams["lam"])
    name = min(found, key=lambda key: float((found[key][1] - tensor(PPO["returns"])).abs().max()))
    raw, returns = found[name]
    close(raw, PPO["advantages_raw"])
    close(returns, PPO["returns"])
    advantages = whiten(raw, mask)
    close(advantages, PPO["advantages_whitened"])
    new_logps = tensor(PPO["new_logprobs"]).requires_grad_()
    new_values = tensor(PPO["new_values"]).requires_grad_()
    policy_loss = policy_losses(new_logps, logps, advantages, clip=hparams["cliprange"]).mean()
    value_loss = value_losses(new_values, values, returns, clip=hparams["cliprange_value"]).mean()
    loss = policy_loss + hparams["vf_coef"] * value_loss
    loss.backward()
    close(policy_loss.detach(), PPO["pg_loss"])
    close(value_loss.detach(), PPO["vf_loss"])
    close(loss.detach(), PPO["loss"])
    close(new_logps.grad, PPO["grad_new_logprobs"])
    close(new_values.grad, PPO["grad_new_values"])


def test_masked_whitening_equals_the_reference() -> None:
    case = PPO["masked"]
    mask, values = tensor(case["mask"]), tensor(case["x"])
    kept = mask.bool()
    close(whiten(values, mask)[kept], tensor(case["shift_true"])[kept].tolist())
    close(whiten(values, mask, shift_mean=False)[kept], tensor(case["shift_false"])[kept].tolist())
    assert not whiten(values, mask, shift_mean=False)[~kept].any()


@pytest.mark.parametrize("case", ADAPTIVE_KL["trajectories"], ids=lambda case: str(case["n_steps"]))
def test_the_kl_coefficient_moves_as_in_the_reference(case: dict) -> None:
    coef, how = case["init"], {"target": case["target"], "horizon": case["horizon"]}
    for kl, expected in zip(ADAPTIVE_KL["kl_sequence"], case["values"], strict=True):
        coef = adapt_kl_coef(coef, kl, case["n_steps"], **how)
        assert coef == pytest.approx(expected, rel=1e-12)


def test_a_fixed_kl_coefficient_stays() -> None:
    assert adapt_kl_coef(0.05, 100.0, 512, target=None, horizon=10_000) == 0.05


# Answers of one to six tokens, each token with log-probs of policy and reference, a value and a new log-prob.
number = st.floats(-3, 3, allow_nan=False, width=32)
token = st.tuples(number, number, number, number)
answers = st.lists(st.tuples(st.lists(token, min_size=1, max_size=6), number), min_size=1, max_size=5)


def padded(rows: list, column: int) -> torch.Tensor:
    longest = max(len(tokens) for tokens, _ in rows)
    filled = [[t[column] for t in tokens] + [99.0] * (longest - len(tokens)) for tokens, _ in rows]
    return tensor(filled)  # what lies beyond an answer must not be read


@settings(max_examples=60, deadline=None)
@given(answers, st.floats(0, 1), st.floats(0.5, 1), st.floats(0, 1))
def test_a_loop_over_answers_gives_the_same(rows: list, kl_coef: float, gamma: float, lam: float) -> None:
    logps, reference, values, new = (padded(rows, column) for column in range(4))
    mask = tensor([[1.0] * len(tokens) + [0.0] * (logps.size(1) - len(tokens)) for tokens, _ in rows])
    rewards = shaped_rewards(tensor([score for _, score in rows]), logps, reference, mask, kl_coef=kl_coef)
    advantages, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    losses = policy_losses(new, logps, advantages, clip=0.2)
    value_parts = value_losses(new, values, returns, clip=0.2)
    kls = sequence_kl(logps, reference, mask)
    for row, (tokens, score) in enumerate(rows):
        size = len(tokens)
        reward = [-kl_coef * (t[0] - t[1]) for t in tokens]
        assert float(kls[row]) == pytest.approx(sum(t[0] - t[1] for t in tokens), abs=1e-9)
        reward[-1] += score
        value = [t[2] for t in tokens] + [0.0]
        delta = [reward[i] + gamma * value[i + 1] - value[i] for i in range(size)]
        for i in range(size):
            advantage = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, size))
            assert float(rewards[row, i]) == pytest.approx(reward[i], abs=1e-9)
            assert float(advantages[row, i]) == pytest.approx(advantage, abs=1e-7)
            assert float(returns[row, i]) == pytest.approx(advantage + value[i], abs=1e-7)
            ratio = math.exp(tokens[i][3] - tokens[i][0])
            clipped = min(max(ratio, 0.8), 1.2)
            assert float(losses[row, i]) == pytest.approx(-min(advantage * ratio, advantage * clipped), abs=1e-5)
            near = min(max(tokens[i][3], value[i] - 0.2), value[i] + 0.2)
            squared = max((tokens[i][3] - advantage - value[i]) ** 2, (near - advantage - value[i]) ** 2)
            assert float(value_parts[row, i]) == pytest.approx(0.5 * squared, abs=1e-5)
        assert not rewards[row, size:].any() and not advantages[row, size:].any()


@settings(max_examples=60, deadline=None)
@given(st.lists(number, min_size=6, max_size=6))
def test_group_advantages_equal_a_loop(scores: list[float]) -> None:
    returns = tensor(scores)
    rloo, grpo = group_advantages(returns, 3, "rloo"), group_advantages(returns, 3, "grpo")
    plain = group_advantages(returns, 1, "reinforce")
    for i, score in enumerate(scores):
        group = scores[i // 3 * 3 : i // 3 * 3 + 3]
        others = (sum(group) - score) / 2
        mean = sum(group) / 3
        deviation = (sum((s - mean) ** 2 for s in group) / 2) ** 0.5
        assert float(rloo[i]) == pytest.approx(score - others, abs=1e-9)
        assert float(grpo[i]) == pytest.approx((score - mean) / (deviation + 1e-4), rel=1e-6, abs=1e-6)
        assert float(plain[i]) == pytest.approx(score - sum(scores) / 6, abs=1e-9)
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(returns, 1, "rloo")


def test_gradients_equal_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    old, advantages, returns = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    new = (old + 0.3 * torch.randn(3, 4, generator=generator, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: policy_losses(x, old, advantages, clip=0.2), (new,))
    assert torch.autograd.gradcheck(lambda x: value_losses(x, old, returns, clip=0.2), (new,))


def test_clipping_stops_the_gradient_where_the_step_would_gain() -> None:
    old = torch.zeros(4, dtype=torch.float64)
    new = tensor([0.5, -0.5, 0.5, -0.5]).requires_grad_()
    policy_losses(new, old, tensor([1.0, 1.0, -1.0, -1.0]), clip=0.2).sum().backward()
    assert new.grad is not None
    assert [bool(g) for g in new.grad] == [False, True, True, False]


def test_explained_variance_of_a_perfect_and_of_a_constant_critic() -> None:
    returns, mask = tensor([[1.0, 2.0, 3.0, 50.0]]), tensor([[1.0, 1.0, 1.0, 0.0]])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full_like(returns, 7.0), returns, mask) == pytest.approx(0)
    assert float(masked_mean(returns, mask)) == 2


def test_an_upper_bound_of_its_own_clips_only_above() -> None:
    """DAPO eq. 8 with ratios 1.25 and 0.75: bounds 0.8 and 1.28 leave the gain alone and clip the loss."""
    ratios = tensor([1.25, 1.25, 0.75, 0.75])
    advantages, old = tensor([1.0, -1.0, 1.0, -1.0]), torch.zeros(4, dtype=torch.float64)
    close(policy_losses(ratios.log(), old, advantages, clip=0.2), [-1.2, 1.25, -0.75, 0.8])
    close(policy_losses(ratios.log(), old, advantages, clip=0.2, clip_high=0.28), [-1.25, 1.25, -0.75, 0.8])


def test_k3_is_zero_where_both_agree_and_positive_elsewhere() -> None:
    # d = ln 2 - 0: 2 - ln 2 - 1; d = -ln 2: 1/2 + ln 2 - 1
    found = kl_losses(tensor([0.0, -math.log(2), 0.0]), tensor([0.0, 0.0, -math.log(2)]))
    close(found, [0.0, 1 - math.log(2), math.log(2) - 0.5])


def test_the_ratio_of_a_whole_answer_is_the_geometric_mean_of_its_tokens() -> None:
    ratios, rows = tensor([2.0, 8.0, 3.0]), torch.tensor([0, 0, 2])
    close(answer_means(ratios.log(), rows).exp(), [4.0, 4.0, 3.0])


def test_losses_are_means_over_tokens_answers_or_a_constant() -> None:
    """Answers of 1 and 3 tokens with losses 4 and 1, 2, 3: 10 / 4, (4 + 2) / 2 and 10 / (2 x 5)."""
    losses, mask = tensor([[4.0, 0.0, 0.0], [1.0, 2.0, 3.0]]), tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    for kind, divisor, expected in (("token", 4, 2.5), ("sequence", 2, 3.0), ("constant", 2, 1.0)):
        close((losses * token_weights(mask, kind, longest=5)).sum() / divisor, expected)  # type: ignore[arg-type]


def test_a_group_is_scaled_by_its_own_deviation_by_that_of_all_or_not_at_all() -> None:
    returns = tensor([1.0, 3.0, 0.0, 0.0])  # deviations (n - 1): sqrt 2, 0, and sqrt 2 of all four
    close(group_advantages(returns, 2, "grpo", scale="none"), [-1.0, 1.0, 0.0, 0.0])
    close(group_advantages(returns, 2, "grpo", scale="batch"), [-1 / (2**0.5 + 1e-4), 1 / (2**0.5 + 1e-4), 0.0, 0.0])
