"""The work folder of a long recipe: what is done is kept, so that a killed run goes on where it was.

What lies there: `plan.json` (what the run was asked for), `fast/` (the checkpoint that training starts from), one safetensors
file for each trained block, one for the end-to-end stage, replaced as it goes. Every file appears whole or not at all.
A stage draws its randomness from generators seeded by its place and step, never from a state that would have to be kept.
"""

import json
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from mobiquant.config import InputError

PLAN = "plan.json"
# after work that goes on was kept, it is not kept again for this many times as long as that took
SPARE = 20


def digest(tensors: dict[str, Tensor]) -> str:
    """CRC-32 over names, shapes and bytes of tensors."""
    total = 0
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        total = zlib.crc32(f"{name} {tuple(value.shape)} {value.dtype}".encode(), total)
        total = zlib.crc32(value.view(-1).view(torch.uint8).numpy(), total)
    return f"{total:08x}"


def check(folder: Path | None, resume: bool) -> None:
    """Raise InputError where a run cannot start in a folder, or none can be gone on with there."""
    if folder is None:
        if resume:
            raise InputError("resume needs the folder of the run to go on with: give --work-dir")
        return
    known = (folder / PLAN).is_file()
    if known and not resume:
        raise InputError(f"'{folder}' holds a run already: go on with --resume, or give another --work-dir")
    if resume and not known:
        raise InputError(f"'{folder}' holds no run to resume: leave out --resume to start one there")
    if not known and folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"'{folder}' is not empty and holds no run: give another --work-dir")


class Work:
    """A work folder; with `folder` None nothing is kept and nothing is found."""

    def __init__(self, folder: Path | None, plan: dict[str, Any], resume: bool):
        """Start or go on; raises InputError where the folder holds another run, or one that `resume` was not asked for."""
        check(folder, resume)
        self.folder = folder
        # when work that goes on is worth keeping again
        self._due = 0.0
        if folder is None:
            return
        # as it will be read back
        plan = json.loads(json.dumps(plan))
        if resume:
            self._compare(json.loads((folder / PLAN).read_text()), plan)
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._write(PLAN, json.dumps(plan, indent=1).encode())

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        for name in sorted(old.keys() | new.keys()):
            before, now = old.get(name), new.get(name)
            if before == now:
                continue
            if isinstance(before, dict) and isinstance(now, dict):
                self._compare(before, now)
            raise InputError(
                f"'{self.folder}' holds a run with {name.replace('_', ' ')} {before}, not {now}: "
                "resume with what it was started with, or give another --work-dir"
            )

    def _write(self, name: str, data: bytes) -> None:
        assert self.folder is not None
        new = self.folder / f"{name}.new"
        with new.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.folder / name)

    def save(self, name: str, values: Callable[[], dict[str, Tensor]], note: Any) -> None:
        """Keep tensors and a JSON note under a name, in place of what was there; `values` is called only where a folder is."""
        if self.folder is not None:
            self._write(f"{name}.safetensors", save(values(), {"note": json.dumps(note)}))

    def keep(self, name: str, values: Callable[[], dict[str, Tensor]], note: Any) -> None:
        """`save` what is not finished, unless writing it would take more than its share of the time (`SPARE`)."""
        begun = time.monotonic()
        if begun >= self._due:
            self.save(name, values, note)
            ended = time.monotonic()
            self._due = ended + SPARE * (ended - begun)

    def load(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """What was kept under a name, or None."""
        if self.folder is None or not (path := self.folder / f"{name}.safetensors").is_file():
            return None
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        return load_file(path), json.loads(header["__metadata__"]["note"])
