"""What commands show: tables and sentences for people, one JSON value for programs, two lines for errors."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cloister.errors import CloisterError

_ID = re.compile(r"[a-z]+-[0-9a-f]{8,}")
_WORD = (40, 20, 12, 9, 6)  # how long a word may be that is not broken: the first that the terminal is wide enough for


def error(refused: CloisterError, *, as_json: bool) -> None:
    """`error:` and `hint:` on standard error, or the error's map as JSON on standard output."""
    if as_json:
        print(json.dumps(refused.to_dict()))
        return
    red, dim, plain = ("\033[31m", "\033[2m", "\033[0m") if _colour(sys.stderr) else ("", "", "")
    print(f"{red}error:{plain} {printable(refused.message)}", file=sys.stderr)
    print(f"{dim}hint:{plain}  {printable(refused.hint) or 'see cloister --help'}", file=sys.stderr)


def value(shown: Any) -> None:
    """One JSON value on standard output."""
    print(json.dumps(shown, indent=2, sort_keys=True, default=str))


def say(text: str = "") -> None:
    """A sentence for a person."""
    print(text, flush=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, empty: str) -> None:
    """Rows under headings; `empty` is said when there are none. On a pipe: tab-separated, no frame.

    Nothing is cut off where the terminal is narrow. What people copy, names in the first column and ids, stays on one
    line, if need be beyond the terminal's edge; all else is broken into lines.
    """
    if not rows:
        say(empty)
        return
    texts = [[_text(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in (list(columns), *texts):
            print("\t".join(row))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    both = [(name, *cells) for name, cells in zip(columns, zip(*texts, strict=True), strict=True)]
    widths = _widths(both, console.width)
    console.width = max(console.width, sum(widths) + 2 * len(widths))
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name, width in zip(columns, widths, strict=True):
        grid.add_column(name, width=width, overflow="fold")
    for row in texts:
        grid.add_row(*map(Text, row))
    console.print(grid)


def _widths(columns: Sequence[Sequence[str]], terminal: int) -> list[int]:
    """How wide columns are, each given with its heading; two more characters go with each. Longer ones give way first,
    and words are broken only where they would not fit otherwise."""
    from rich.cells import cell_len

    widths = [max(1, *map(cell_len, texts)) for texts in columns]
    words = [max((cell_len(word) for text in texts for word in text.split()), default=1) for texts in columns]
    copied = [_is_copied(texts[1:], first=index == 0) for index, texts in enumerate(columns)]
    room = terminal - 2 * len(columns)
    for longest in _WORD:
        least = [word if kept else min(word, longest) for word, kept in zip(words, copied, strict=True)]
        if sum(least) <= room:
            break
    while sum(widths) > room and widths != least:
        widest = max(range(len(widths)), key=lambda index: widths[index] if widths[index] > least[index] else 0)
        widths[widest] -= 1
    return widths


def _is_copied(cells: Sequence[str], *, first: bool) -> bool:
    """Whether a column has what people copy into their next command."""
    return not any(" " in cell for cell in cells) and (first or any(map(_ID.fullmatch, cells)))


def facts(pairs: Mapping[str, Any]) -> None:
    """Aligned `name  value` lines."""
    width = max(len(name) for name in pairs)
    for name, fact in pairs.items():
        say(f"  {name:<{width}}  {_text(fact)}")


@contextlib.contextmanager
def progress(title: str) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error, if that is a terminal. Call with (done, total, note="")."""
    if not sys.stderr.isatty():
        yield lambda *_, **__: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    layout = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*layout, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None, note="")

        def advance(done: float, total: float | None, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield advance


def unit(protected: Mapping[str, Any], used: int | None = None) -> str:
    """Whose presence in the data epsilon hides; `used` is how many rows of a unit a run uses at most."""
    if protected["column"] is None:
        return "one row"
    if used is not None and used < protected["max_rows"]:
        return f"one {protected['column']}, of whose rows at most {used:,} of {protected['max_rows']:,} are used"
    rows = "one row" if protected["max_rows"] == 1 else f"at most {protected['max_rows']:,} rows"
    return f"one {protected['column']} with {rows}"


def change(values: Sequence[float]) -> str:
    """A number before and after; once where it stayed."""
    before, after = values
    return f"{after:g}" if before == after else f"{before:g} → {after:g}"


def replaced(privacy: Mapping[str, Any]) -> dict[str, str]:
    """The fact that holds of a row which is known to be in; none where nobody computed it."""
    epsilon = privacy.get("epsilon_replacing")
    return {} if epsilon is None else {"  if a row is replaced": f"epsilon {epsilon:.4f}: which values it has"}


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return f"{cell:.6g}"
    if isinstance(cell, list | tuple):
        return printable(", ".join(map(str, cell)))
    return printable(str(cell))


def printable(text: str, *, lines: bool = False) -> str:
    """What others wrote, without the control characters that would steer this terminal; with its `lines`, or as one."""
    return "".join(letter if letter.isprintable() or (lines and letter == "\n") else "\ufffd" for letter in text)


def _colour(stream: Any) -> bool:
    import os

    return bool(stream.isatty()) and "NO_COLOR" not in os.environ
