"""Trees of messages (OpenAssistant's) to conversations, from one message a row or one tree a row.

Every path from the root to an answer nothing follows is a conversation. Paths share their first turns; an answer is
learnt in the first conversation that has it, and only read in the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

from alignkit.data.files import Entry
from alignkit.data.rejects import BadRow

_COLUMNS = ("message_id", "parent_id", "text", "role")
_MAX_DEPTH = 200


def join_threads(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield {"messages": ...} for the conversations of trees; other entries pass as they are.

    The rows of a tree follow each other, a parent before its replies.
    """
    tree: dict[Any, tuple[str, dict[str, Any]]] = {}
    for place, record in entries:
        if isinstance(record, BadRow) or not _is_of_tree(record):
            yield from _list_threads(tree)
            tree = {}
            yield place, record
        elif type(record.get("prompt")) is dict:
            try:
                nodes = _flatten(record["prompt"], count(), None, 0)
                yield from _list_threads({node["message_id"]: (place, node) for node in nodes})
            except BadRow as bad:
                yield place, bad
        elif record["parent_id"] is None:
            yield from _list_threads(tree)
            tree = {record["message_id"]: (place, record)}
        elif record["message_id"] in tree:
            yield place, BadRow(f"message_id: {record['message_id']!r} is another message's of the same tree")
        elif record["parent_id"] in tree:
            tree[record["message_id"]] = (place, record)
        else:
            what = f"parent_id: {record['parent_id']!r} is no message of the tree"
            yield place, BadRow(f"{what}; the rows of a tree must follow each other, parents first")
    yield from _list_threads(tree)


def _is_of_tree(record: dict[str, Any]) -> bool:
    if type(record.get("prompt")) is dict:
        return "replies" in record["prompt"]
    if not all(name in record for name in _COLUMNS):
        return False
    return type(record["message_id"]) in (str, int) and type(record["parent_id"]) in (str, int, type(None))


def _flatten(node: Any, numbers: Iterator[int], parent: int | None, depth: int) -> Iterator[dict[str, Any]]:
    if type(node) is not dict or type(node.get("replies", [])) is not list or depth > _MAX_DEPTH:
        raise BadRow("prompt: is no tree of messages with replies")
    number = next(numbers)
    yield {**{key: node[key] for key in node if key != "replies"}, "message_id": number, "parent_id": parent}
    for reply in node.get("replies", []):
        yield from _flatten(reply, numbers, number, depth + 1)


def _list_threads(tree: dict[Any, tuple[str, dict[str, Any]]]) -> Iterator[Entry]:
    """Yield the conversations of one tree, the best ranked replies first."""
    replies: dict[Any, list[Any]] = {}
    for name, (_, node) in tree.items():
        if node.get("deleted") is not True:
            replies.setdefault(node["parent_id"], []).append(name)
    learnt: set[Any] = set()
    waiting: list[list[Any]] = [[name] for name in replies.get(None, [])]
    while waiting:
        path = waiting.pop()
        following = sorted(replies.get(path[-1], []), key=lambda name: _rank(tree[name][1]))
        waiting += [[*path, name] for name in reversed(following)]
        if following:
            continue
        while path and tree[path[-1]][1].get("role") != "assistant":
            path.pop()
        if path and path[-1] not in learnt:
            place, _ = tree[path[-1]]
            yield place, {"messages": [_message(tree[name][1], known=name in learnt) for name in path]}
            learnt.update(path)


def _rank(node: dict[str, Any]) -> float:
    rank = node.get("rank")
    return float(rank) if isinstance(rank, (int, float)) else float("inf")


def _message(node: dict[str, Any], *, known: bool) -> dict[str, Any]:
    kept = {key: value for key, value in node.items() if key not in ("message_id", "parent_id", "deleted", "text")}
    return {**kept, "content": node.get("text"), **({"train": False} if known else {})}
