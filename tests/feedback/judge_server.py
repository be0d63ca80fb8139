"""A small HTTP server that speaks the OpenAI protocol and misbehaves as it is told: real sockets, real faults.

Start it with `with Server(...) as server`. What it was asked and how it answered is in `server.log`.
"""

from __future__ import annotations

import gzip
import json
import math
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# "429", "429 RETRY-AFTER", "500", "timeout", "malformed", "drop", "empty", "large", "redirect", or of _ODD or _DRIPS
Fault = str


def _logprobs(value: Any) -> dict[str, Any]:
    top = [{"token": "A", "logprob": value}, {"token": "B", "logprob": -1.0}]
    return {"logprobs": {"content": [{"token": "A", "logprob": value, "top_logprobs": top}]}}


_ODD: dict[str, dict[str, Any]] = {
    "logprob-huge": _logprobs(1e308), "logprob-text": _logprobs("x"), "logprobs-true": {"logprobs": True},
    "logprobs-null": {"logprobs": {"content": [None]}}, "content-list": {"message": {"content": ["(A)"]}},
    "message-text": {"message": "(A)"},
}  # fmt: skip
_DRIPS = {  # what is sent first, then again and again, and the seconds between
    "drip": (b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b" ", 0.1),
    "drip-header": (b"HTTP/1.1 200 OK\r\nX-A: ", b"a", 0.1),
    "drip-500": (b"HTTP/1.1 500 No\r\nConnection: close\r\n\r\n", b" ", 0.1),
    "endless-500": (b"HTTP/1.1 500 No\r\nConnection: close\r\n\r\n", b" " * (1 << 20), 0.0),
}


def last_message(payload: dict[str, Any]) -> str:
    return payload["messages"][-1]["content"] if "messages" in payload else payload["prompt"]


def prefer_longer(payload: dict[str, Any]) -> float:
    """Return P(A): sure of the longer of the two answers."""
    text = last_message(payload)
    first = text.rpartition("\n (A) [[[")[2].partition("]]]\n (B) [[[")
    second = first[2].partition("]]]")[0]
    return 0.9 if len(first[0]) > len(second) else 0.1


class _HTTPServer(ThreadingHTTPServer):
    request_queue_size = 128  # of 5, connections that come at once wait a second for their turn


class Server:
    """`fault(number, payload)` names the fault of a request by its number, or None; `judge(payload)` gives P(A)."""

    def __init__(
        self,
        *,
        judge: Callable[[dict[str, Any]], float] = prefer_longer,
        fault: Callable[[int, dict[str, Any]], Fault | None] = lambda number, payload: None,
        logprobs: bool = True,
        key: str | None = None,
        reply: Callable[[dict[str, Any]], str] | None = None,
        refuse: dict[str, str] | None = None,  # parameter -> message of a 400
        seconds: float = 0.0,
        usage: Any = ...,
        hang: float = 1.5,  # seconds of a "timeout"
    ) -> None:
        self.judge, self.fault, self.logprobs, self.key, self.reply = judge, fault, logprobs, key, reply
        self.refuse, self.seconds = refuse or {}, seconds
        self.usage, self.sent, self.hang = usage, 0, hang
        self.lock = threading.Lock()
        self.requests = 0
        self.answered: Counter[str] = Counter()  # prompt -> times answered well
        self.faults: Counter[str] = Counter()
        self.active = self.most_active = 0
        self.times: list[float] = []
        self.payloads: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []

    def __enter__(self) -> Server:
        self._http = _HTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"


def _handler(server: Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_POST(self) -> None:
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                number, server.requests = server.requests, server.requests + 1
                server.times.append(time.monotonic())
                server.payloads.append(payload)
                server.headers.append(dict(self.headers))
                server.active += 1
                server.most_active = max(server.most_active, server.active)
            try:
                self._answer(number, payload)
            except (BrokenPipeError, ConnectionResetError):
                pass
            finally:
                with server.lock:
                    server.active -= 1

        def _answer(self, number: int, payload: dict[str, Any]) -> None:
            time.sleep(server.seconds)
            if server.key is not None and self.headers.get("Authorization") != f"Bearer {server.key}":
                given = self.headers.get("Authorization")
                return self._send(401, {"error": {"message": f"Incorrect API key provided: {given}"}})
            for name, message in server.refuse.items():
                if name in payload:
                    return self._send(400, {"error": {"message": message}})
            fault = server.fault(number, payload)
            if fault is not None:
                with server.lock:
                    server.faults[fault] += 1
                return self._fail(fault)
            with server.lock:
                server.answered[
                    json.dumps(payload.get("messages") or payload.get("prompt")) + str(payload.get("seed"))
                ] += 1
            self._send(200, self._reply(payload))

        def _fail(self, fault: Fault) -> None:
            if fault.startswith("429"):
                self._send(429, {"error": {"message": "slow down"}}, {"Retry-After": fault[4:] or "0.2"})
            elif fault in _ODD:
                self._send(200, {"choices": [{"message": {"role": "assistant", "content": "(A)"}} | _ODD[fault]]})
            elif fault in _DRIPS:
                self._drip(*_DRIPS[fault])
            elif fault == "gzip":
                body = gzip.compress(b'{"choices": [{"message": {"content": "(A)"}}]}')
                self._raw(200, body, {"Content-Encoding": "gzip"})
            elif fault == "500":
                self._send(500, {"error": {"message": "something broke"}})
            elif fault == "timeout":
                time.sleep(server.hang)
                self.close_connection = True
            elif fault == "malformed":
                self._raw(200, b'{"choices": [{"message": {"content": "(A')
            elif fault == "empty":
                self._send(200, {"choices": []})
            elif fault == "large":
                self._raw(200, b" " * (5 << 20))
            elif fault == "redirect":
                self._send(302, {}, {"Location": "http://169.254.169.254/latest/meta-data"})
            elif fault == "drop":
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            else:
                raise AssertionError(fault)

        def _drip(self, head: bytes, chunk: bytes, pause: float) -> None:
            """Send without end, as long as the client listens."""
            self.close_connection = True
            self.connection.sendall(head)
            for _ in range(100):
                self.connection.sendall(chunk)
                server.sent += len(chunk)
                time.sleep(pause)

        def _reply(self, payload: dict[str, Any]) -> dict[str, Any]:
            usage: Any = {"prompt_tokens": len(last_message(payload)) // 4, "completion_tokens": 3}
            usage = usage if server.usage is ... else server.usage
            if server.reply is not None:
                text = server.reply(payload)
                choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
                return {"id": "1", "object": "chat.completion", "choices": [choice | {"text": text}], "usage": usage}
            p_first = server.judge(payload)
            letter = "A" if p_first >= 0.5 else "B"
            top = [("A", math.log(p_first * 0.98)), ("B", math.log((1 - p_first) * 0.98)), ("I", math.log(0.02))]
            choice = {"index": 0, "finish_reason": "stop"}
            if "messages" in payload:
                choice["message"] = {"role": "assistant", "content": f"({letter})"}
                if server.logprobs and payload.get("logprobs"):
                    plain = {"logprob": -0.01, "top_logprobs": [{"token": "(", "logprob": -0.01}]}
                    deciding = {"top_logprobs": [{"token": token, "logprob": logp} for token, logp in top]}
                    choice["logprobs"] = {
                        "content": [{"token": "(", **plain}, {"token": letter, **deciding}, {"token": ")", **plain}]
                    }
            else:
                choice["text"] = f" ({letter})"
                if server.logprobs and payload.get("logprobs"):
                    choice["logprobs"] = {
                        "tokens": [" (", letter, ")"], "top_logprobs": [{" (": -0.01}, dict(top), {")": -0.01}],
                    }  # fmt: skip
            return {"id": "1", "object": "chat.completion", "choices": [choice], "usage": usage}

        def _send(self, status: int, data: dict[str, Any], headers: dict[str, str] | None = None) -> None:
            self._raw(status, json.dumps(data).encode(), headers)

        def _raw(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    return Handler
