"""Perplexity per token of held-out text, and bits per byte, which tokenizers cannot flatter."""

import math
from collections.abc import Sequence

import numpy as np

from alignkit.evaluate.context import POLICY, ROWS, Context, Figure, Metric, bootstrap, divide, make_figure
from alignkit.evaluate.policy import Likelihood
from alignkit.evaluate.target import split_answer


def measure(context: Context) -> list[Figure]:
    whole = [row for row in context.rows if row.kind in ("text", "messages")]
    split = [split_answer(row) or ("", None) for row in context.rows if row.kind not in ("text", "messages")]
    answered = [(prompt, answer) for prompt, answer in split if answer is not None]
    prompts, answers = [prompt for prompt, _ in answered], [answer for _, answer in answered]
    likelihoods = context.policy.score_documents(whole) + context.policy.score_completions(prompts, answers)
    if short := sum(not (item.tokens and item.num_bytes) for item in likelihoods):
        why = "no text of theirs has a token before it to be predicted from, or the model cannot read them whole"
        context.space.warn(f"perplexity leaves out {short} of {len(likelihoods)} texts: {why}")
    return context.place(measure_perplexity(likelihoods, resamples=context.options.resamples))


_NEEDS = (lambda context: any(row.completions for row in context.rows), "the rows hold no text to predict")
METRIC = Metric(measure, (ROWS, POLICY, _NEEDS))


def measure_perplexity(likelihoods: Sequence[Likelihood], *, resamples: int) -> list[Figure]:
    """Measure exp(-sum log p / tokens) and -sum log p / (ln 2 x bytes) over all rows, so that long ones weigh more."""
    rows = [item for item in likelihoods if item.tokens and item.num_bytes]
    per_token = [(-item.logp, item.tokens) for item in rows]
    perplexity = bootstrap(per_token, lambda sums: np.exp(divide(sums)), resamples=resamples)
    per_byte = bootstrap([(-item.logp / math.log(2), item.num_bytes) for item in rows], divide, resamples=resamples)
    return [
        make_figure("perplexity", perplexity, unit="per token", better="lower"),
        make_figure("bits_per_byte", per_byte, unit="bits per byte", better="lower"),
    ]
