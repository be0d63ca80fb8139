"""The lineage drawing: what was made from what, as inline SVG, left to right for a screen and as a tree for a phone.

It places boxes and lines; what is in a box is its caller's choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

_BOX_WIDTH, _BOX_HEIGHT = 176, 72
_GAP_X, _GAP_Y = 44, 18
_ROW, _INDENT = 62, 22
_TREE_WIDTH = 350
_WIDEST = 6  # columns; more of them would be too small to read


@dataclass(frozen=True)
class Node:
    """A box: a title, up to two lines below it, and what it was made from.

    `parents` are weights it starts from, `advisers` models that reward it. `kind` is a class for the style: base,
    done, stopped, waiting; `current` marks the run a page is about.
    """

    key: str
    title: str
    tag: str = ""
    lines: tuple[str, ...] = ()
    kind: str = "done"
    parents: tuple[str, ...] = ()
    advisers: tuple[str, ...] = ()
    current: bool = False
    link: str = ""


@dataclass(frozen=True)
class _Edge:
    """A line from one box to another, dashed from an adviser."""

    source: str
    target: str
    dashed: bool


_Slot = Node | _Edge  # an edge takes a slot of its own in every column that it passes
_PASS_HEIGHT = 10


def draw_lineage(nodes: Sequence[Node]) -> Markup:
    """Return both drawings; the style shows the one that fits the page. Nodes come after what they are made from."""
    columns = _columns(nodes)
    only = " only" if len(columns) > _WIDEST else ""
    tree = Markup('<div class="lineage narrow{}">{}</div>').format(only, _draw_tree(nodes))
    return tree if only else Markup('<div class="lineage wide">{}</div>').format(_draw_wide(nodes, columns)) + tree


def _columns(nodes: Sequence[Node]) -> list[list[_Slot]]:
    """Return the boxes by column, each as far to the right as what is made from it allows, and the edges that pass."""
    known = {node.key for node in nodes}
    sources = {node.key: [key for key in (*node.parents, *node.advisers) if key in known] for node in nodes}
    depth: dict[str, int] = {}
    for node in nodes:
        depth[node.key] = 1 + max((depth.get(key, -1) for key in sources[node.key]), default=-1)
    for node in reversed(nodes):
        later = [depth[other.key] for other in nodes if node.key in sources[other.key]]
        depth[node.key] = min(later, default=depth[node.key] + 1) - 1
    columns: list[list[_Slot]] = [[] for _ in range(max(depth.values(), default=-1) + 1)]
    for node in nodes:
        columns[depth[node.key]].append(node)
        for edge in _edges(node, known):
            for level in range(depth[edge.source] + 1, depth[node.key]):
                columns[level].append(edge)
    return columns


def _edges(node: Node, known: set[str]) -> list[_Edge]:
    found = [_Edge(key, node.key, False) for key in node.parents] + [
        _Edge(key, node.key, True) for key in node.advisers
    ]
    return [edge for edge in found if edge.source in known]


def _draw_wide(nodes: Sequence[Node], columns: Sequence[Sequence[_Slot]]) -> Markup:
    heights = [sum(_height(slot) + _GAP_Y for slot in column) - _GAP_Y for column in columns]
    height, width = max(heights) + 4, len(columns) * (_BOX_WIDTH + _GAP_X) - _GAP_X + 4
    middle: dict[_Slot | str, float] = {}  # of boxes by key, of passing edges by column as well
    left: dict[str, float] = {}
    passed: dict[_Edge, list[tuple[float, float]]] = {}
    for number, column in enumerate(columns):
        x, top = 2.0 + number * (_BOX_WIDTH + _GAP_X), (height - heights[number]) / 2
        for slot in sorted(column, key=lambda slot: _wanted(slot, middle)):
            center = top + _height(slot) / 2
            if isinstance(slot, Node):
                middle[slot.key], left[slot.key] = center, x
            else:
                middle[slot] = center
                passed.setdefault(slot, []).append((x, center))
            top += _height(slot) + _GAP_Y
    known, parts = set(left), []
    for node in nodes:
        arriving = sorted(_edges(node, known), key=lambda edge: middle.get(edge, middle[edge.source]))
        for number, edge in enumerate(arriving):
            end = (left[node.key] - 1, middle[node.key] + 14 * (number - (len(arriving) - 1) / 2))
            start = (left[edge.source] + _BOX_WIDTH, middle[edge.source])
            parts.append(_arrow(start, passed.get(edge, []), end, dashed=edge.dashed))
    parts += [_box(node, left[node.key], middle[node.key] - _BOX_HEIGHT / 2, _BOX_WIDTH, _BOX_HEIGHT) for node in nodes]
    return Markup('<svg viewBox="0 0 {w} {h}" style="max-width:{w}px" role="img" aria-label="{}">{}</svg>').format(
        _say(nodes), Markup("").join(parts), w=width, h=round(height)
    )


def _height(slot: _Slot) -> float:
    return _BOX_HEIGHT if isinstance(slot, Node) else _PASS_HEIGHT


def _wanted(slot: _Slot, middle: dict[_Slot | str, float]) -> float:
    """Return the height at which a slot would like to be: the mean of where its edges come from."""
    if isinstance(slot, _Edge):
        return middle.get(slot, middle.get(slot.source, 0.0))
    heights = [middle[key] for key in (*slot.parents, *slot.advisers) if key in middle]
    return sum(heights) / len(heights) if heights else 0.0


def _arrow(
    start: tuple[float, float], passing: Sequence[tuple[float, float]], end: tuple[float, float], *, dashed: bool
) -> Markup:
    """Return a line with a head, straight across the columns it passes and curved between them."""
    x, y = start
    path = f"M{x} {y:g}"
    for left, center in [*passing, (end[0] - 5, end[1])]:
        bend = (left - x) / 2
        path += f" C{x + bend:g} {y:g} {left - bend:g} {center:g} {left:g} {center:g}"
        x, y = left, center
        if (left, center) in passing:
            x = left + _BOX_WIDTH
            path += f" H{x:g}"
    head = f"M{end[0] - 7:g} {end[1] - 4:g} L{end[0]:g} {end[1]:g} L{end[0] - 7:g} {end[1] + 4:g} Z"
    kind = " adviser" if dashed else ""
    return Markup('<path class="edge{}" d="{}"/><path class="head{}" d="{}"/>').format(kind, path, kind, head)


def _draw_tree(nodes: Sequence[Node]) -> Markup:
    """One row per node, indented below what it starts from, as file managers show folders."""
    order, level = list[Node](), dict[str, int]()
    known = {node.key for node in nodes}

    def add(node: Node, depth: int) -> None:
        order.append(node)
        level[node.key] = min(depth, 5)
        for child in nodes:
            if child.parents[:1] == (node.key,):
                add(child, depth + 1)

    for node in nodes:
        if not node.parents or node.parents[0] not in known:
            add(node, 0)
    titles = {node.key: node.title for node in nodes}
    row_of = {node.key: number for number, node in enumerate(order)}
    parts = []
    for number, node in enumerate(order):
        left, top = 2 + level[node.key] * _INDENT, number * _ROW + 2
        if node.parents and node.parents[0] in row_of:
            bottom = row_of[node.parents[0]] * _ROW + 2 + _ROW - 10
            x = left - _INDENT / 2
            middle = top + (_ROW - 10) / 2
            parts.append(
                Markup('<path class="edge" d="M{x} {} V{} Q{x} {m} {} {m} H{}"/>').format(
                    bottom, middle - 6, x + 6, left, x=x, m=middle
                )
            )
        shown = replace(node, lines=_with_advisers(node, titles))
        parts.append(_box(shown, left, top, _TREE_WIDTH - 4 - left, _ROW - 10))
    return Markup('<svg viewBox="0 0 {w} {h}" style="max-width:{}px" role="img" aria-label="{}">{}</svg>').format(
        _TREE_WIDTH + 60, _say(order), Markup("").join(parts), w=_TREE_WIDTH, h=len(order) * _ROW - 6
    )


def _with_advisers(node: Node, titles: Mapping[str, str]) -> tuple[str, ...]:
    names = ", ".join(titles.get(key, key) for key in node.advisers)
    said = f"rewarded by {names}" if names else ""
    return (" \u00b7 ".join(text for text in (*node.lines[:1], said) if text),)


def _box(node: Node, x: float, y: float, width: float, height: float) -> Markup:
    room = int((width - 24) / 6.1)
    tag = "" if node.title.startswith(f"{node.tag}-") else node.tag  # dpo-beta-0.1 says it already
    space = width - 24 - (6.6 * len(tag) + 8 if tag else 0)
    fits = len(node.title) <= space / 8.6
    title = _cut(node.title, max(int(space / (8.6 if fits else 6.9)), 6))
    lines = [line for line in node.lines[:2] if line]
    base = y + height / 2 - 8.5 * len(lines) + 5
    kind = "name" if fits else "name long"
    text = Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, x + 12, base, title)
    if tag:
        text += Markup('<text class="tag" x="{}" y="{}" text-anchor="end">{}</text>').format(x + width - 12, base, tag)
    for number, line in enumerate(lines, 1):
        text += Markup('<text class="fact" x="{}" y="{}">{}</text>').format(
            x + 12, base + 2 + 17 * number, _cut(line, room)
        )
    kind = f"{node.kind} current" if node.current else node.kind
    said = ", ".join(part for part in (node.title, *node.lines) if part)
    frame = Markup('<g class="node {}"><title>{}</title><rect x="{}" y="{}" width="{}" height="{}" rx="9"/>{}</g>')
    box = frame.format(kind, said, x, y, width, height, text)
    return Markup('<a href="{}">{}</a>').format(node.link, box) if node.link else box


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else text[: max(room - 1, 1)] + "\u2026"


def _say(nodes: Sequence[Node]) -> str:
    """Return the drawing in words."""
    titles = {node.key: node.title for node in nodes}
    said = []
    for node in nodes:
        begins = f" from {', '.join(titles.get(key, key) for key in node.parents)}" if node.parents else ""
        by = f", rewarded by {', '.join(titles.get(key, key) for key in node.advisers)}" if node.advisers else ""
        said.append(f"{node.title}{begins}{by}")
    return "Lineage: " + "; ".join(said)
