"""What verbs of the command line share: the two consoles, lists of numbers, and results as tables or JSON."""

import json
from typing import Any

from rich.console import Console
from rich.table import Table

out, err = Console(), Console(stderr=True)


def quiet() -> None:
    """Silence the bars and notices of transformers: progress is ours."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def numbers(text: str) -> list[float]:
    """'2,2.5,8' -> [2, 2.5, 8]; raises InputError on anything else."""
    from mobiquant.config import InputError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"'{text}' is no list of bits: give numbers with commas, such as 2,2.5,3,4,8") from None


def widths(text: str) -> tuple[int, ...]:
    """'2,1,1' -> (2, 1, 1); raises InputError on anything else."""
    from mobiquant.config import InputError

    try:
        return tuple(int(width) for width in text.split(","))
    except ValueError:
        raise InputError(f"slices '{text}' are no list of widths: give whole numbers with commas, such as 2,1,1,2,2") from None


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
