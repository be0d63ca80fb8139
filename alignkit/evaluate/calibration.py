"""Whether a reward's margins mean what Bradley-Terry says they mean: P(A over B) = 1 / (1 + exp(r_B - r_A)).

Source: HH-RLHF (arXiv 2204.05862), section 2.3 and figure 9; expected calibration error: Naeini et al. 2015.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alignkit.evaluate.figures import Figure, make_figure
from alignkit.evaluate.intervals import Floats, bootstrap

_BINS = 10


def measure_calibration(margins: Sequence[float], groups: Sequence[int], *, resamples: int) -> list[Figure]:
    """Return the expected calibration error of margins (chosen - rejected), with the bins as details.

    The reward's confidence is the probability it gives to the answer it prefers, in [0.5, 1], cut into ten equal bins;
    the error is the mean over pairs of |accuracy - confidence| of the pair's bin. It is never negative, so that its
    interval lies above 0 for a perfect reward too; few pairs make it larger.
    """
    if not margins:
        return []
    margins_P = np.asarray(margins, dtype=np.float64)
    confidence_P = 1 / (1 + np.exp(-np.abs(margins_P)))
    right_P = np.where(margins_P == 0, 0.5, margins_P > 0).astype(np.float64)
    bins_P = np.minimum(((confidence_P - 0.5) * 2 * _BINS).astype(int), _BINS - 1)
    members_PB = np.eye(_BINS)[bins_P]
    sums_P3B = np.concatenate([members_PB, members_PB * confidence_P[:, None], members_PB * right_P[:, None]], axis=1)
    _, cluster_P = np.unique(np.asarray(groups), return_inverse=True)
    sums_N = np.zeros((cluster_P.max() + 1, 3 * _BINS))
    np.add.at(sums_N, cluster_P, sums_P3B)
    found = bootstrap(sums_N, _calibration_error, resamples=resamples)
    return [
        make_figure("calibration_error", found, unit="share", better="lower", details=_describe(sums_N.sum(axis=0)))
    ]


def _calibration_error(sums_R: Floats) -> Floats:
    counts_RB, confidence_RB, right_RB = np.split(sums_R, 3, axis=1)
    error: Floats = np.abs(right_RB - confidence_RB).sum(axis=1) / counts_RB.sum(axis=1)
    return error


def _describe(sums: Floats) -> list[dict[str, float | int | None]]:
    counts_B, confidence_B, right_B = np.split(sums, 3)
    return [
        {
            "low": 0.5 + number / (2 * _BINS),
            "high": 0.5 + (number + 1) / (2 * _BINS),
            "n": int(count),
            "confidence": float(confidence / count) if count else None,
            "accuracy": float(right / count) if count else None,
        }
        for number, (count, confidence, right) in enumerate(zip(counts_B, confidence_B, right_B, strict=True))
    ]
