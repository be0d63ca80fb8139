"""Row order: complete, reproducible, and independent of how a batch is cut up."""

from __future__ import annotations

import numpy as np

from alignkit.train.tables import EpochSampler, fill_up, go_on, grouped_order, shuffled_order


def test_every_row_comes_once_per_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 1003)
    for epoch in range(3):
        order = grouped_order(lengths, batch_size=8, seed=1, epoch=epoch)
        assert sorted(order) == list(range(1003))


def test_the_order_depends_on_seed_and_epoch_only() -> None:
    lengths = list(range(100))
    same = [grouped_order(lengths, batch_size=4, seed=1, epoch=2).tolist() for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != grouped_order(lengths, batch_size=4, seed=1, epoch=3).tolist()
    assert same[0] != grouped_order(lengths, batch_size=4, seed=2, epoch=2).tolist()
    assert shuffled_order(9, seed=0, epoch=1).tolist() == shuffled_order(9, seed=0, epoch=1).tolist()


def test_grouping_saves_most_of_the_padding() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 4000)

    def padded(order: np.ndarray) -> int:
        return sum(int(lengths[part].max()) * len(part) for part in np.array_split(order, 500))

    grouped = padded(grouped_order(lengths, batch_size=8, seed=0, epoch=0))
    shuffled = padded(shuffled_order(4000, seed=0, epoch=0))
    assert grouped < 1.03 * lengths.sum()
    assert shuffled > 1.6 * lengths.sum()


def test_batches_of_like_length_still_come_in_random_order() -> None:
    lengths = np.arange(800)
    order = grouped_order(lengths, batch_size=8, seed=0, epoch=0)
    means = lengths[order].reshape(-1, 8).mean(axis=1)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.35


def test_a_sampler_asks_for_the_epoch_when_it_starts() -> None:
    epoch = 0
    sampler = EpochSampler(5, lambda number: shuffled_order(5, seed=0, epoch=number), lambda: epoch)
    first = list(sampler)
    epoch = 1
    assert list(sampler) == shuffled_order(5, seed=0, epoch=1).tolist() != first


def test_the_last_batch_is_filled_up_from_the_beginning_of_the_epoch() -> None:
    order = np.arange(10)
    assert fill_up(order, batch_size=4).tolist() == [*range(10), 0, 1]
    assert fill_up(order, batch_size=5).tolist() == [*range(10)]
    assert fill_up(order[:3], batch_size=8).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_another_batch_size_deals_out_the_rows_that_are_left() -> None:
    def whole(epoch: int, batch_size: int) -> np.ndarray:
        return 100 * epoch + np.arange(10)

    assert go_on([(2, 4)], whole, batch_size=4) is None
    rest = go_on([(2, 3)], whole, batch_size=2)
    assert rest is not None and (rest.step, rest.epoch, rest.rows.tolist()) == (2, 0, [6, 7, 8, 9])
    rest = go_on([(2, 3), (3, 2)], whole, batch_size=5)  # two changes: 6 rows, then 2
    assert rest is not None and (rest.step, rest.epoch, rest.rows.tolist()) == (3, 0, [8, 9])
    rest = go_on([(5, 4)], whole, batch_size=2)  # three steps are the first epoch, its last batch filled up
    assert rest is not None and (rest.step, rest.epoch, rest.rows.tolist()) == (5, 1, [108, 109])
    rest = go_on([(3, 4)], whole, batch_size=2)
    assert rest is not None and (rest.step, rest.epoch, rest.rows.tolist()) == (3, 1, [*range(100, 110)])
