"""Everything that was ever answered, in a file that only grows: no question is asked twice, and no answer is lost.

One JSON object a line, keyed by a hash of all that decides the answer, with a checksum of the line; it is on the disk
before `put` returns.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from alignkit import console
from alignkit.feedback.prompts import Request
from alignkit.feedback.writer import Decision, Job, Model, Reply, Sampling
from alignkit.runs.files import disk_failures, open_own, scan_lines, tell_bad_lines
from alignkit.runs.stop import Stop

Record = dict[str, Any]
About = Mapping[str, Any]
_Answer = TypeVar("_Answer", Reply, Decision)
_NOTE_SECONDS = 10.0
_CHUNK_BYTES = 1 << 20
_CHECK = "crc32"


def key_of(**facts: Any) -> str:
    """Return a key, in hex, that two askings share only when all facts are equal."""
    return _hash(json.dumps(facts, sort_keys=True, ensure_ascii=False, default=str))


class Store:
    """The records of one run. Safe to use from several threads; one process at a time, which the run's lock sees to.

    In memory is only where each record starts, some 120 bytes for each.
    """

    def __init__(self, path: Path) -> None:
        """Open the file, or make it; a last line that a kill or a full disk has torn is cut off.

        Lines that are damaged inside, or hold something else, stay and are passed over with a warning: what they
        answered is asked again. Raises DiskError for what is no file.
        """
        self.path = path
        self._lock = threading.Lock()
        self._starts: dict[str, int] = {}
        with disk_failures(path.parent, path.name):
            self._file = open_own(path, os.O_RDWR | os.O_CREAT, mode=0o600)
        self._end = self._index()

    def __len__(self) -> int:
        return len(self._starts)

    def __contains__(self, key: str) -> bool:
        return key in self._starts

    def get(self, key: str) -> Record | None:
        """Return the record of a key, None when there is none."""
        start = self._starts.get(key)
        return None if start is None else self._read(start)

    def put(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a record."""
        self.put_all([(key, record)])

    def put_all(self, records: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Keep records that came together, with one write to the disk. A key that is there keeps its first record.

        Raises DiskError, with the file as it was before.
        """
        with self._lock:
            new = {key: record for key, record in records if key not in self._starts}
            lines = [_encode({"key": key, **record}) for key, record in new.items()]
            with disk_failures(self.path.parent, self.path.name):
                self._append(b"".join(lines))
            for key, line in zip(new, lines, strict=True):
                self._starts[key] = self._end
                self._end += len(line)

    def values(self) -> Iterator[Record]:
        """Yield every record, oldest first."""
        for start in list(self._starts.values()):
            yield self._read(start)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)

    def _append(self, data: bytes) -> None:
        """Write all of the data and sync it, or leave the file as it was."""
        written = 0
        try:
            while written < len(data):
                written += os.pwrite(self._file, data[written:], self._end + written)
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._end)
            raise

    def _read(self, start: int) -> Record:
        data = b""
        while b"\n" not in data[-_CHUNK_BYTES:]:
            chunk = os.pread(self._file, _CHUNK_BYTES if data else 8192, start + len(data))
            if not chunk:
                break
            data += chunk
        record: Record = json.loads(data.partition(b"\n")[0])
        record.pop(_CHECK, None)
        return record

    def _index(self) -> int:
        """Find where every record starts; return the end of the last whole line, and cut off what follows it."""
        end, bad = 0, []
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            for number, (line, record) in enumerate(scan_lines(file, self.path.name), 1):
                if record is None or not isinstance(record.get("key"), str) or not _is_as_written(record):
                    bad.append(number)  # a crash of the machine, not of the process, can leave a block of zeros inside
                else:
                    self._starts.setdefault(record["key"], end)
                end += len(line)
        if end < os.fstat(self._file).st_size:
            os.ftruncate(self._file, end)
        tell_bad_lines(self.path, bad, "what they answered is asked again")
        return end


def _encode(record: Record) -> bytes:
    """Return the line of a record: its JSON with a checksum of it as the last key."""
    text = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return text[:-1] + b', "%s": "%08x"}\n' % (_CHECK.encode(), zlib.crc32(text))


def _is_as_written(record: Record) -> bool:
    """Tell whether a record has the checksum of its content; those of earlier versions have none."""
    content = {name: value for name, value in record.items() if name != _CHECK}
    return _CHECK not in record or _encode(content).endswith(b'"%s"}\n' % str(record[_CHECK]).encode())


class Cache:
    """Values by the hash of their question, in a file where it is given a path, else as long as it lives.

    An evaluation keeps its answers and scores here: one that is cut off or repeated asks again for nothing it has.
    """

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
        keys = [_hash(json.dumps([common, question], sort_keys=True, ensure_ascii=False)) for question in questions]
        unknown = {key: place for place, key in reversed(list(enumerate(keys))) if key not in self._values}
        places = sorted(unknown.values())
        self.num_misses += len(places)
        self.num_hits += len(keys) - len(places)
        say = _Progress("questions answered", len(places))
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            new = {keys[place]: value for place, value in zip(batch, answer(batch), strict=True)}
            self._values |= new
            if self._store is not None:
                self._store.put_all([(key, {"value": value}) for key, value in new.items()])
            say(len(new))
        return [self._values[key] for key in keys]


class Asker:
    """Asks models on behalf of one run, through its store: what was answered before is not asked again."""

    def __init__(self, name: str, store: Store, stop: Stop) -> None:
        self._name, self._store, self._stop = name, store, stop

    def write(
        self, model: Model, jobs: Sequence[Job], sampling: Sampling, *, kind: str, by: str, about: Sequence[About]
    ) -> list[Reply]:
        """Write a text for each job. `kind`, `by` and `about` are kept beside it, for people to read.

        Raises what the model raises, and Stopped after a signal; all that was answered by then is kept.
        """
        keys = [
            key_of(
                ask="write", model=model.identity, request=key_of(**asdict(job.request)), seed=job.seed,
                **asdict(sampling),
            )
            for job in jobs
        ]  # fmt: skip
        self._ask(keys, lambda places, known: model.write([jobs[place] for place in places], sampling, known),
                  {"kind": kind, "by": by}, about)  # fmt: skip
        return [Reply.from_record(self._store.get(key) or {}) for key in keys]

    def decide(self, model: Model, requests: Sequence[Request], *, by: str, about: Sequence[About]) -> list[Decision]:
        """Decide each question; raises as `write` does."""
        self._ask(_decision_keys(model, requests),
                  lambda places, known: model.decide([requests[place] for place in places], known),
                  {"kind": "label", "by": by}, about)  # fmt: skip
        return self.known(model, requests)  # type: ignore[return-value]

    def known(self, model: Model, requests: Sequence[Request]) -> list[Decision | None]:
        """Look up the decisions that are there, None for the others; nobody is asked."""
        records = [self._store.get(key) for key in _decision_keys(model, requests)]
        return [None if record is None else Decision.from_record(record) for record in records]

    def _ask(
        self,
        keys: Sequence[str],
        ask: Callable[[list[int], frozenset[int]], Iterator[list[tuple[int, _Answer]]]],
        facts: About,
        about: Sequence[About],
    ) -> None:
        """Put answers into the store as they come. Equal questions are asked once; known ones are only told, for the
        batches of a local model are those of the whole list."""
        first: dict[str, int] = {}
        for place, key in enumerate(keys):
            first.setdefault(key, place)
        asked = list(first.values())
        known = frozenset(number for number, key in enumerate(first) if key in self._store)
        if len(known) == len(asked):
            return
        say = _Progress(f"{self._name}: {facts['kind']}", len(asked) - len(known))
        for batch in ask(asked, known):  # after a signal the model ends it, when what is under way has come
            self._store.put_all(
                [(keys[asked[at]], {**facts, **about[asked[at]], **answer.to_record()}) for at, answer in batch]
            )
            say(sum(at not in known for at, _ in batch))
        self._stop.check()


class _Progress:
    """Says now and then how far a long list of questions is."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._began = self._said = time.monotonic()

    def __call__(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._done < self._total and now - self._said >= _NOTE_SECONDS:
            self._said = now
            rate = self._done / (now - self._began)
            left = (self._total - self._done) / rate
            console.note(f"{self._what}: {self._done} of {self._total}, {rate:.3g} per second ({left:.0f} s left)")


def seed_of(*parts: Any) -> int:
    """Derive a seed that depends on these parts only."""
    text = "\x1e".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=7).digest(), "little")


def _decision_keys(model: Model, requests: Sequence[Request]) -> list[str]:
    return [key_of(ask="decide", model=model.identity, request=key_of(**asdict(request))) for request in requests]


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
