"""What one run of the comparison consists of: settings that all jobs share, the jobs, and the names of their results.

A job is one method at one width (a peer), one recipe with one seed, one checkpoint, or the float model. Settings and jobs are
plain JSON: a result holds those it was made with, and is used again as long as they are the same.
"""

import json
import re
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import methods

from mobiquant.config import InputError

Kind = Literal["float", "peer", "recipe", "checkpoint"]
NAMED = "wikitext2:"


@dataclass(frozen=True)
class Settings:
    """What all jobs share. `stamps` tell when a file named here has become another one."""

    model: str
    calibration: tuple[str, ...]
    samples: int
    length: int
    seed: int
    group_size: int
    texts: tuple[str, ...]
    window: int
    max_windows: int | None
    fixed: tuple[float, ...]
    routed: tuple[float, ...]
    tasks: tuple[str, ...]
    task_bits: tuple[float, ...]
    task_folder: str | None
    limit: int | None
    stamps: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("length", 8), ("window", 2), ("group_size", 8), ("max_windows", 1), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name.replace('_', ' ')} of {value} is not usable: give {least} or more")
        if not self.texts:
            raise InputError("there is no text to measure on: give --text builtin, a file, or wikitext2:FILE")
        labels = [label(name) for name in self.texts]
        for name in labels:
            if labels.count(name) > 1:
                raise InputError(f"two texts would be called '{name}' in the table: rename one of the files")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Settings":
        """Read back `asdict` after JSON has made lists of tuples."""
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


@dataclass(frozen=True)
class Job:
    """One thing to quantise and measure; `arguments` are those of the recipe, or the folder of a checkpoint.

    `variant` names a recipe that is run otherwise than usual.
    """

    kind: Kind
    method: str
    bits: int | None = None
    seed: int = 0
    arguments: tuple[str, ...] = ()
    variant: str = ""

    @property
    def key(self) -> str:
        """Name of its files in the work folder."""
        tail = {"peer": f"-{self.bits}", "recipe": f"-seed{self.seed}"}.get(self.kind, "")
        variant = f"-{re.sub(r'[^a-z0-9.]+', '-', self.variant.lower())}" if self.variant else ""
        return f"{self.kind}-{self.method}{variant}{tail}"

    @property
    def label(self) -> str:
        """Name in tables and progress lines, without width and seed."""
        if self.kind == "peer":
            return methods.PEERS[self.method].label
        if self.kind == "recipe":
            return f"mobiquant {self.method}" + (f", {self.variant}" if self.variant else "")
        return self.method

    @property
    def minutes(self) -> float:
        """Rough cost, the float model first of all: its row shows early whether anything can be measured."""
        if self.kind == "float":
            return float("inf")
        return methods.PEERS[self.method].minutes if self.kind == "peer" else methods.OWN.get(self.method, 1.0)


def label(text: str) -> str:
    """Short name of a text: wikitext2 for its local copy, the stem of another file."""
    return NAMED[:-1] if text.startswith(NAMED) else Path(text).stem


def bare(argument: str) -> str:
    """An argument without the folders of this machine: what can be printed."""
    head, found, path = argument.partition(":") if argument.startswith(NAMED) else ("", "", argument)
    # a hub id keeps its organisation
    is_path = path.startswith(("/", ".", "~")) or Path(path).exists()
    return head + found + (Path(path).name if is_path else path)


def stamp(name: str) -> str:
    """CRC-32 of what a text or a checkpoint folder names, of its config for a folder; empty for a name that is no file."""
    path = Path(name.removeprefix(NAMED))
    path = path / "config.json" if path.is_dir() else path
    return f"{zlib.crc32(path.read_bytes()):08x}" if path.is_file() else ""


def jobs(
    names: list[str], bits: list[int], seeds: list[int], checkpoints: dict[str, Path], arguments: dict[str, tuple[str, ...]],
    variants: dict[str, tuple[str, ...]],
) -> list[Job]:  # fmt: skip
    """All jobs, long ones first; raises InputError on a method or a width that is not known.

    `arguments` are those of each recipe, `variants` more arguments of `full` by name, which win.
    """
    known = (methods.FLOAT, *methods.PEERS, *methods.RECIPES)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"method '{unknown[0]}' is unknown: choose from {', '.join(known)}")
    wrong = [b for b in bits if not 2 <= b <= 8]
    if wrong or not bits:
        raise InputError(f"{wrong[0] if wrong else 'no'} bits cannot be asked of the peers: give widths from 2 to 8")
    clash = set(checkpoints) & {name for name in known} or {name for name in checkpoints if not name.strip()}
    if clash:
        raise InputError(f"a checkpoint cannot be called '{clash.pop()}': give another NAME in --checkpoint NAME=DIR")
    if not seeds:
        raise InputError("there is no seed: give --seeds 0 or more of them")
    found = [Job("float", methods.FLOAT)] if methods.FLOAT in names else []
    for name in dict.fromkeys(names):
        if name in methods.PEERS:
            only = methods.PEERS[name].only
            found += [Job("peer", name, b) for b in dict.fromkeys(bits) if only is None or b in only]
        elif name in methods.RECIPES:
            found += [Job("recipe", name, None, seed, arguments.get(name, ())) for seed in dict.fromkeys(seeds)]
    usual = arguments.get("full", ())
    found += [Job("recipe", "full", None, seeds[0], (*usual, *more), name) for name, more in variants.items()]
    for name, folder in checkpoints.items():
        found.append(Job("checkpoint", name, arguments=(str(folder.resolve()), stamp(str(folder)))))
    return sorted(found, key=lambda job: -job.minutes)


def describe(settings: Settings, job: Job) -> dict[str, Any]:
    """What a result was made with, as JSON reads it back."""
    return json.loads(json.dumps({"settings": asdict(settings), "job": asdict(job)}))


def known(path: Path, settings: Settings, job: Job) -> dict[str, Any] | None:
    """The result that lies there, where it is whole, went well and was made with the same settings."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    same = isinstance(found, dict) and found.get("made") == describe(settings, job)
    return found if same and not found.get("error") and not found.get("task_error") else None
