"""ROUGE, BLEU and chrF of answers against reference texts, by rouge-score and sacrebleu.

Overlap is not quality: ROUGE-L ranks raw GPT-3 above InstructGPT on published
summaries. All figures are times 100.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignkit.data import Text
from alignkit.errors import EnvironmentProblem
from alignkit.evaluate.context import Context, Metric
from alignkit.evaluate.intervals import Figure, Interval, make_figure, mean
from alignkit.feedback.prompts import read_text

_ROUGE = ("rouge1", "rouge2", "rougeL")


def measure(context: Context) -> list[Figure]:
    limit, resamples = context.options.max_new_tokens, context.options.resamples
    pairs = _list_references(context)
    found = context.policy.answer([prompt for prompt, _ in pairs], max_new_tokens=limit)
    answers = [group[0].text for group in found]
    references = [read_text(answer) for _, answer in pairs]
    figures = measure_rouge(answers, references, resamples=resamples)
    figures += measure_bleu(answers, references, resamples=resamples)
    return context.place(figures, temperature=0.0, max_new_tokens=limit)


def _list_references(context: Context) -> list[tuple[Text, Text]]:
    """List prompts with their one right answer; the better of two is not that unless overlap is asked for."""
    if context.options.metrics is None and any(row.kind in ("pair", "ranked", "unpaired") for row in context.rows):
        return []
    return [(prompt, answer) for prompt, answer in context.asked if answer is not None]


METRIC = Metric(
    measure,
    needs=(_list_references, "the rows hold no single right answer to compare with"),
    optional=True,
)


def measure_rouge(
    answers: Sequence[str], references: Sequence[str], *, stemmer: bool = False, resamples: int
) -> list[Figure]:
    """Measure the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004); `stemmer` is Porter's.

    Raises EnvironmentProblem when rouge-score is not installed.
    """
    rouge_scorer = _require("rouge_score.rouge_scorer", "rouge-score")
    scorer = rouge_scorer.RougeScorer(list(_ROUGE), use_stemmer=stemmer)
    scored = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    figures = []
    for name in _ROUGE:
        found = mean([100 * row[name].fmeasure for row in scored], resamples=resamples)
        figures.append(make_figure(name, found, unit="x 100", better="higher", stemmer=stemmer))
    return figures


def measure_bleu(answers: Sequence[str], references: Sequence[str], *, resamples: int) -> list[Figure]:
    """Measure corpus BLEU and chrF with sacrebleu's own bootstrap (Koehn 2004) and signature.

    Raises EnvironmentProblem when sacrebleu is not installed.
    """
    metrics = _require("sacrebleu.metrics", "sacrebleu")
    return [
        _corpus_figure("bleu", metrics.BLEU(), answers, references, resamples),
        _corpus_figure("chrf", metrics.CHRF(), answers, references, resamples),
    ]


def _corpus_figure(name: str, metric: Any, answers: Sequence[str], references: Sequence[str], resamples: int) -> Figure:
    if not answers:
        return make_figure(name, Interval(None, None, None, 0, "none"), unit="x 100", better="higher")
    several = len(answers) > 1
    score = metric.corpus_score(list(answers), [list(references)], n_bootstrap=resamples if several else 1)
    middle, half = (
        float(score._mean),
        float(score._ci),
    )  # of chrF they are numpy's own float32, which JSON does not know
    low, high = (max(middle - half, 0.0), min(middle + half, 100.0)) if several else (None, None)
    found = Interval(float(score.score), low, high, len(answers), "bootstrap" if several else "none")
    signature = "|".join(part for part in str(metric.get_signature()).split("|") if not part.startswith(("bs:", "rs:")))
    return make_figure(name, found, unit="x 100", better="higher", signature=signature)


def _require(module: str, package: str) -> Any:
    """Import a scorer, or say in one line how to get it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EnvironmentProblem(
            f"{package} is not installed; pip install 'alignkit[eval]', or leave the metric overlap out"
        ) from error
