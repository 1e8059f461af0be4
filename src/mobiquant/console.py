"""What verbs of the command line share: the two consoles, memory, lists of numbers, and results as tables or JSON."""

import ctypes
import json
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

# `M_MMAP_THRESHOLD` and `M_TRIM_THRESHOLD` of glibc's malloc.h
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
out, err = Console(), Console(stderr=True)
Number = TypeVar("Number", int, float)


def quiet() -> None:
    """Silence the bars and notices of transformers: progress is ours."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def keep_freed_memory() -> None:
    """Have glibc keep up to 2 GB of what is freed; elsewhere nothing happens.

    It gives the memory of large tensors back at once, and the system clears it page by page for the next one of that size: a
    tenth of the time of `quantize` on a CPU.
    """
    if sys.platform != "linux":
        return
    found = getattr(ctypes.CDLL(None), "mallopt", None)
    if found is not None:
        for parameter in (MMAP_THRESHOLD, TRIM_THRESHOLD):
            found(parameter, 2**31 - 1)


def numbers(text: str, what: str, example: str, kind: Callable[[str], Number]) -> list[Number]:
    """'2,2.5,8' -> [2, 2.5, 8], each by `kind`; raises InputError, which names `what` and an `example`, on anything else."""
    from mobiquant.config import InputError

    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        whole = "whole " if kind is int else ""
        raise InputError(f"'{text}' is no list of {what}: give {whole}numbers with commas, such as {example}") from None


def budgets(text: str) -> list[float]:
    """'2,2.5,8' -> [2.0, 2.5, 8.0], as `numbers`."""
    return numbers(text, "bits", "2,2.5,3,4,8", float)


def widths(text: str) -> tuple[int, ...]:
    """'2,1,1' -> (2, 1, 1), as `numbers`."""
    return tuple(numbers(text, "slice widths", "2,1,1,2,2", int))


def show(values: dict[str, Any], as_json: bool) -> None:
    """A dictionary as JSON or as lines."""
    if as_json:
        print(json.dumps(values))
        return
    for name, value in values.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key}: {entry}" for key, entry in value.items()) or "none"
        out.print(f"{name:<24} {value}", markup=False, highlight=False, soft_wrap=True)


def show_rows(rows: list[dict[str, Any]], as_json: bool, **more: Any) -> None:
    """Report rows as a table, or as one JSON object."""
    if as_json:
        print(json.dumps({"rows": rows, **more}))
        return
    table = Table()
    for name in rows[0]:
        first = name == "name"
        table.add_column(name.replace("_", " "), justify="left" if first else "right", no_wrap=first)
    for row in rows:
        table.add_row(*["-" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()])
    out.print(table)
