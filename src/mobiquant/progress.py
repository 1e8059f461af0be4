"""Progress of long work: bars on stderr, one for each stage."""

import time
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


def left(seconds: float) -> str:
    """Time that is left, as a short text; nothing for less than a second."""
    whole = round(seconds)
    return "" if whole < 1 else f"{whole} s left" if whole < 120 else f"{round(whole / 60)} min left"


@contextmanager
def bars(console: Console | None = None, lines: bool = False, clock: Callable[[], float] = time.monotonic) -> Iterator[Report]:
    """A function `report(stage, done, total, note="")` that moves a bar; no bars where stderr is no terminal, but a line at
    each tenth with `lines`, with the time that is left of the stage.
    """
    console = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    tasks: dict[str, Any] = {}
    begun: dict[str, tuple[float, int]] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as shown:

        def report(stage: str, done: int, total: int, note: str = "") -> None:
            # the first step of a stage may compile, and a resumed stage does not begin at its first step
            since, first = begun.setdefault(stage, (clock(), done)) if done else (clock(), done)
            if lines and not console.is_terminal and done and (done * 10 // total != (done - 1) * 10 // total):
                rest = left((total - done) * (clock() - since) / (done - first)) if done > first else ""
                words = [f"{stage}: {done}/{total}", note, rest and f"({rest})"]
                console.print(" ".join(filter(None, words)), highlight=False, markup=False, soft_wrap=True)
            if stage not in tasks:
                tasks[stage] = shown.add_task(stage, total=total)
            shown.update(tasks[stage], completed=done, total=total, description=f"{stage} {note}".rstrip())

        yield report
