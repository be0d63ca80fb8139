"""Everything that was ever answered, in a file that only grows: no question is asked twice, and no answer is lost.

One JSON object a line, keyed by a hash of all that decides the answer, with a checksum of the line; on the disk before
`put` returns. It knows nothing of what the records mean.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from alignkit import console
from alignkit.feedback.prompts import Request
from alignkit.feedback.writer import Job, Model, Reply, Sampling, Verdict
from alignkit.runs.files import disk_failures, open_own, scan_lines, tell_bad_lines
from alignkit.runs.stop import Stop

Record = dict[str, Any]
_CHUNK_BYTES = 1 << 20
_CHECK = "crc32"


def key_of(**facts: Any) -> str:
    """Return a key, in hex, that two askings share only when all facts are equal."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


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


_Answer = TypeVar("_Answer", Reply, Verdict)
_NOTE_SECONDS = 10.0
About = Mapping[str, Any]


class Desk:
    """Takes questions for models, in one run."""

    def __init__(self, name: str, store: Store, stop: Stop) -> None:
        self._name, self._store, self._stop = name, store, stop

    def write(
        self, model: Model, jobs: Sequence[Job], sampling: Sampling, *, kind: str, by: str, about: Sequence[About]
    ) -> list[Reply]:
        """Return a text for each job. `kind`, `by` and `about` are kept beside it, for people to read.

        Raises what the model raises, and Stopped after a signal; all that was answered by then is kept.
        """
        keys = [
            key_of(ask="write", model=model.identity, request=_digest(job.request), seed=job.seed, **asdict(sampling))
            for job in jobs
        ]
        first, known = self._look_up(keys)
        if len(known) < len(first):
            batches = model.write([jobs[place] for place in first], sampling, known)
            self._keep(batches, keys, first, known, {"kind": kind, "by": by}, about)
        return [Reply.from_record(self._store.get(key) or {}) for key in keys]

    def decide(self, model: Model, requests: Sequence[Request], *, by: str, about: Sequence[About]) -> list[Verdict]:
        """Return a verdict for each question; raises as `write` does."""
        keys = [_verdict_key(model, request) for request in requests]
        first, known = self._look_up(keys)
        if len(known) < len(first):
            batches = model.decide([requests[place] for place in first], known)
            self._keep(batches, keys, first, known, {"kind": "label", "by": by}, about)
        return self.known(model, requests)  # type: ignore[return-value]

    def known(self, model: Model, requests: Sequence[Request]) -> list[Verdict | None]:
        """Return the verdicts that are there, None for the others; nobody is asked."""
        records = [self._store.get(_verdict_key(model, request)) for request in requests]
        return [None if record is None else Verdict.from_record(record) for record in records]

    def _look_up(self, keys: Sequence[str]) -> tuple[list[int], frozenset[int]]:
        """Return the places of the first of each key, and which of those have an answer, by their number."""
        first: dict[str, int] = {}
        for place, key in enumerate(keys):
            first.setdefault(key, place)
        return list(first.values()), frozenset(number for number, key in enumerate(first) if key in self._store)

    def _keep(
        self,
        batches: Iterator[list[tuple[int, _Answer]]],
        keys: Sequence[str],
        asked: Sequence[int],
        known: frozenset[int],
        facts: About,
        about: Sequence[About],
    ) -> None:
        """Put answers into the store as they come; those that are there already stay."""
        say = _Progress(f"{self._name}: {facts['kind']}", len(asked) - len(known))
        for batch in batches:  # after a signal the model ends it, when what is under way has come
            records = [(asked[at], answer) for at, answer in batch]
            self._store.put_all(
                [(keys[place], {**facts, **about[place], **answer.to_record()}) for place, answer in records]
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
        if now - self._said >= _NOTE_SECONDS:
            self._said = now
            rate = self._done / (now - self._began)
            left = (self._total - self._done) / rate
            console.note(f"{self._what}: {self._done} of {self._total}, {rate:.3g} per second ({left:.0f} s left)")


def seed_of(*parts: Any) -> int:
    """Return a seed that depends on these parts only."""
    text = "\x1e".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=7).digest(), "little")


def _verdict_key(model: Model, request: Request) -> str:
    return key_of(ask="decide", model=model.identity, request=_digest(request))


def _digest(request: Request) -> str:
    return key_of(**asdict(request))
