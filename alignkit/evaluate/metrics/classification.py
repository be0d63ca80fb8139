"""Accuracy of a classifier, beside the commonest label and naive Bayes (multinomial, add-one) on its training rows."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from alignkit.data import Row
from alignkit.errors import DataError, UsageError
from alignkit.evaluate.context import ROWS, Context, Metric
from alignkit.evaluate.intervals import Figure, make_figure, wilson
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
    target, rows = context.target, context.rows
    assert target.head is not None
    right = _name_labels(target, rows)
    predicted = _classify(context)
    guesses = {"accuracy": predicted}
    try:
        known = _read_trained(target)
    except DataError as error:
        context.space.warn(f"the rows of training are not there ({error}): no bag of words, and the commonest label is "
                           "that of the rows measured")  # fmt: skip
        known = []
    labels = _name_labels(target, known) or right
    guesses["accuracy_majority"] = [Counter(labels).most_common(1)[0][0]] * len(rows)
    if known and target.head["labels"]:
        bags, asked = ([Counter(_WORD.findall(" ".join(map(str, row.completions)).lower())) for row in given]
                       for given in (known, rows))  # fmt: skip
        guesses["accuracy_bag_of_words"] = naive_bayes(bags, labels, asked)
    figures = []
    for name, guess in guesses.items():
        hits = [one == other for one, other in zip(guess, right, strict=True)]
        figures.append(make_figure(name, wilson(sum(hits), len(hits)), unit="share", better="higher"))
        for label in target.head["labels"] if name == "accuracy" else ():
            of_label = [hit for hit, answer in zip(hits, right, strict=True) if answer == label]
            if of_label:
                found = wilson(sum(of_label), len(of_label))
                figures.append(make_figure(name, found, unit="share", better="higher", slice=f"label {label}"))
    return context.place(figures)


METRIC = Metric(
    measure, first=(ROWS,), needs=(lambda context: context.target.head, "the model is no classifier of an sft stage"),
)  # fmt: skip


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


def _classify(context: Context) -> list[str]:
    target, space = context.target, context.space
    assert target.head is not None
    directory, objective, labels = find_model_dir(target.source), target.head["objective"], target.head["labels"]
    tokenizer = load_tokenizer_of(target.source)
    model = load_trained(
        directory or Path(target.source), device=space.device, reward=True, trust_code=space.trust_code
    )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = min(filter(None, (target.stage.get("trainer", {}).get("max_length"), positions)), default=None)
    texts = [(str(row.prompt), list(map(str, row.completions))) for row in context.rows]
    sequences = encode_tasks(Chat(tokenizer), objective, texts, limit)
    found = predict(model, sequences, objective, pad_id=int(tokenizer.pad_token_id), batch_size=space.batch_size)
    best = [values.index(max(values)) for values in found]
    return [labels[number] for number in best] if labels else list(map(str, best))


def _read_trained(target: Target) -> list[Row]:
    """Read the rows that a classifier was trained on; none of what is no run."""
    options = target.stage.get("options", {})
    if not options.get("data"):
        return []
    share = options["eval"] if isinstance(options.get("eval"), float) else None
    sources = [DataSource(**source) for source in options["data"]]
    assert target.head is not None
    objective, seed = target.head["objective"], int(target.stage.get("seed", 0))
    return read_measured(
        sources, share=share, seed=seed, max_rows=_ALL, warn=lambda _: None, method=objective, held_out=False
    )[0]
