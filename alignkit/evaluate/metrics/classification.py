"""Accuracy of a classifier, beside the commonest label and naive Bayes (multinomial, add-one) on its training rows."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignkit.data import Row
from alignkit.errors import DataError, UsageError
from alignkit.evaluate.context import ROWS, Context, Figure, Metric, make_figure, wilson
from alignkit.evaluate.target import Target, read_measured
from alignkit.models.chat import Chat
from alignkit.models.files import find_model_dir
from alignkit.models.frozen import load_tokenizer_of
from alignkit.models.heads import encode_tasks, predict
from alignkit.models.load import load_trained
from alignkit.recipe.schema import DataSource

_WORD = re.compile(r"\w+|[^\w\s]")
_ALL = 10**9


def measure(context: Context) -> list[Figure]:
    target, rows, space = context.target, context.rows, context.space
    assert target.head is not None
    objective, labels, options = target.head["objective"], target.head["labels"], target.stage.get("options", {})
    right = _name_labels(target, rows)
    # What the classifier says.
    tokenizer, directory = load_tokenizer_of(target.source), find_model_dir(target.source) or Path(target.source)
    model = load_trained(directory, device=space.device, reward=True, trust_code=space.trust_code)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = min(filter(None, (target.stage.get("trainer", {}).get("max_length"), positions)), default=None)
    texts = [(str(row.prompt), list(map(str, row.completions))) for row in rows]
    sequences, pad = encode_tasks(Chat(tokenizer), objective, texts, limit), int(tokenizer.pad_token_id)
    scores = predict(model, sequences, objective, pad_id=pad, batch_size=space.batch_size)
    best = [values.index(max(values)) for values in scores]
    guesses = {"accuracy": [labels[number] for number in best] if labels else list(map(str, best))}
    # The rows it was trained on, and what they alone would get.
    share = options["eval"] if isinstance(options.get("eval"), float) else None
    known: list[Row] = []
    try:
        if options.get("data"):
            sources, seed = [DataSource(**source) for source in options["data"]], int(target.stage.get("seed", 0))
            settings: dict[str, Any] = {"method": objective, "held_out": False, "warn": lambda _: None}
            known, _ = read_measured(sources, share=share, seed=seed, max_rows=_ALL, **settings)
    except DataError as error:
        space.warn(f"the rows of training are not there ({error}): no bag of words, and the commonest label is that of "
                   "the rows measured")  # fmt: skip
    known_labels = _name_labels(target, known)
    guesses["accuracy_majority"] = [Counter(known_labels or right).most_common(1)[0][0]] * len(rows)
    if known and labels:
        bags, asked = ([Counter(_WORD.findall(" ".join(map(str, row.completions)).lower())) for row in given]
                       for given in (known, rows))  # fmt: skip
        guesses["accuracy_bag_of_words"] = naive_bayes(bags, known_labels, asked)
    figures = []
    for name, guess in guesses.items():
        hits = [one == other for one, other in zip(guess, right, strict=True)]
        figures.append(make_figure(name, wilson(sum(hits), len(hits)), unit="share", better="higher"))
        for label in labels if name == "accuracy" else ():
            of_label = [hit for hit, answer in zip(hits, right, strict=True) if answer == label]
            if of_label:
                found = wilson(sum(of_label), len(of_label))
                figures.append(make_figure(name, found, unit="share", better="higher", slice=f"label {label}"))
    return context.place(figures)


_NEEDS = (lambda context: context.target.head, "the model is no classifier of an sft stage")
METRIC = Metric(measure, (ROWS, _NEEDS))


def naive_bayes(texts: Sequence[Counter[str]], labels: Sequence[str], asked: Sequence[Counter[str]]) -> list[str]:
    """Label bags of words as the bags with labels have it; words that those have not say nothing."""
    counts: dict[str, Counter[str]] = {label: Counter() for label in sorted(set(labels))}
    for words, label in zip(texts, labels, strict=True):
        counts[label].update(words)
    vocabulary = set[str]().union(*counts.values())
    prior = Counter(labels)
    totals = {label: sum(bag.values()) + len(vocabulary) for label, bag in counts.items()}

    def score(words: Counter[str], label: str) -> float:
        bag, total = counts[label], totals[label]
        known = ((word, number) for word, number in words.items() if word in vocabulary)
        return math.log(prior[label]) + sum(number * math.log((bag[word] + 1) / total) for word, number in known)

    return [max(counts, key=lambda label: score(words, label)) for words in asked]


def _name_labels(target: Target, rows: Sequence[Row]) -> list[str]:
    """Name the right answers; raises UsageError for a label that the classifier has not."""
    assert target.head is not None
    labels, given = target.head["labels"], target.stage.get("options", {}).get("labels") or []
    named = []
    for row in rows:
        name = row.answer
        if labels and name not in labels and name.isdecimal() and int(name) < len(given):
            name = given[int(name)]
        if labels and name not in labels:
            raise UsageError(f"label: is {name}; the classifier has {', '.join(labels)}", where=row.place)
        named.append(name)
    return named
