"""How well a model predicts held-out text: perplexity per token, and bits per byte, which tokenizers cannot flatter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from alignkit.evaluate.intervals import Figure, bootstrap, divide, make_figure
from alignkit.evaluate.policy import Likelihood


def measure_perplexity(likelihoods: Sequence[Likelihood], *, resamples: int) -> list[Figure]:
    """Return exp(-sum log p / tokens) and -sum log p / (ln 2 x bytes) over all rows, end tokens included.

    Both are ratios of sums, so that long rows weigh more; the bootstrap draws rows.
    """
    rows = [item for item in likelihoods if item.tokens and item.num_bytes]
    per_token = bootstrap(
        [(-item.logp, item.tokens) for item in rows], lambda sums: np.exp(divide(sums)), resamples=resamples
    )
    per_byte = bootstrap([(-item.logp / math.log(2), item.num_bytes) for item in rows], divide, resamples=resamples)
    return [
        make_figure("perplexity", per_token, unit="per token", better="lower"),
        make_figure("bits_per_byte", per_byte, unit="bits per byte", better="lower"),
    ]
