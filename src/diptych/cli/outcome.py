"""What a verb gives back: values for machines, a table for people, an exit code."""

import io
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

OK, INTERNAL, BAD_INPUT, START_AGAIN = 0, 1, 2, 75
_WIDTH_OF_A_FILE = 120


@dataclass(frozen=True)
class Outcome:
    """The end of a verb that did its work."""

    values: dict[str, Any]
    """What `--json` prints."""
    text: str = ""
    """What is printed without it; empty: one `name: value` line for each of `values`."""
    code: int = OK
    """Exit code; a check that found problems did its work, and ends with 2."""


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows as a text table as wide as the terminal: the first column left, numbers right."""
    drawn = Table(title=Text(title), title_justify="left", title_style="bold", box=None, pad_edge=False)
    cells = [[_plain(cell) for cell in row] for row in rows]
    for column, name in enumerate(head):
        numeric = all(row[column][:1].isdigit() or row[column] == "" for row in cells) and column > 0
        drawn.add_column(Text(name, style="dim"), justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        drawn.add_row(*map(Text, row))
    buffer = io.StringIO()
    is_terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else _WIDTH_OF_A_FILE
    Console(file=buffer, width=width, force_terminal=is_terminal).print(drawn)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def _plain(cell: object) -> str:
    """The cell without what a terminal would obey: keys and captions come from outside."""
    if isinstance(cell, float):
        cell = round(cell) if abs(cell) >= 1000 else f"{cell:.4g}"
    text = f"{cell:,}" if isinstance(cell, int) else str(cell)
    return "".join(character if character.isprintable() else "�" for character in text)
