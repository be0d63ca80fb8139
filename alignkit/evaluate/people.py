"""`alignkit compare`: people judge answers of two models, blinded, on a page of this machine or in the terminal."""

from __future__ import annotations

import hmac
import json
import secrets
import threading
import time
from collections.abc import Sequence
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from alignkit import console
from alignkit.data import Text
from alignkit.errors import UsageError
from alignkit.rewards.kinds.judge import Orders
from alignkit.runs.files import read_lines, write_text
from alignkit.runs.record import JsonLines

VOTES, ROWS = "votes.jsonl", "preferences.jsonl"
_SCORES = {"ours": 1.0, "theirs": 0.0, "equal": 0.5}
_MAX_BYTES = 1 << 16  # of a vote, with its note
Pair = tuple[Text, Text, Text]  # prompt, our answer, theirs


class People:
    """A judge made of people, on a page, or in the terminal as `rater`; each vote is kept at once in a run."""

    name = "people"

    def __init__(self, folder: Path, *, rater: str | None = None, port: int = 0) -> None:
        self.settings: dict[str, Any] = {}
        self.report: dict[str, Any] = {}
        self.pairs: dict[str, Pair] = {}
        self._rater, self._port, self._lock = rater, port, threading.Lock()
        self._lines, self._rows = JsonLines(folder / VOTES), folder / ROWS
        self.votes: dict[tuple[str, str], dict[str, Any]] = {}  # by rater and key, the latest last
        for row in read_lines(folder / VOTES):
            self._count(row)

    def compare(self, prompts: Sequence[Text], firsts: Sequence[Text], seconds: Sequence[Text]) -> list[Orders]:
        """Ask until all is judged or somebody ends it; alike answers tie unasked. UsageError where nobody judged."""
        pairs = list(zip(prompts, firsts, seconds, strict=True))
        self.pairs = {key_of(pair): pair for pair in pairs if pair[1] != pair[2]}
        if len(self.pairs) < len(pairs):
            console.note(f"{len(pairs) - len(self.pairs)} of {len(pairs)} prompts are answered alike: ties, not asked")
        if self._rater is None and self.pairs:
            serve(self, port=self._port)
        elif self._rater is not None:
            ask_in_terminal(self, self._rater)
        votes: dict[str, list[float]] = {key_of(pair): [] if pair[1] != pair[2] else [0.5] for pair in pairs}
        for (_, key), vote in self.votes.items():
            if key in self.pairs:
                votes[key].append(_SCORES[vote["choice"]])
        if not any(key in self.pairs for _, key in self.votes):
            nobody = "nobody has judged yet; the same command asks again"
            raise UsageError(nobody if self.pairs else "there is nothing to judge: all prompts are answered alike")
        self.report["agreement"] = [[float(a == b) for a, b in combinations(given, 2)]
                                    for given in votes.values() if len(given) > 1]  # fmt: skip
        return [(sum(given) / len(given) if given else None,) for given in (votes[key_of(pair)] for pair in pairs)]

    def _count(self, row: dict[str, Any]) -> None:
        place = str(row.get("rater")), str(row.get("key"))
        self.votes.pop(place, None)
        if str(row.get("choice")) in _SCORES and row.keys() >= {"prompt", "ours", "theirs"}:
            self.votes[place] = row

    def ask(self, rater: str) -> dict[str, Any]:
        """Give the next pair that a rater has not judged, in an order drawn for both of them, without names."""
        left = [key for key in self.pairs if (rater, key) not in self.votes]
        shown: dict[str, Any] = {"done": len(self.pairs) - len(left), "of": len(self.pairs)}
        if left:
            prompt, *answers = self.pairs[left[0]]
            order = answers[::-1] if is_turned(rater, left[0]) else answers
            shown |= {"key": left[0], "prompt": as_text(prompt), "answers": [as_text(answer) for answer in order]}
        return shown

    def vote(self, rater: str, key: str, choice: int, note: str = "") -> None:
        """Keep a vote: 1 and 2 for the answers as shown, 3 for equal; 0 takes the rater's last one back.
        All votes that stand are written as rows of preferences too, which `data:` reads; equal answers make none.
        Raises UsageError for what is not asked."""
        with self._lock:
            row: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()), "rater": rater}
            if choice == 0:
                mine = [of for who, of in self.votes if who == rater and of in self.pairs]
                row |= {"key": mine[-1] if mine else None, "choice": None}
            elif key not in self.pairs or choice not in (1, 2, 3):
                raise UsageError("no such pair or choice")
            else:
                name = "equal" if choice == 3 else "ours" if (choice == 1) != is_turned(rater, key) else "theirs"
                row |= {"key": key, "choice": name, "note": note}
                row |= zip(("prompt", "ours", "theirs"), self.pairs[key], strict=True)
            self._lines.append(row)
            self._count(row)
            rows = [{"prompt": vote["prompt"], "chosen": vote[vote["choice"]],
                     "rejected": vote["ours" if vote["choice"] == "theirs" else "theirs"]}
                    for vote in self.votes.values() if vote["choice"] != "equal"]  # fmt: skip
            write_text(self._rows, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def key_of(pair: Pair) -> str:
    return blake2b(json.dumps(pair, ensure_ascii=False).encode("utf-8", "replace"), digest_size=16).hexdigest()


def is_turned(rater: str, key: str) -> bool:
    """Draw the sides, the same ones whenever this rater sees the pair."""
    return bool(blake2b(f"{rater}\n{key}".encode("utf-8", "replace")).digest()[0] & 1)


def as_text(text: Text) -> str:
    if isinstance(text, str):
        return text
    return "\n\n".join(f"{turn['role']}: {turn['content']}" if len(text) > 1 else turn["content"] for turn in text)


def serve(people: People, *, port: int = 0) -> None:
    """Show the page until it says that it is finished, or Ctrl-C; one host, one token, everything else is refused."""
    token, page = secrets.token_urlsafe(16), Path(__file__).with_name("people.html").read_text(encoding="utf-8")
    policy = "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; base-uri 'none'"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self._is_allowed("/"):
                nonce = secrets.token_urlsafe(16)
                self._reply(200, page.replace("NONCE", nonce), "text/html", policy.format(nonce))

        def do_POST(self) -> None:
            if not self._is_allowed("/vote"):
                return
            try:
                given = json.loads(self.rfile.read(min(int(self.headers["Content-Length"]), _MAX_BYTES)))
                rater, choice = str(given["rater"])[:80], given.get("choice")
                if choice == "finish":
                    threading.Thread(target=server.shutdown).start()
                elif choice is not None:
                    people.vote(rater, str(given.get("key")), choice, str(given.get("note") or ""))
            except (ValueError, TypeError, KeyError, AttributeError, UsageError):
                return self._reply(400, "no such vote")
            self._reply(200, json.dumps(people.ask(rater)), "application/json")

        def _is_allowed(self, path: str) -> bool:
            """Refuse other names of this host, as a rebound DNS name has, and whoever does not know the token."""
            asked, host = urlsplit(self.path), f"127.0.0.1:{server.server_port}"
            known = hmac.compare_digest(parse_qs(asked.query).get("token", [""])[0].encode(), token.encode())
            local = self.headers.get("Host") == host and self.headers.get("Origin") in (None, f"http://{host}")
            if not (known and local and asked.path == path):
                self._reply(403, "not here")
            return known and local and asked.path == path

        def _reply(self, status: int, text: str, kind: str = "text/plain", policy: str = "default-src 'none'") -> None:
            body = text.encode("utf-8", "replace")
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Security-Policy", policy)
            for header in ("X-Content-Type-Options nosniff", "Referrer-Policy no-referrer", "Cache-Control no-store"):
                self.send_header(*header.split())
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: the address holds the token."""

    try:
        opened = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise UsageError(f"{port} cannot be had: {error.strerror}; 0 takes any that is free", where="--port") from None
    with opened as server:
        console.write(f"http://127.0.0.1:{server.server_port}/?token={token}\n", end="")
        console.note("open the page above; Ctrl-C, or its button, ends it and measures")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            console.note("(closed)")


def ask_in_terminal(people: People, rater: str) -> None:
    """Ask line by line until all is judged or the input ends; a text after the number is a note."""
    while "key" in (shown := people.ask(rater)):
        console.write(f"\n[{shown['done'] + 1} of {shown['of']}] {shown['prompt']}")
        for number, answer in enumerate(shown["answers"], 1):
            console.write(f"\n--- {number} ---\n{answer}")
        said = console.ask("better: 1 or 2, 3 equal, u undo, q leave > ")
        choice, _, note = ("q" if said is None else said.strip()).partition(" ")
        if choice == "q":
            return
        if choice in ("1", "2", "3", "u"):
            people.vote(rater, shown["key"], 0 if choice == "u" else int(choice), note)
