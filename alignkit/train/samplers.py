"""In which order rows are trained on: the same on any number of devices, and after a resume."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

_MEGA_BATCHES = 50  # global batches whose rows are sorted together: enough to match lengths, few enough to stay random


def shuffled_order(num_rows: int, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the row numbers, (num_rows,) int64; a resumed run sees the same one."""
    return np.random.default_rng((seed, epoch)).permutation(num_rows)


def grouped_order(lengths: Sequence[int] | np.ndarray, *, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation in which the rows of one global batch are of like length.
    Rows are shuffled, cut into stretches of _MEGA_BATCHES batches, sorted by length inside a stretch, and the batches
    are shuffled again; the incomplete batch stays last. Inside a batch the longest row comes first."""
    rng = np.random.default_rng((seed, epoch))
    lengths = np.asarray(lengths)
    order = rng.permutation(len(lengths))
    stretch = batch_size * _MEGA_BATCHES
    parts = [order[start : start + stretch] for start in range(0, len(order), stretch)]
    order = np.concatenate([part[np.argsort(-lengths[part], kind="stable")] for part in parts])
    num_whole = len(order) // batch_size
    whole, rest = np.split(order, [num_whole * batch_size])
    return np.concatenate([whole.reshape(num_whole, batch_size)[rng.permutation(num_whole)].reshape(-1), rest])


def token_batches(lengths: Sequence[int] | np.ndarray, *, num_tokens: int, seed: int) -> list[np.ndarray]:
    """Cut all rows into batches of like lengths, each as long as `num_tokens` allows when padded to its longest row."""
    lengths = np.asarray(lengths)
    order = np.random.default_rng(seed).permutation(len(lengths))
    batches = []
    for start in range(0, len(order), 1000):
        rows = order[start : start + 1000]
        rows = rows[np.argsort(-lengths[rows], kind="stable")]
        while len(rows):
            size = max(num_tokens // int(lengths[rows[0]]), 1)
            batches.append(rows[:size])
            rows = rows[size:]
    return batches


def fill_up(order: np.ndarray, *, batch_size: int) -> np.ndarray:
    """Make whole batches of an order: the incomplete last one gets rows from the beginning of the epoch, as PyTorch's
    DistributedSampler does. Every optimizer step then has the same rows on any number of devices."""
    return np.resize(order, -(-len(order) // batch_size) * batch_size)


@dataclass(frozen=True)
class Rest:
    """Where a run stands whose batch size was changed: after `step`, in `epoch`, with these rows of it left."""

    step: int
    epoch: int
    rows: np.ndarray


def go_on(batches: Sequence[Sequence[int]], whole: Callable[[int, int], np.ndarray], *, batch_size: int) -> Rest | None:
    """The rows that are left of the epoch in which a run was stopped, None where its batch size never changed.
    `batches` are (last step, rows of each) of the sittings so far; `whole(epoch, batch_size)` is the order of an epoch
    that begins with batches of that size. One that goes on with another size deals out what is left, in order."""
    if all(size == batch_size for _, size in batches):
        return None
    epoch, step = 0, 0
    rows = whole(0, batches[0][1])
    for last, size in batches:
        while step < last:
            taken = min(last - step, -(-len(rows) // size))  # as many as the epoch has
            step, rows = step + taken, rows[taken * size :]
            if not len(rows):
                epoch, rows = epoch + 1, whole(epoch + 1, size)
    if len(rows) == len(whole(epoch, batch_size)):  # an epoch that has not begun is dealt out anew
        rows = whole(epoch, batch_size)
    return Rest(step, epoch, rows)


@dataclass
class EpochSampler(Sampler[int]):
    """Hand the order of the current epoch to a data loader.
    The epoch is asked for when iteration starts, not counted here: a resumed run starts in the middle of one."""

    num_rows: int
    order: Callable[[int], np.ndarray]
    epoch: Callable[[], int]

    def __len__(self) -> int:
        return self.num_rows

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.epoch()).tolist())
