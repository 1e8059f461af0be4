"""Zero-shot tasks from local files: joins the published files of a task and writes the yaml files that lm-eval reads.

The yaml files in `tasks/` ask the questions of lm-eval's own tasks of the same names, and name a data file without a folder;
`prepare` writes both into one folder. A folder of data holds `piqa-valid.jsonl` and `piqa-valid-labels.lst` (a 0 or 1 on each
line), and `arc-easy-test.jsonl`; the files of the tasks that are not asked for need not be there.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from mobiquant.config import InputError

YAML = Path(__file__).with_name("tasks")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(
            f"task file '{path}' cannot be read ({error.strerror}): give the folder of it as --task-data"
        ) from None


def _items(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in _lines(path) if line.strip()]
    except ValueError:
        raise InputError(f"task file '{path}' holds a line that is no JSON: fetch it again") from None


def _piqa(data: Path) -> list[dict[str, Any]]:
    items = _items(data / "piqa-valid.jsonl")
    labels = [int(line) for line in _lines(data / "piqa-valid-labels.lst") if line.strip()]
    if len(items) != len(labels):
        raise InputError(f"'{data}' holds {len(items)} items of PIQA but {len(labels)} labels: fetch both files again")
    return [{**item, "label": label} for item, label in zip(items, labels, strict=True)]


def _arc_easy(data: Path) -> list[dict[str, Any]]:
    return _items(data / "arc-easy-test.jsonl")


READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {"piqa": _piqa, "arc_easy": _arc_easy}


def prepare(names: Sequence[str], data: Path, folder: Path) -> None:
    """Write `NAME.yaml` and `NAME.jsonl` for each task into `folder`; raises InputError on a task or file that is not there."""
    unknown = [name for name in names if name not in READERS]
    if unknown:
        raise InputError(f"task '{unknown[0]}' has no local form: choose from {', '.join(READERS)}, or leave out --task-data")
    found = {name: READERS[name](data) for name in names}
    folder.mkdir(parents=True, exist_ok=True)
    for name, items in found.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        task = yaml.safe_load((YAML / f"{name}.yaml").read_text())
        files = task["dataset_kwargs"]["data_files"]
        task["dataset_kwargs"]["data_files"] = {split: str(file.resolve()) for split in files}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False))
