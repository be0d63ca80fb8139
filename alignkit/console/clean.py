"""What may be shown or kept of a text: without secrets, and without characters that steer a terminal.

The one list of the shapes of secrets: recipes, records, messages, pages and uploads are all held against it.
"""

from __future__ import annotations

import re

_SECRET = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|sk_live_\w{16,}|gsk_\w{16,}|xai-\w{16,}|nvapi-[\w-]{16,}"
    r"|AKIA[0-9A-Z]{12,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abprs]-[\w-]{10,}"
    r"|AIza[\w-]{30,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}|r8_[A-Za-z0-9]{30,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}[\w.-]*)"
    r"|\bBearer\s+\S{6,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.*?-----END [A-Z ]*PRIVATE KEY-----)?"
    r"|(?P<name>\b[A-Z0-9_]*(?:TOKEN|API_?KEY|SECRET|SECRET_ACCESS_KEY|PASSWORD)=)(?!\.\.\.|\$)[^\s,;)]+"
    r"|(?P<query>[?&](?:api[_-]?key|key|access[_-]?token|token|auth|secret|password|signature|sig)=)[^&\s\"']+"
    r"|(?<=://)[^/\s@]+(?=@)",
    re.DOTALL,
)
# C0 and C1 controls but tab and line feed, marks that reverse the direction of writing, halves of surrogate pairs.
_CONTROL = re.compile("\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def redact(text: str) -> str:
    """Return the text with everything that looks like a credential replaced."""
    return _SECRET.sub(lambda found: f"{found['name'] or found['query'] or ''}[redacted]", text)


def holds_secret(text: str) -> bool:
    return bool(_SECRET.search(text))


def printable(text: str) -> str:
    """Return the text with control characters replaced: a model, a server or a file must not steer the terminal."""
    return _CONTROL.sub("\ufffd", text)


def printable_json(text: str) -> str:
    """Return JSON with the control characters that JSON allows in a string written as escapes."""
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
