"""A real Chromium without a window, spoken to over a pipe: loads a page, tells what went wrong, takes pictures.

A helper of tests, and of who wants to look at a report; it needs Debian's `chromium` and no Python package.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

# Every piece of visible text with its box; two boxes of different pieces must not lie on each other.
_OVERLAPS = """
(() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, parent = node.parentElement;
    const unseen = "script, style, title, [hidden], details:not([open]) > :not(summary)";
    if (!node.textContent.trim() || parent.closest(unseen)) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const box of range.getClientRects())
      if (box.width > 1 && box.height > 1) found.push({box, text: node.textContent.trim().slice(0, 40), parent});
  }
  found.sort((a, b) => a.box.top - b.box.top);
  const hits = [];
  for (let i = 0; i < found.length; i++)
    for (let j = i + 1; j < found.length && found[j].box.top < found[i].box.bottom - 3; j++) {
      const a = found[i], b = found[j];
      const wide = Math.min(a.box.right, b.box.right) - Math.max(a.box.left, b.box.left);
      const high = Math.min(a.box.bottom, b.box.bottom) - Math.max(a.box.top, b.box.top);
      if (wide > 1.5 && high > 3) hits.push(`${a.text} | ${b.text} (${wide.toFixed(0)} x ${high.toFixed(0)})`);
    }
  return hits;
})()
"""
_OUTSIDE = """
[...document.querySelectorAll("body *")].filter((one) => {
  const box = one.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 1 || box.left < -1) && !one.closest(".scroll, pre, [hidden]");
}).map((one) => `${one.tagName} ${one.className.baseVal ?? one.className}: ${one.textContent.trim().slice(0, 40)}`)
"""


class Browser:
    """One page of one browser; `events` is everything it reported, in order."""

    def __init__(self, process: subprocess.Popen[bytes], write: int, read: int) -> None:
        self._process, self._write, self._read = process, write, read
        self._buffer, self._number, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> Any:
        """Send a command of the DevTools protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def open(self, page: Path | str, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Load a file or an address in a window of this width, and wait until everything is there."""
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.look_like(dark=dark)
        self.events.clear()
        self.ask("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        deadline = time.monotonic() + 30
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < deadline, "the page does not load"
            self._receive()
        self.run("document.fonts.ready.then(() => 0)")

    def look_like(self, *, dark: bool = False, media: str = "") -> None:
        """Set what the page's style is asked for: a colour scheme, and `print` as the medium."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.ask("Emulation.setEmulatedMedia", media=media, features=features)

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        result = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def complaints(self) -> list[str]:
        """Return what the console and the engine complained about since the page was opened."""
        self.run("0")
        wanted = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [json.dumps(event["params"])[:400] for event in self.events if event["method"] in wanted]

    def requests(self) -> list[str]:
        """Return every address that the page asked for, data: and itself left out."""
        asked = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        urls = [each["request"]["url"] for each in asked if each.get("type") != "Document"]
        return [url for url in urls if not url.startswith("data:")]

    def overlaps(self) -> list[str]:
        """Return pieces of text that lie on each other, and everything that sticks out of the window sideways."""
        found: list[str] = self.run(_OVERLAPS)
        return found + [f"outside: {name}" for name in self.run(_OUTSIDE)]

    def picture(self, path: Path) -> None:
        """Write a picture of the whole page."""
        data = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            chunk = os.read(self._read, 1 << 16)
            assert chunk, "the browser has gone"
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message


@contextmanager
def open_browser(home: Path) -> Iterator[Browser]:
    """Start a browser with an empty profile below `home`, and end it."""
    assert CHROMIUM is not None
    to_read, write = os.pipe()
    read, to_write = os.pipe()
    command = [
        CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
        "--disable-crash-reporter", f"--user-data-dir={home}", "--remote-debugging-pipe",
    ]  # fmt: skip
    # The protocol is spoken on descriptors 3 and 4.
    script = f'exec 3<&{to_read} 4>&{to_write}; exec "$@"'
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", *command],
        pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_read)
    os.close(to_write)
    try:
        yield Browser(process, write, read)
    finally:
        os.close(write)
        os.close(read)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
