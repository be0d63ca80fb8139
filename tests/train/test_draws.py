"""Random numbers that belong to an answer: the right distribution, and the same tokens in any batch."""

from __future__ import annotations

import pytest
import torch

from alignkit.models.generation import InverseTransform
from alignkit.train import ranks
from alignkit.train.ppo.answers import cut_at_text, draw_uniforms


def test_tokens_come_with_the_probabilities_of_the_softmax_at_the_temperature() -> None:
    scores = torch.tensor([2.0, -torch.inf, 0.0, 1.0, -1.0])
    count = 40_000
    draws = InverseTransform(draw_uniforms((0, 1), count, 1), temperature=0.7)
    found = draws(torch.zeros(count, 3), scores.expand(count, -1)).argmax(dim=-1).bincount(minlength=5)
    expected = (scores / 0.7).softmax(dim=-1) * count
    assert found[1] == 0
    assert ((found - expected).abs() <= 4 * expected.sqrt()).all()


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [(1.0, 2, [0, 3]), (0.6, 0, [0, 3]), (0.5, 0, [0]), (0.95, 3, [0, 2, 3]), (1.0, 0, [0, 2, 3, 4])],
)
def test_only_the_likeliest_tokens_are_drawn_with_what_they_have_left(top_p: float, top_k: int, kept: list) -> None:
    p, count = torch.tensor([0.5, 0.0, 0.12, 0.3, 0.08]), 40_000
    draws = InverseTransform(draw_uniforms((0, 1), count, 1), temperature=1.0, top_p=top_p, top_k=top_k)
    found = draws(torch.zeros(count, 3), p.log().expand(count, -1)).argmax(dim=-1).bincount(minlength=5)
    expected = torch.zeros(5)
    expected[kept] = p[kept] / p[kept].sum() * count
    assert found.nonzero().flatten().tolist() == kept
    assert ((found - expected).abs() <= 4 * expected.sqrt()).all()


def test_an_answer_ends_with_the_token_that_completes_a_stop_text() -> None:
    decode = "".join
    assert cut_at_text(["a", "b\n", "\nc", "d"], ["\n\n"], decode) == 3
    assert cut_at_text(["a", "b"], ["x", "b"], decode) == 2 and cut_at_text(["a"], ["x"], decode) is None
    assert cut_at_text(["a"], [], decode) is None


def test_the_ends_of_the_interval_take_tokens_that_have_a_probability() -> None:
    scores = torch.tensor([[-torch.inf, 0.3, 0.7, -torch.inf]]).expand(3, -1)
    ends = torch.tensor([[0.0], [1 - 2**-24], [1.0]])
    assert InverseTransform(ends, temperature=1.0)(torch.zeros(3, 1), scores).argmax(dim=-1).tolist() == [1, 2, 2]


def test_an_answer_draws_the_same_in_any_batch() -> None:
    uniforms = draw_uniforms((7, 0, 3), 6, 4)
    logits = torch.randn(4, 6, 50, generator=torch.Generator().manual_seed(0))

    def take(rows: list[int]) -> torch.Tensor:
        draws = InverseTransform(uniforms[rows], temperature=1.3)
        return torch.stack([draws(torch.zeros(len(rows), 1), step[rows]).argmax(dim=-1) for step in logits], dim=1)

    assert torch.equal(take([4, 1, 5]), take([0, 1, 2, 3, 4, 5])[[4, 1, 5]])
    assert torch.equal(uniforms, draw_uniforms((7, 0, 3), 6, 4))
    assert not torch.equal(uniforms, draw_uniforms((7, 0, 4), 6, 4))


def test_ranks_share_a_list_in_parts_of_one_length(monkeypatch: pytest.MonkeyPatch) -> None:
    def shares(count: int, world_size: int) -> list[tuple[list[int], int]]:
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        found = []
        for rank in range(world_size):
            monkeypatch.setenv("RANK", str(rank))
            found.append(ranks.share_out(range(count)))
        return found

    assert shares(7, 3) == [([0, 1, 2], 3), ([3, 4, 5], 3), ([6, 6, 6], 1)]
    assert shares(1, 2) == [([0], 1), ([0], 0)]
    assert shares(4, 1) == [([0, 1, 2, 3], 4)]
