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
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from alignkit import console
from alignkit.errors import RunError
from alignkit.feedback.prompts import Request
from alignkit.feedback.writer import Answered, Decision, Job, Model, Reply, Sampling
from alignkit.runs.files import disk_failures, open_own, scan_lines, tell_bad_lines
from alignkit.runs.stop import Stop

Record = dict[str, Any]
_Batch = list[tuple[int, Mapping[str, Any]]]  # records that came together, by the number of their question
_CHUNK_BYTES = 1 << 20
_CHECK = "crc32"


def seed_of(*parts: Any) -> int:
    """Derive a seed that depends on these parts only."""
    text = "\x1e".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=7).digest(), "little")


def key_of(**facts: Any) -> str:
    """Hash the facts, in hex: two askings share a key only when all of them are equal."""
    return _hash(facts)


def _hash(facts: Any) -> str:
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


class Store:
    """Answers by their keys; only where each starts is in memory. For several threads, and one process at a time."""

    def __init__(self, path: Path | None = None, *, alone: bool = False) -> None:
        """Open the file, or make it; a last line that a kill or a full disk has torn is cut off.

        Without a path it is a temporary one. Lines that are damaged inside, or hold something else, stay and are passed
        over with a warning: what they answered is asked again. Raises DiskError for what is no file; with `alone`,
        RunError when another process has it open: that of a run has the run's lock.
        """
        self.path = path or Path(tempfile.gettempdir(), "answers")
        self._is_kept = path is not None
        self._lock = threading.Lock()
        self._starts: dict[str, int] = {}
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
        self._end = self._index()

    def __len__(self) -> int:
        return len(self._starts)

    def __contains__(self, key: str) -> bool:
        return key in self._starts

    def get(self, key: str) -> Record | None:
        start = self._starts.get(key)
        return None if start is None else self._read(start)

    def put(self, records: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Keep records that came together, the first of each key, in one write; DiskError leaves the file as it was."""
        with self._lock, disk_failures(self.path.parent, self.path.name):
            new = {key: record for key, record in records if key not in self._starts}
            lines = [_encode({"key": key, **record}) for key, record in new.items()]
            data, written = b"".join(lines), 0
            try:
                while written < len(data):
                    written += os.pwrite(self._file.fileno(), data[written:], self._end + written)
                if self._is_kept:
                    os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(self._end)
                raise
            for key, line in zip(new, lines, strict=True):
                self._starts[key] = self._end
                self._end += len(line)

    def values(self) -> Iterator[Record]:
        for start in list(self._starts.values()):
            yield self._read(start)

    def close(self) -> None:
        self._file.close()

    def fill(
        self, keys: Sequence[str], answer: Callable[[list[int], frozenset[int]], Iterable[_Batch]], what: str
    ) -> None:
        """Have the questions with these keys answered where they are not yet, and keep answers as they come.

        `answer` is given the places of all different questions, and which of those (by their number) are known: the
        batches of a local model are those of the whole list. It yields (number, record) of answers that came together.
        """
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
        every `batch_size` of them.
        """
        keys = [_hash([common, question]) for question in questions]

        def fill(places: list[int], known: frozenset[int]) -> Iterator[_Batch]:
            numbers = [number for number in range(len(places)) if number not in known]
            for start in range(0, len(numbers), batch_size):
                batch = numbers[start : start + batch_size]
                values = answer([questions[places[number]] for number in batch])
                yield [(number, {"value": value}) for number, value in zip(batch, values, strict=True)]

        self.fill(keys, fill, "questions answered")
        return [self._read(self._starts[key])["value"] for key in keys]

    def _read(self, start: int) -> Record:
        data = b""
        while b"\n" not in data[-_CHUNK_BYTES:]:
            chunk = os.pread(self._file.fileno(), _CHUNK_BYTES if data else 8192, start + len(data))
            if not chunk:
                break
            data += chunk
        record: Record = json.loads(data.partition(b"\n")[0])
        record.pop(_CHECK, None)
        return record

    def _index(self) -> int:
        """Find where every record starts; return the end of the last whole line, and cut off what follows it."""
        end, bad = 0, []
        with os.fdopen(os.dup(self._file.fileno()), "rb") as file:
            file.seek(0)
            for number, (line, record) in enumerate(scan_lines(file, self.path.name), 1):
                check = record.pop(_CHECK, None) if record else None  # those of earlier versions have none
                is_whole = record and (check is None or _encode(record).endswith(b'"%s"}\n' % str(check).encode()))
                if not record or not isinstance(record.get("key"), str) or not is_whole:
                    bad.append(number)  # a crash of the machine, not of the process, can leave a block of zeros inside
                else:
                    self._starts.setdefault(record["key"], end)
                end += len(line)
        if end < os.fstat(self._file.fileno()).st_size:
            self._file.truncate(end)
        tell_bad_lines(self.path, bad, "what they answered is asked again")
        return end


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
        keys = [key_of(**common, request=key_of(**asdict(job.request)), seed=job.seed) for job in jobs]
        self._ask(keys, jobs, lambda new, known: model.write(new, sampling, known), {"kind": kind, "by": by}, about)
        return [Reply.from_record(self._store.get(key) or {}) for key in keys]

    def decide(
        self, model: Model, requests: Sequence[Request], *, by: str, about: Sequence[Mapping[str, Any]]
    ) -> list[Decision]:
        """Decide each question; raises as `write` does."""
        self._ask(_decision_keys(model, requests), requests, model.decide, {"kind": "label", "by": by}, about)
        return self.known(model, requests)  # type: ignore[return-value]

    def known(self, model: Model, requests: Sequence[Request]) -> list[Decision | None]:
        """Look up the decisions that are there, None for the others; nobody is asked."""
        records = [self._store.get(key) for key in _decision_keys(model, requests)]
        return [None if record is None else Decision.from_record(record) for record in records]

    def _ask(
        self, keys: Sequence[str], items: Sequence[Any],
        ask: Callable[[list[Any], frozenset[int]], Iterator[list[tuple[int, Any]]]],
        facts: Mapping[str, Any], about: Sequence[Mapping[str, Any]],
    ) -> None:  # fmt: skip
        def answer(places: list[int], known: frozenset[int]) -> Iterator[_Batch]:
            batch: list[tuple[int, Answered]]
            for batch in ask([items[place] for place in places], known):
                yield [(number, {**facts, **about[places[number]], **found.to_record()}) for number, found in batch]
            self._stop.check()  # after a signal the model has ended, when what was under way had come

        self._store.fill(keys, answer, f"{self._name}: {facts['kind']}")


def _decision_keys(model: Model, requests: Sequence[Request]) -> list[str]:
    return [key_of(ask="decide", model=model.identity, request=key_of(**asdict(request))) for request in requests]
