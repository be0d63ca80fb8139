"""Everything that was ever answered, in a file that only grows: no question is asked twice, and no answer is lost.

One JSON object a line, keyed by a hash of all that decides the answer, with a checksum of the line; it is on the disk
before `put` returns. Feedback stages, judges and evaluations keep their answers in it.
"""

import fcntl
import hashlib
import json
import os
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

from alignkit import console
from alignkit.errors import RunError
from alignkit.feedback.prompts import Request
from alignkit.feedback.writer import Decision, Job, Model, Reply, Sampling
from alignkit.runs.files import disk_failures, open_own, scan_lines, tell_bad_lines
from alignkit.runs.signals import Stop

Record = dict[str, Any]
_Batch = list[tuple[int, Mapping[str, Any]]]  # records that came together, by the number of their question
_CHECK = "crc32"


def seed_of(*parts: Any) -> int:
    """Derive a seed that depends on these parts only."""
    text = "\x1e".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=7).digest(), "little")


def key_of(*items: Any, **facts: Any) -> str:
    """Hash items or facts, in hex: two askings share a key only when all of them are equal."""
    text = json.dumps(list(items) or facts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Store:
    """Answers by their keys; only where each stands is in memory. Threads and processes may share one file."""

    def __init__(self, path: Path | None = None, *, alone: bool = False) -> None:
        """Open the file, or make it; a last line that a kill or a full disk has torn is cut off.
        Without a path it is a temporary one. Lines that are damaged inside, or hold something else, stay and are passed
        over with a warning: what they answered is asked again. Raises DiskError for what is no file; with `alone`,
        RunError when another process has it open: that of a run has the run's lock."""
        self.path = path or Path(tempfile.gettempdir(), "answers")
        self._is_kept = path is not None
        self._lock, self._alone = threading.Lock(), alone
        self._places: dict[str, tuple[int, int]] = {}  # where each answer starts, and its bytes
        self._file: IO[bytes]
        with disk_failures(self.path.parent, self.path.name):
            if path is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - open as long as the store
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.fdopen(open_own(path, os.O_RDWR | os.O_CREAT, mode=0o600), "r+b", buffering=0)
        if alone:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self._file.close()
                what = "another evaluation is asking a judge; wait for it, or give this one its own --out FILE"
                raise RunError(what, where=str(path)) from None
        self._end = self._num_lines = 0
        with self.exclusive():
            pass

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep other threads and processes from writing, and know what they have written; not where a file system has
        no locks."""
        with self._lock:
            if not self._alone:  # else it is locked as long as it is open
                with suppress(OSError):
                    fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                self._read_on()
                yield
            finally:
                if not self._alone:
                    with suppress(OSError):
                        fcntl.flock(self._file, fcntl.LOCK_UN)

    def _read_on(self) -> None:
        """Find the answers after the last one that is known, and cut off a torn last line."""
        size, bad = os.fstat(self._file.fileno()).st_size, []
        if size == self._end:
            return
        with os.fdopen(os.dup(self._file.fileno()), "rb") as file:
            file.seek(self._end)
            for line, record in scan_lines(file, self.path.name):
                self._num_lines += 1
                check = record.pop(_CHECK, None) if record else None  # those of earlier versions have none
                is_whole = record and (check is None or _encode(record).endswith(b'"%s"}\n' % str(check).encode()))
                if not record or not isinstance(record.get("key"), str) or not is_whole:
                    bad.append(self._num_lines)  # a crash of the machine can leave a block of zeros inside
                else:
                    self._places.setdefault(record["key"], (self._end, len(line)))
                self._end += len(line)
        if self._end < size:
            self._file.truncate(self._end)
        tell_bad_lines(self.path, bad, "what they answered is asked again")

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def get(self, key: str) -> Record | None:
        if key not in self._places:
            return None
        start, length = self._places[key]
        record: Record = json.loads(os.pread(self._file.fileno(), length, start))
        record.pop(_CHECK, None)
        return record

    def put(self, records: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Keep records that came together, the first of each key, in one write; DiskError leaves the file as it was."""
        with self.exclusive(), disk_failures(self.path.parent, self.path.name):
            new: dict[str, bytes] = {}
            for key, record in records:
                if key not in self._places and key not in new:
                    new[key] = _encode({"key": key, **record})
            data, written = b"".join(new.values()), 0
            try:
                while written < len(data):
                    written += os.pwrite(self._file.fileno(), data[written:], self._end + written)
                if self._is_kept:
                    os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(self._end)
                raise
            for key, line in new.items():
                self._places[key] = self._end, len(line)
                self._end, self._num_lines = self._end + len(line), self._num_lines + 1

    def values(self) -> Iterator[Record]:
        return filter(None, map(self.get, list(self._places)))

    def close(self) -> None:
        self._file.close()

    def fill(
        self, keys: Sequence[str], answer: Callable[[list[int], frozenset[int]], Iterable[_Batch]], what: str
    ) -> None:
        """Have the questions with these keys answered where they are not yet, and keep answers as they come. `answer`
        is given the places of all different questions, and which of those (by number) are known: the batches of a local
        model are those of the whole list. It yields (number, record) of answers that came together."""
        first: dict[str, int] = {}
        for place, key in enumerate(keys):
            first.setdefault(key, place)
        places = list(first.values())
        known = frozenset(number for number, key in enumerate(first) if key in self)
        if len(known) == len(places):
            return
        with console.Meter(what, len(places) - len(known)) as meter:
            for batch in answer(places, known):
                self.put([(keys[places[number]], record) for number, record in batch])
                meter.advance(sum(number not in known for number, _ in batch))

    def ask(
        self, common: Any, questions: Sequence[Any], answer: Callable[[list[Any]], Sequence[Any]], *,
        batch_size: int = 64,
    ) -> list[Any]:  # fmt: skip
        """Look up the value of every question; `answer` gives those of questions that are not known yet.
        `common` (weights, settings) and a question must be plain data: together they are the key. Values are kept after
        every `batch_size` of them."""
        keys = [key_of(common, question) for question in questions]

        def fill(places: list[int], known: frozenset[int]) -> Iterator[_Batch]:
            numbers = [number for number in range(len(places)) if number not in known]
            for start in range(0, len(numbers), batch_size):
                batch = numbers[start : start + batch_size]
                values = answer([questions[places[number]] for number in batch])
                yield [(number, {"value": value}) for number, value in zip(batch, values, strict=True)]

        self.fill(keys, fill, "questions answered")
        return [(self.get(key) or {})["value"] for key in keys]


def _encode(record: Record) -> bytes:
    """Write a record as its line: JSON with a checksum of it as the last key."""
    text = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return text[:-1] + b', "%s": "%08x"}\n' % (_CHECK.encode(), zlib.crc32(text))


class Asker:
    """Asks models on behalf of one run, through its store: what was answered before is not asked again."""

    def __init__(self, name: str, store: Store, stop: Stop) -> None:
        self._name, self._store, self._stop = name, store, stop

    def write(
        self, model: Model, jobs: Sequence[Job], sampling: Sampling, *, kind: str, by: str,
        about: Sequence[Mapping[str, Any]],
    ) -> list[Reply]:  # fmt: skip
        """Write a text for each job, facts for people beside it; raises what the model raises, and Stopped."""
        common = {"ask": "write", "model": model.identity, **sampling.settings}
        keys = [key_of(**common, request=key_of(**vars(job.request)), seed=job.seed) for job in jobs]
        self._ask(keys, jobs, partial(model.write, sampling=sampling), {"kind": kind, "by": by}, about)
        return [Reply.from_record(self._store.get(key) or {}) for key in keys]

    def decide(
        self, model: Model, requests: Sequence[Request], *, by: str, about: Sequence[Mapping[str, Any]],
        ask: bool = True,
    ) -> list[Decision | None]:  # fmt: skip
        """Decide each question; raises as `write` does. Without `ask` only look up what is known, None for the rest."""
        common = {"ask": "decide", "model": model.identity}
        keys = [key_of(**common, request=key_of(**vars(request))) for request in requests]
        if ask:
            self._ask(keys, requests, model.decide, {"kind": "label", "by": by}, about)
        return [Decision.from_record(it) if it else None for it in map(self._store.get, keys)]

    def _ask(
        self, keys: Sequence[str], items: Sequence[Any], ask: Callable[..., Iterator[list[tuple[int, Any]]]],
        facts: Mapping[str, Any], about: Sequence[Mapping[str, Any]],
    ) -> None:  # fmt: skip
        def answer(places: list[int], known: frozenset[int]) -> Iterator[_Batch]:
            for batch in ask([items[place] for place in places], known=known):
                yield [(number, {**facts, **about[places[number]], **found.to_record()}) for number, found in batch]
            self._stop.check()  # after a signal the model has ended, when what was under way had come

        self._store.fill(keys, answer, f"{self._name}: {facts['kind']}")
