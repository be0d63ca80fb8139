"""Rows of tokens on stdout: colours on a terminal, brackets in a pipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from alignkit.console.clean import printable
from alignkit.console.say import open_console

if TYPE_CHECKING:
    from rich.text import Text

_STYLES = {"learnt": "bold green", "scored": "bold black on yellow", "read": "", "padding": "dim"}
_MARKS = {"learnt": ("[[", "]]"), "scored": ("{{", "}}"), "padding": ("((", "))")}
_WIDE = 120  # columns from which chosen and rejected stand beside each other


def print_preview(preview: Mapping[str, Any]) -> None:
    """Write rows, counts and findings to stdout; `preview` is `Preview.to_dict()`."""
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    console = open_console(stderr=False)
    coloured = console.is_terminal and not console.no_color
    legend = Text("learnt", _STYLES["learnt"]) if coloured else Text("[[learnt]]")
    legend += Text.assemble(
        "  read  ", ("scored", _STYLES["scored"]), "  ", ("padding", "dim"), "  ", ("control tokens", "underline")
    ) if coloured else Text("  read  {{scored}}  ((padding))")  # fmt: skip
    console.print(Text(printable(f"{preview['stage']} ({preview['method']})"), "bold"))
    console.print(legend)
    for number, row in enumerate(preview["rows"], 1):
        panels = [
            Panel(
                _mark(sequence, coloured=coloured),
                title=f"row {number}" + (f", {sequence['label']}" if sequence["label"] else ""),
                title_align="left",
                border_style="dim",
            )
            for sequence in row["sequences"]
        ]
        if len(panels) == 2 and console.width >= _WIDE:
            console.print(Columns(panels, width=console.width // 2 - 1, expand=True))
        else:
            for panel in panels:
                console.print(panel)
    for name, value in preview["facts"].items():
        console.print(Text(printable(f"{name}: {value}")))
    for finding in preview["findings"]:
        console.print(Text(printable(f"warning: {finding}"), "yellow"))
    if not preview["findings"]:
        console.print(Text("nothing looks wrong", "green"))


def _mark(sequence: Mapping[str, Any], *, coloured: bool) -> Text:
    from rich.text import Text

    text = Text()
    for span in sequence["spans"]:
        opening, closing = ("", "") if coloured else _MARKS.get(span["kind"], ("", ""))
        text.append(opening)
        for number, token in enumerate(span["tokens"]):
            style = _STYLES[span["kind"]] + (" underline" if number in span["special"] else "")
            text.append(printable(token), style.strip() if coloured else "")
        text.append(closing)
    if sequence["num_left_out"]:
        text.append(f" and {sequence['num_left_out']} tokens more", "dim")
    return text
