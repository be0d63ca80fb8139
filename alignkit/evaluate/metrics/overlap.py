"""ROUGE, BLEU and chrF times 100. Overlap is not quality: ROUGE-L ranks raw GPT-3 above InstructGPT on summaries."""

import importlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

from alignkit.data import Text
from alignkit.errors import EnvironmentProblem
from alignkit.evaluate.context import POLICY, ROWS, Context, Figure, Method, Metric, make_figure, mean
from alignkit.feedback.prompts import read_text

_LENGTHS = (8, 12, 16, 24, 32, 48)  # words of a source that a bin ends with


def measure(context: Context) -> list[Figure]:
    limit, resamples = context.sampling["max_new_tokens"], context.options.resamples
    beams, pairs = context.options.num_beams, _list_references(context)
    engine = context.options.generation.model_dump(exclude_defaults=True)
    asked = [prompt for prompt, _ in pairs]
    found = context.policy.answer(asked, max_new_tokens=limit, num_beams=beams, **engine)
    answers = [group[0].text for group in found]
    references = [read_text(answer) for _, answer in pairs]
    figures = measure_rouge(answers, references, resamples=resamples)
    figures += measure_bleu(answers, references, resamples=resamples)
    if context.policy.chat.encoder_decoder:
        figures += measure_bleu_by_length([read_text(prompt) for prompt, _ in pairs], answers, references, resamples)
    beamed = engine | ({"num_beams": beams} if beams > 1 else {})
    return context.place(figures, temperature=0.0, max_new_tokens=limit, **beamed)


def _list_references(context: Context) -> list[tuple[Text, Text]]:
    """List prompts with their one right answer; the better of two is not that unless overlap is asked for."""
    if context.options.metrics is None and any(row.kind in ("pair", "ranked", "unpaired") for row in context.rows):
        return []
    return [(prompt, answer) for prompt, answer in context.asked if answer is not None]


_NEEDS = (_list_references, "the rows hold no single right answer to compare with")
METRIC = Metric(measure, (ROWS, POLICY, _NEEDS), optional=True)


def measure_rouge(
    answers: Sequence[str], references: Sequence[str], *, stemmer: bool = False, resamples: int
) -> list[Figure]:
    """Measure the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004); `stemmer` is Porter's."""
    names = ("rouge1", "rouge2", "rougeL")
    scorer = _require("rouge_score.rouge_scorer", "rouge-score").RougeScorer(list(names), use_stemmer=stemmer)
    scored = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    found = {name: mean([100 * row[name].fmeasure for row in scored], resamples=resamples) for name in names}
    common: dict[str, Any] = {"unit": "x 100", "better": "higher", "settings": {"stemmer": stemmer}}
    return [make_figure(name, each, **common) for name, each in found.items()]


def measure_bleu(answers: Sequence[str], references: Sequence[str], *, resamples: int) -> list[Figure]:
    """Measure corpus BLEU and chrF with sacrebleu's own bootstrap (Koehn 2004) and signature."""
    metrics = _require("sacrebleu.metrics", "sacrebleu")
    several, figures = len(answers) > 1, []
    for name, metric in (("bleu", metrics.BLEU(force=True)), ("chrf", metrics.CHRF())):
        found, settings = Figure("", None, None, None, 0), dict[str, Any]()
        if answers:
            score = metric.corpus_score(list(answers), [list(references)], n_bootstrap=resamples if several else 1)
            middle, half = float(score._mean), float(score._ci)  # of chrF numpy's own float32, which is no JSON
            low, high = (max(middle - half, 0.0), min(middle + half, 100.0)) if several else (None, None)
            method: Method = "bootstrap" if several else "none"
            found = Figure("", float(score.score), low, high, len(answers), interval=method)
            parts = str(metric.get_signature()).split("|")
            settings = {"signature": "|".join(part for part in parts if not part.startswith(("bs:", "rs:")))}
        figures.append(make_figure(name, found, unit="x 100", better="higher", settings=settings))
    return figures


def measure_bleu_by_length(
    sources: Sequence[str], answers: Sequence[str], references: Sequence[str], resamples: int
) -> list[Figure]:
    """Measure BLEU of the sentences of like length of their source, in words (Bahdanau et al. 2014, figure 2)."""
    places = [bisect_left(_LENGTHS, len(source.split())) for source in sources]
    figures = []
    for place in sorted(set(places)) if len(set(places)) > 1 else ():
        last = f"to {_LENGTHS[place]}" if place < len(_LENGTHS) else "or more"
        chosen, known = (list(compress(texts, [at == place for at in places])) for texts in (answers, references))
        bleu = measure_bleu(chosen, known, resamples=resamples)[0]
        figures.append(replace(bleu, slice=f"{[0, *_LENGTHS][place] + 1} {last} source words"))
    return figures


def _require(module: str, package: str) -> Any:
    """Import a scorer, or say in one line how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise EnvironmentProblem(
            f"{package} is not installed; pip install 'alignkit[eval]', or leave the metric overlap out"
        ) from error
