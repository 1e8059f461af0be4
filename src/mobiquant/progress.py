"""Progress of long work: bars on stderr, one for each stage."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# called with a stage, steps done and steps in all; with a fourth argument, a short text, where there is something to tell
Report = Callable[..., None]


def by_width(values: dict[int, float]) -> str:
    """One number for each width as a short text."""
    return " ".join(f"{bits}b:{value:.3g}" for bits, value in sorted(values.items()))


@contextmanager
def bars(console: Console | None = None, lines: bool = False) -> Iterator[Report]:
    """A function `report(stage, done, total, note="")` that moves a bar; no bars where stderr is no terminal, but a line at
    each tenth with `lines`.
    """
    console = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:

        def report(stage: str, done: int, total: int, note: str = "") -> None:
            if lines and not console.is_terminal and done and (done * 10 // total != (done - 1) * 10 // total):
                console.print(f"{stage}: {done}/{total} {note}".rstrip(), highlight=False, markup=False)
            if stage not in tasks:
                tasks[stage] = shown.add_task(stage, total=total)
            shown.update(tasks[stage], completed=done, total=total, description=f"{stage} {note}".rstrip())

        yield report
