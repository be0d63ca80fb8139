"""Rows of token ids as one tensor."""

from __future__ import annotations

from alignkit.models.logprobs import pad


def test_padding() -> None:
    ids, mask = pad([[5, 6], [], [7, 8, 9]], 1, left=True, multiple_of=4)
    assert ids.tolist() == [[1, 1, 5, 6], [1, 1, 1, 1], [1, 7, 8, 9]]
    assert mask.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]]
