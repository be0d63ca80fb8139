"""What must never be written in a recipe: tokens, keys and passwords, known by their shape or by the key's name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from alignkit.console import holds_secret, redact
from alignkit.errors import Problem

if TYPE_CHECKING:
    from alignkit.recipe.tree import Node  # tree itself redacts what it shows

_SECRET_NAME = re.compile(r"(^|_)(token|api_?key|secret(_?key)?|access_?key|passwords?|passwd|credentials?)$", re.I)
# Names of vocabulary entries, which the pattern above would take for credentials.
_VOCABULARY = re.compile(r"^(pad|eos|bos|unk|sep|cls|mask|image|end|stop|special|assistant|user)_token$", re.I)


def names_secret(key: str) -> bool:
    """Tell whether a key is the name of a credential (hub_token, api-key), not of a vocabulary entry (eos_token)."""
    name = key.replace("-", "_")
    return bool(_SECRET_NAME.search(name)) and not _VOCABULARY.match(name)


def leads_to_secret(path: Sequence[str]) -> bool:
    """Tell whether a dotted key names a credential; the token of `truncate:` is one of the vocabulary."""
    return bool(path) and names_secret(path[-1]) and tuple(path[-2:]) != ("truncate", "token")


def find_secrets(tree: Node) -> list[tuple[Node, Problem]]:
    """Return each node that holds or names a secret, with a problem that does not show it."""
    found = []
    for path, node in tree.leaves():
        key = redact(".".join(path))
        if any(holds_secret(part) for part in path[-1:]):
            found.append((node, Problem(f"{key} looks like a secret; {_ADVICE}", node.place)))
        elif leads_to_secret([part for name in path for part in name.split(".")]):  # sweep has dotted keys
            found.append((node, Problem(f"{key} is the name of a secret; {_ADVICE}", node.place)))
        elif isinstance(node.value, str) and holds_secret(node.value):
            found.append((node, Problem(f"{key} holds what looks like a secret; {_ADVICE}", node.place)))
    return found


_ADVICE = "a recipe holds none: take it out and set HF_TOKEN (or the service's own variable) in the environment"
