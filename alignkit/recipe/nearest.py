"""The name somebody probably meant, by its spelling."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def find_nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Find the candidate within two edits of the name, else one that is mostly the same text, else None."""
    name, known = name[:80], sorted(candidates)
    near = [(distance, word) for word in known if (distance := count_edits(name.lower(), word.lower())) <= 2]
    # Two edits turn any two-letter word into any other: at least one letter in three must have been right.
    near = [(distance, word) for distance, word in near if 3 * distance <= 2 * max(len(word), 2) and word != name]
    if near:
        return min(near)[1]
    close = get_close_matches(name, known, n=1, cutoff=0.8)
    return close[0] if close else None


def suggest(name: str, candidates: Iterable[str], *, listed: str = "") -> str:
    """The end of a message: "; did you mean X?", or where none is near all candidates after the words of `listed`."""
    known = list(candidates)
    nearest = find_nearest(name, known)
    return f"; did you mean {nearest}?" if nearest else f"; {listed} {', '.join(known)}" if listed else ""


def count_edits(a: str, b: str) -> int:
    """Count insertions, deletions, replacements and swaps of neighbours that turn a into b; 3 stands for more."""
    if abs(len(a) - len(b)) > 2:
        return 3
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        before, row, above = row, [i, *[0] * len(b)], before
        for j, other in enumerate(b, 1):
            row[j] = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                row[j] = min(row[j], above[j - 2] + 1)
    return min(row[-1], 3)
