"""Audits of a recipe before it is trained: near-duplicates, contradictions and ties of its rows, prompts that are held
out of one stage and trained on by another, and settings far from published ones."""

from __future__ import annotations

import json
import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations, islice
from pathlib import Path
from typing import Any
from zlib import crc32

from alignkit.data.load import first_rows, read_rows, split_eval
from alignkit.data.report import DataReport, Rejects
from alignkit.data.rows import Row, fingerprint_prompt, iter_contents, iter_strings
from alignkit.recipe.schema import DataSource
from alignkit.recipe.stage import Stage

_MOST_ROWS, _MOST_WORDS = 100_000, 10_000_000  # of a stage or an evaluation: so many seconds and bytes, and no more
_FEWEST_PARAMETERS = 50_000_000  # of a model that published recipes speak of
_MANY = 0.01  # share of rows from which on it is worth a word
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")  # Chinese and Japanese put no spaces between words
_RUN, _SHORTEST = 5, 16  # words of a run; runs of a text that is long enough to be compared
_HASHES, _BAND, _ALIKE = 64, 4, 0.7
PUBLISHED: list[dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text("utf-8"))


@lru_cache(1 << 18)
def _hash_word(word: str) -> int:
    return crc32(word.encode("utf-8", "replace"))


@dataclass
class RowAudit:
    """What the rows of one stage say about each other, and what they ask."""

    num_rows: int = 0
    prompts: dict[int, str] = field(default_factory=dict)  # fingerprint -> place of the first row with it
    contradictions: list[str] = field(default_factory=list)  # places of rows that say the opposite of an earlier one
    num_compared: int = 0  # pairs of answers
    num_ties: int = 0
    _judged: dict[Any, Any] = field(default_factory=dict)
    _texts: set[int] = field(default_factory=set)
    _words: array[int] = field(default_factory=lambda: array("I"))  # of all texts, one after the other
    _starts: array[int] = field(default_factory=lambda: array("Q"))
    _places: list[str] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Take a row in."""
        self.num_rows += 1
        prompt = fingerprint_prompt(row)
        self.prompts.setdefault(prompt, row.place)
        # What the row judges, and how: of two answers which is better, of one its label.
        answers = [hash(tuple(iter_strings(answer))) for answer in row.completions]
        verdicts: list[tuple[Any, Any]] = []
        if row.kind in ("labelled", "unpaired"):
            verdicts = [((prompt, *answers), row.answer or row.label)]
        elif row.kind in ("pair", "ranked"):
            scores = row.scores or (1.0 if row.label is None else row.label, 0.5)
            compared = list(combinations(zip(answers, scores, strict=True), 2))
            verdicts = [((prompt, *sorted((one, other))), (one < other) is (of_one > of_other))
                        for (one, of_one), (other, of_other) in compared if of_one != of_other]  # fmt: skip
            self.num_compared += len(compared)
            self.num_ties += len(compared) - len(verdicts)
        if sum(self._judged.setdefault(key, verdict) != verdict for key, verdict in verdicts):
            self.contradictions.append(row.place)
        text = " ".join(iter_contents(row))
        if (mark := hash(text)) in self._texts or len(self._words) > _MOST_WORDS:
            return
        self._texts.add(mark)
        self._starts.append(len(self._words))
        self._places.append(row.place)
        self._words.extend(map(_hash_word, _WORD.findall(text.lower())))

    def find_near_duplicates(self) -> list[tuple[str, str]]:
        """List the places of rows that are nearly an earlier one, each with that one; equal rows are not among them.
        Alike are texts that have seven in ten of their runs of five words in common, by MinHash (Broder 1997) of 64
        hashes in bands of four. Runs that one row in twenty has are layout, such as an instruction: they do not count.
        """
        import numpy as np

        words = np.frombuffer(self._words, dtype=np.uint32)
        if len(words) < _RUN:
            return []
        runs = np.zeros(len(words) - _RUN + 1, dtype=np.uint64)
        for place in range(_RUN):
            runs = (runs ^ words[place : len(runs) + place]) * np.uint64(0x9E3779B97F4A7C15)
            runs ^= runs >> np.uint64(29)
        starts = np.frombuffer(self._starts, dtype=np.uint64)
        text_of = np.searchsorted(starts, np.arange(len(words), dtype=np.uint64), side="right") - 1
        within = text_of[: len(runs)] == text_of[_RUN - 1 :]
        runs, text_of = (runs[within] >> np.uint64(32)).astype(np.uint32), text_of[: len(within)][within]
        values, of_value, counts = np.unique(runs, return_inverse=True, return_counts=True)
        rare = (counts <= max(20, len(starts) // 20))[of_value]
        runs, text_of = runs[rare], text_of[rare]
        texts, first, counts = np.unique(text_of, return_index=True, return_counts=True)
        long_enough = counts >= _SHORTEST
        if len(texts) < 2 or not long_enough.any():
            return []
        draw = np.random.default_rng(0)
        factors = draw.integers(0, 1 << 31, size=_HASHES, dtype=np.uint32) * np.uint32(2) + np.uint32(1)
        shifts = draw.integers(0, 1 << 32, size=_HASHES, dtype=np.uint32)
        smallest = [np.minimum.reduceat(runs * a + b, first)[long_enough] for a, b in zip(factors, shifts, strict=True)]
        signatures, texts = np.stack(smallest, axis=1), texts[long_enough]
        nearest: dict[int, int] = {}
        for band in range(0, _HASHES, _BAND):
            keys = np.ascontiguousarray(signatures[:, band : band + _BAND]).view(f"V{4 * _BAND}").ravel()
            _, earliest, group = np.unique(keys, return_index=True, return_inverse=True)
            others = earliest[group]
            shared = (signatures == signatures[others]).mean(axis=1)
            for row in np.flatnonzero((shared >= _ALIKE) & (others < np.arange(len(others)))):
                nearest.setdefault(int(row), int(others[row]))
        return [(self._places[texts[row]], self._places[texts[nearest[row]]]) for row in sorted(nearest)]

    def advise(self) -> list[str]:
        """Say what makes the rows doubtful, each with a number and a place."""
        said, near = [], self.find_near_duplicates()
        if len(near) > _MANY * self.num_rows:
            first, same = near[0]
            said.append(f"{len(near)} of {self.num_rows} rows are nearly an earlier one, first {first} as {same}")
        if self.contradictions:
            said.append(f"{len(self.contradictions)} rows say the opposite of an earlier one with the same prompt and "
                        f"answers, first {self.contradictions[0]}")  # fmt: skip
        if self.num_ties > _MANY * self.num_compared:
            what = "comparisons are ties (label 0.5, or equal scores), which prefer no answer"
            said.append(f"{self.num_ties} of {self.num_compared} {what}")
        return said


def audit_rows(
    stages: Sequence[Stage], evaluation: Sequence[DataSource] = (), *, max_rows: int | None = None
) -> dict[str, list[str]]:
    """Give advice by stage, and for `evaluate`, of at most 100,000 rows each: doubtful rows, leaks along starts."""
    advice: dict[str, list[str]] = defaultdict(list)
    trained: dict[str, RowAudit] = {}
    held_out: dict[str, RowAudit] = {}
    for stage in stages:
        share, apart = stage.training.eval, RowAudit()
        trained[stage.name], held_out[stage.name] = found, _ = RowAudit(), apart
        rows = _read(stage, first_rows(stage, DataReport()))
        for is_held, row in split_eval(rows, share if isinstance(share, float) else 0.0, stage.seed):
            (apart if is_held else found).add(row)
        for row in _read(stage, share) if isinstance(share, list) else ():
            apart.add(row)
        advice[stage.name] += found.advise()
    starts = {stage.name: stage.start_stage for stage in stages}
    for name, apart in held_out.items():
        before = starts[name]
        while before in trained:
            advice[name] += _find_leak(apart.prompts, "held-out prompts", before, trained[before].prompts)
            before = starts[before]
    if evaluation and stages:
        asked = RowAudit()
        for row in islice(_read(stages[0], evaluation, method="eval"), max_rows):
            asked.add(row)
        for name, rows_of in trained.items():
            advice["evaluate"] += _find_leak(asked.prompts, "prompts of the evaluation", name, rows_of.prompts)
    return advice


def _read(stage: Stage, sources: Sequence[DataSource], method: str | None = None) -> Iterable[Row]:
    lenient = replace(stage, options=stage.options.model_copy(update={"on_bad_row": "skip"}))
    return islice(read_rows(lenient, sources, report=DataReport(), rejects=Rejects(), method=method), _MOST_ROWS)


def _find_leak(asked: Mapping[int, str], what: str, stage: str, trained: Mapping[int, str]) -> list[str]:
    seen = [place for prompt, place in asked.items() if prompt in trained]
    return [f"{len(seen)} of {len(asked)} {what} are trained on by {stage}, first {seen[0]}"] if seen else []


def compare_settings(stage: Stage, *, num_parameters: int | None = None) -> list[str]:
    """Name settings beyond those of published recipes for pre-trained models; none for random or built-in weights, nor
    for a model of so few parameters, where they are known, that it takes larger steps than any of a published recipe.
    """
    is_new = stage.model.path.startswith("builtin:") or stage.model.init == "scratch"
    is_new = is_new or (num_parameters is not None and num_parameters < _FEWEST_PARAMETERS)
    said = list[str]()
    for row in PUBLISHED if stage.objective in (None, "chat") and not is_new else ():
        key, low, high = row["key"], row.get("low", 0.0), row["high"]
        value = stage.trainer.get(key, getattr(stage.options, key, None))
        of_others = key == "beta" and stage.trainer.get("loss_type", "sigmoid") not in ("sigmoid", ["sigmoid"])
        if row["method"] != stage.method or row.get("lora", bool(stage.lora)) != bool(stage.lora) or of_others:
            continue
        if isinstance(value, int | float) and not low <= value <= high:
            side, kind = "below" if value < low else "above", " with LoRA" if row.get("lora") else ""
            what = f"{side} what published recipes of {stage.method}{kind} take: {row['source']}"
            said.append(f"{stage.name}.{key} is {value:g}, {what}")
    return said
