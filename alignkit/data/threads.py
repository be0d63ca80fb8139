"""Rows that belong together: trees of messages (OpenAssistant's), rated answers to one prompt (HelpSteer2's).

Every path from the root of a tree to its end is a conversation; an answer is learnt in the first one that has it.
"""

import math
from collections.abc import Iterable, Iterator
from itertools import count, groupby
from typing import Any

from alignkit.data.adapters import ANSWERS, ASKED, LABELS, SCORES
from alignkit.data.files import Entry, Record
from alignkit.data.rows import BadRow

_COLUMNS = ("message_id", "parent_id", "text", "role")
_MAX_DEPTH = 200


def join_threads(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield {"messages": ...} for the conversations of trees, whose rows follow each other; other entries pass."""
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


def _is_of_tree(record: Record) -> bool:
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
        ranks: dict[Any, Any] = {name: tree[name][1].get("rank") for name in replies.get(path[-1], [])}
        following = sorted(ranks, key=lambda name: ranks[name] if type(ranks[name]) in (int, float) else math.inf)
        waiting += [[*path, name] for name in reversed(following)]
        if following:
            continue
        while path and tree[path[-1]][1].get("role") != "assistant":
            path.pop()
        if path and path[-1] not in learnt:
            place, _ = tree[path[-1]]
            messages = []
            for name in path:
                node = tree[name][1]
                kept = {key: node[key] for key in node if key not in (*_COLUMNS[:3], "deleted")}
                messages.append({**kept, "content": node.get("text"), **({"train": False} if name in learnt else {})})
            yield place, {"messages": messages}
            learnt.update(path)


def join_rated(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Yield rows of one prompt that follow each other, each an answer and its score, as one ranked row; others pass."""
    for rated, group in groupby(entries, lambda entry: _find_rated(entry[1])):
        if rated is None:
            yield from group
            continue
        answer, score, _ = rated
        rows = list(group)
        place, first = rows[0]
        if len(rows) == 1:
            what = "one rated answer to its prompt, which is compared with nothing"
            yield place, BadRow(f"{score}: is of {what}; the rows of a prompt must follow each other")
            continue
        answers, scores = ([row[name] for _, row in rows] for name in (answer, score))  # type: ignore[index]
        asked = {name: value for name, value in first.items() if name not in (answer, score)}  # type: ignore[union-attr]
        yield place, {**asked, "completions": answers, "scores": scores}


def _find_rated(record: Record | BadRow) -> tuple[str, str, list[Any]] | None:
    """Tell a row of one answer and its score: the columns of both, and what was asked."""
    if isinstance(record, BadRow) or not record.keys().isdisjoint((*LABELS, "chosen", "rejected", "completions")):
        return None
    answer = next((name for name in ANSWERS if type(record.get(name)) is str), None)
    score = next((name for name in SCORES if record.get(name) is not None), None)
    asked = [record.get(name) for name in ASKED]
    return (answer, score, asked) if answer and score and any(asked) else None
