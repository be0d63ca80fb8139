"""Toy data from a seeded grammar: short film reviews, instructions about them, and preferences with a known reward.

Needs no file and no network. The world is one: its seed is fixed, so a training seed changes how a model is trained,
never what it is trained on. Row i of a split is the same however many rows are asked for. Train and test never share
a prompt (every film belongs to one split). `true_reward` is the judge that real data never has. words.json
says what each kind of it is, and has its words.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import parse_qsl

from alignkit.errors import DataError, Problem, suggest

PREFIX = "builtin:"
DEFAULT_ROWS = 1000
MAX_ROWS = 10_000_000
SPLITS = ("train", "test")
_WORLD = "alignkit world 1"
_RANKED_ANSWERS = 4

_WORDS = json.loads(Path(__file__).with_name("words.json").read_text("utf-8"))
NAMES: tuple[str, ...] = tuple(_WORDS["data"])
# Worth of a word, from -1 to 1. Good and bad words have like lengths, so that length says nothing about reward.
_ADJECTIVES, _VERBS = (
    {float(worth): words for worth, words in _WORDS[name].items()} for name in ("adjectives", "verbs")
)
_WORD = re.compile(r"[a-z]+")
_WORD_WORTH = {word: worth for table in (_ADJECTIVES, _VERBS) for worth, words in table.items() for word in words}
# The questions of the constitution builtin:positive-reviews (the feedback room's), which tests compare.
COMPARISONS: tuple[str, ...] = tuple(_WORDS["comparisons"])
_MOOD_WORTHS = {"positive": (1.0, 0.5), "negative": (-1.0, -0.5), "mixed": (1.0, 0.5, -0.5, -1.0)}


def true_reward(text: str) -> float:
    """The toy world's sentiment of a text: the mean worth, in [-1, 1], of its words that have one; else 0."""
    worths = [_WORD_WORTH[word] for word in _WORD.findall(text.lower()) if word in _WORD_WORTH]
    return sum(worths) / len(worths) if worths else 0.0


@dataclass(frozen=True)
class BuiltinData:
    """Which toy data, and how much of it."""

    name: str
    split: str
    num_rows: int
    noise: float = 0.0  # preferences: share of pairs the wrong way round

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}"


def parse_builtin(path: str, *, split: str = "train", max_rows: int | None = None) -> BuiltinData:
    """Read "builtin:preferences?rows=2000&noise=0.1"; raises DataError with all that is wrong at once."""
    name, _, query = path.removeprefix(PREFIX).partition("?")
    given = dict(parse_qsl(query, keep_blank_values=True))
    problems = []
    if name not in NAMES:
        problems.append(f"there is no such data{suggest(name, NAMES, listed='accepted:')}")
    if split not in SPLITS:
        problems.append(f"split is {split!r}; builtin data has {' and '.join(SPLITS)}")
    accepted = ["rows", "noise"] if name == "preferences" else ["rows"]
    unknown = [key for key in given if key not in accepted]
    problems += [f"?{key}= is not a parameter{suggest(key, accepted, listed='accepted:')}" for key in unknown]

    def read(key: str, default: float, what: str, is_good: Callable[[float], bool]) -> float:
        try:
            value = float(given.get(key, default))
        except ValueError:
            value = math.nan
        if not is_good(value):
            problems.append(f"{key} is {given.get(key, default)!r}; it must be a {what}")
        return value

    rows = read("rows", max_rows or DEFAULT_ROWS, f"whole number from 1 to {MAX_ROWS}",
                lambda value: 1 <= value <= MAX_ROWS and value % 1 == 0)  # fmt: skip
    noise = read("noise", 0, "number from 0 to 1", lambda value: 0 <= value <= 1)
    if problems:
        raise DataError([Problem(problem, path) for problem in problems])
    return BuiltinData(name, split, int(rows), noise)


def iter_builtin(data: BuiltinData) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, record) in the formats that files have."""
    random = Random(f"{_WORLD} {data.name} {data.split}")
    noise = Random(f"{_WORLD} noise {data.split}")  # its own stream: noise changes the labels and nothing else
    for number in range(1, data.num_rows + 1):
        record = _make(data.name, random, data.split)
        if data.name == "preferences" and noise.random() < data.noise:
            record = record | {"chosen": record["rejected"], "rejected": record["chosen"]}
        yield f"{data}[row {number}]", record


def _film(random: Random, split: str) -> tuple[str, str, str, str]:
    """Draw a film: title, genre, director, and what kind of film it is; every sixth title is for the test split."""
    while True:
        first, second = random.randrange(len(_WORDS["title_first"])), random.randrange(len(_WORDS["title_second"]))
        if ((first + second) % 6 == 0) == (split == "test"):
            title = f"The {_WORDS['title_first'][first]} {_WORDS['title_second'][second]}"
            genre, director = random.choice(_WORDS["genres"]), random.choice(_WORDS["people"])
            return title, genre, director, f"an {genre}" if genre == "adventure" else f"a {genre}"


def _opinion(random: Random, worths: tuple[float, ...]) -> str:
    """Make one sentence of opinion whose words are worth something in `worths`."""

    def adjective() -> str:
        return random.choice(_ADJECTIVES[random.choice(worths)])

    part, other = random.sample(_WORDS["parts"], 2)
    shape = random.randrange(4)
    drawn = {"how": random.choice(_WORDS["how"])} if shape in (0, 3) else {}
    drawn |= {"verb": random.choice(_VERBS[random.choice(worths)])} if shape == 2 else {"first": adjective()}
    drawn |= {"second": adjective()} if shape == 1 else {}
    return str(_WORDS["opinions"][shape]).format(part=part, other=other, **drawn)


def _fact(random: Random) -> str:
    place, day, hours, other = (random.choice(_WORDS[name]) for name in ("places", "days", "hours", "places"))
    return str(random.choice(_WORDS["facts"])).format(place=place, day=day, hours=hours, other=other)


def _review(random: Random, mood: str = "") -> str:
    """Make two to four sentences: opinions of the mood, or of any, and sometimes a fact."""
    mood = mood or random.choice(list(_MOOD_WORTHS))
    sentences = [_opinion(random, _MOOD_WORTHS[mood]) for _ in range(random.randint(2, 3))]
    if random.random() < 0.5:
        sentences.insert(random.randrange(len(sentences) + 1), _fact(random))
    return " ".join(sentences)


def _user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def _assistant(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def _instruction(random: Random, split: str) -> dict[str, Any]:
    title, genre, director, kind = _film(random, split)
    mood = random.choice(list(_MOOD_WORTHS))
    shape = random.randrange(5)
    if shape <= 1:
        prompt, answer = f"Write a {mood} review of the {genre} {title}.", _review(random, mood)
    elif shape == 2:
        prompt = f"Go on with this review of {title}: {_opinion(random, _MOOD_WORTHS[mood])}"
        answer = _review(random, mood)
    elif shape == 3:
        asked = (("Who made it?", f"{director} made {title}."), ("What kind of film is it?", f"{title} is {kind}."))
        question, answer = random.choice(asked)
        prompt = f"{title} is {kind} by {director}. {question}"
    else:
        opinion = _opinion(random, _MOOD_WORTHS[random.choice(("positive", "negative"))])
        prompt = f"A review of {title} says: {opinion} Did the reviewer like it?"
        answer = "Yes, the review is positive." if true_reward(opinion) > 0 else "No, the review is negative."
    return {"prompt": _user(prompt), "completion": _assistant(answer)}


def _question(random: Random, split: str) -> str:
    title, genre, director, _ = _film(random, split)
    return str(random.choice(_WORDS["questions"])).format(title=title, genre=genre, director=director)


def _rated(random: Random, count: int, make: Callable[[Random], str]) -> list[str]:
    """Make texts of different true reward, best first; their lengths are drawn without regard to it."""
    made: dict[float, str] = {}
    while len(made) < count:
        text = make(random)
        made.setdefault(true_reward(text), text)
    return [made[reward] for reward in sorted(made, reverse=True)]


def _judge_item(random: Random, split: str) -> dict[str, Any]:
    """Ask for the more positive of two answers in the words and layout of the feedback room's chat prompt."""
    question = _question(random, split)
    kind = random.randrange(3)
    if kind == 0:
        # An opinion, then a fact. What decides most comparisons is a word and the place it stands in, neither of which
        # says anything alone, and gradients do not find such a pair; here the word alone decides.
        a, b = _opinion(random, _MOOD_WORTHS[random.choice(("positive", "negative"))]), _fact(random)
    else:
        make = _review if kind == 1 else lambda random: _opinion(random, _MOOD_WORTHS["mixed"])
        pair = _rated(random, 2, make)
        a, b = pair if random.random() < 0.5 else pair[::-1]
    first = true_reward(a) > true_reward(b)
    asked = (
        "Consider the following conversation between a human and an assistant:\n\n"
        f"Human: {question}\n\n\n{random.choice(COMPARISONS)} Options:\n (A) [[[{a}]]]\n (B) [[[{b}]]]"
    )
    return {"prompt": _user(asked), "completion": _assistant(f"The answer is: ({'A' if first else 'B'})")}


# Nouns, adjectives and verbs of two made-up languages: the adjective goes before its noun in one and follows it in the
# other, the verb stands in the middle or at the end.
_NOUNS, _KINDS, _ACTS = (_WORDS[name] for name in ("nouns", "kinds", "acts"))
_NOUN_PAIRS = [(one, other) for one in _NOUNS for other in _NOUNS if one != other]
_CLAUSES = {"train": [pair for at, pair in enumerate(_NOUN_PAIRS) if at % 6], "test": _NOUN_PAIRS[::6]}


def _translation(random: Random, split: str) -> dict[str, Any]:
    """Translate a sentence of one to three clauses; a clause belongs to one split by its nouns."""

    def thing(noun: str) -> tuple[str, str]:
        kinds = random.sample(list(_KINDS), random.randint(0, 2))
        return " ".join(["il", *kinds, noun]), " ".join(["de", _NOUNS[noun], *map(_KINDS.__getitem__, kinds)])

    def clause() -> tuple[str, str]:
        first, second = random.choice(_CLAUSES[split])
        (one, ein), (other, ander), act = thing(first), thing(second), random.choice(list(_ACTS))
        return f"{one} {act} {other}", f"{ein} {ander} {_ACTS[act]}"

    sources, targets = zip(*(clause() for _ in range(random.randint(1, 3))), strict=True)
    return {"prompt": " e ".join(sources) + " .", "completion": " en ".join(targets) + " ."}


def _sum(random: Random, split: str) -> dict[str, Any]:
    """A sum or a difference; which of its numbers come together says the split."""
    while True:
        a, b, minus = random.randrange(10), random.randrange(10), random.random() < 0.5
        if ((7 * a + 3 * b) % 5 == 0) == (split == "test"):
            answer = str(a - b if minus else a + b)
            return {"prompt": f"{a} {'-' if minus else '+'} {b} =", "completion": f" {answer}", "answer": answer}


def _make(name: str, random: Random, split: str) -> dict[str, Any]:
    makers = {"instructions": _instruction, "judge-items": _judge_item, "translation": _translation, "arithmetic": _sum}
    if name in makers:
        return makers[name](random, split)
    if name == "reviews":
        title, _, director, kind = _film(random, split)
        review = _review(random, random.choice(("positive", "negative")))
        return {"text": f"{title} is {kind} by {director}. {review}"}
    if name == "sentiment":
        label = random.choice(("positive", "negative"))
        return {"text": _review(random, label), "label": label}
    asked = {"prompt": _user(_question(random, split))}
    if name == "preferences":
        chosen, rejected = map(_assistant, _rated(random, 2, _review))
        return {**asked, "chosen": chosen, "rejected": rejected}
    if name == "ranked":
        reviews = _rated(random, _RANKED_ANSWERS, _review)
        return {**asked, "completions": list(map(_assistant, reviews)), "scores": list(map(true_reward, reviews))}
    if name == "unpaired":
        review = _review(random, random.choice(("positive", "negative")))
        return {**asked, "completion": _assistant(review), "label": true_reward(review) > 0}
    return asked
