"""Answers and scores kept by content: what was asked of which weights under which settings.

A file of JSON lines that grows as results come, so that an evaluation that is interrupted or repeated asks again for
nothing it has. Deliberately never cleared by itself: it lies in the run directory and may be deleted with it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from alignkit import console
from alignkit.feedback.cache import Store
from alignkit.runs.files import disk_failures

_NOTE_SECONDS = 10.0


class Cache:
    """Values by the hash of their question; without a path they live as long as the object."""

    def __init__(self, path: Path | None = None) -> None:
        self.num_hits = self.num_misses = 0
        self._store: Store | None = None
        if path is not None:
            with disk_failures(path.parent, "the evaluation cache"):
                path.parent.mkdir(parents=True, exist_ok=True)
            self._store = Store(path)
        self._values = (
            {row["key"]: row["value"] for row in self._store.values() if "value" in row} if self._store else {}
        )

    def ask(
        self,
        common: Any,
        questions: Sequence[Any],
        answer: Callable[[list[int]], Sequence[Any]],
        *,
        batch_size: int = 64,
    ) -> list[Any]:
        """Return the value of every question; `answer` is called with the places of those that are not known yet.

        `common` (weights, settings) and a question must be plain data: together they are the key. Values are kept after
        every `batch_size` of them.
        """
        keys = [_hash(common, question) for question in questions]
        unknown = {key: place for place, key in reversed(list(enumerate(keys))) if key not in self._values}
        places = sorted(unknown.values())
        self.num_misses += len(places)
        self.num_hits += len(keys) - len(places)
        said = time.monotonic()
        for start in range(0, len(places), batch_size):
            if start and time.monotonic() - said >= _NOTE_SECONDS:
                said = time.monotonic()
                console.note(f"{start} of {len(places)} questions are answered")
            batch = places[start : start + batch_size]
            new = {keys[place]: value for place, value in zip(batch, answer(batch), strict=True)}
            self._values |= new
            if self._store is not None:
                self._store.put_all([(key, {"value": value}) for key, value in new.items()])
        return [self._values[key] for key in keys]


def _hash(common: Any, question: Any) -> str:
    text = json.dumps([common, question], sort_keys=True, ensure_ascii=False)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
