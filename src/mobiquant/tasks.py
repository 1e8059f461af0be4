"""Zero-shot tasks at each budget, through lm-eval (the extra `tasks`): accuracy and the bits really read.

Task names are lm-eval's own, fetched from the hub, or those of the yaml files in a folder of one's own, which may read local
files (`dataset_path: json`, `data_files`). Accuracy is lm-eval's `acc`; length-normalised accuracy stays in its own reports.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mobiquant import budget
from mobiquant.config import InputError
from mobiquant.progress import Report


@dataclass(frozen=True)
class TaskRow:
    """Accuracies in percent of one budget; `bits` is None for a float model."""

    name: str
    bits: float | None
    bits_read: float | None
    accuracy: dict[str, float]

    @property
    def mean(self) -> float:
        """Mean over the tasks."""
        return sum(self.accuracy.values()) / len(self.accuracy)


def measure(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    bits: Sequence[float] = (),
    *,
    fixed: bool = False,
    folder: Path | None = None,
    limit: int | None = None,
    batch: int = 16,
    progress: Report = lambda *_: None,
) -> list[TaskRow]:
    """One row for each budget of a quantised model, or one where `bits` is empty; `limit` bounds the items of each task.

    Raises InputError where lm-eval is missing, a task is unknown, or its items cannot be had.
    """
    try:
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports] -- an extra
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(f"tasks need the lm-eval package ({error}): pip install 'mobiquant[tasks]'") from None
    if folder is not None and not folder.is_dir():
        raise InputError(f"task folder '{folder}' does not exist: give a folder of yaml files")
    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown or not names:
        where = f"among the yaml files of '{folder}'" if folder else "to lm-eval"
        raise InputError(
            f"task '{', '.join(unknown)}' is not known {where}: list them with lm-eval ls tasks, or give --task-folder"
        )
    wrapped, rows = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch), []
    for number, one in enumerate(bits or [None]):
        with budget.precision(model, one, routed=not fixed) if one is not None else nullcontext():
            if one is not None:
                budget.bits_read(model, reset=True)
            try:
                found: Any = simple_evaluate(wrapped, tasks=list(names), task_manager=manager, limit=limit, bootstrap_iters=0)
            # datasets and hub raise what their network and file layers raise; no narrower class covers them
            except Exception as error:
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise InputError(f"the tasks could not be run ({reason}): check names, network and files") from error
            read = None if one is None else budget.bits_read(model, reset=True)
        accuracy = {name: round(100 * found["results"][name]["acc,none"], 4) for name in names}
        kind = "float" if one is None else "fixed" if fixed else "routed"
        rows.append(TaskRow(kind, one, read, accuracy))
        progress("running tasks", number + 1, max(len(bits), 1))
    return rows
