"""Our side: a recipe through the command `mobiquant quantize`, and what a checkpoint holds.

The command runs in a process of its own, so that what is timed is what a user waits for: loading and writing are in it.
"""

import json
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO

from plan import Job, Settings

from mobiquant import checkpoint, estimate
from mobiquant.calibrate.work import PLAN
from mobiquant.config import InputError

TICK = 5.0


@dataclass(frozen=True)
class Made:
    """A checkpoint: where it lies, seconds it took (None where it was there), bits stored for each weight, and its tokens."""

    folder: Path
    seconds: float | None
    stored_bits: float
    calibration: dict[str, int | str]


def command(settings: Settings, job: Job, device: str) -> list[str]:
    """The words of `mobiquant quantize` for a recipe but for its folders; what `job.arguments` say comes last and wins."""
    words = ["quantize", settings.model, "--recipe", job.method, "--device", device, "--seed", str(job.seed)]
    words += ["--group-size", str(settings.group_size)]
    words += ["--samples", str(settings.samples), "--sequence-length", str(settings.length)]
    for text in settings.calibration:
        words += ["--calibration", text]
    return [*words, *job.arguments]


def quantize(settings: Settings, job: Job, device: str, work: Path) -> Made:
    """Run a recipe and describe what it made; raises InputError with the last line of the command where it fails.

    The checkpoint stays below `work`. So does what the full recipe keeps while it trains: a run that was killed goes on there,
    and its seconds go on too.
    """
    words, folder = command(settings, job, device), work / "checkpoints" / job.key
    last, clock = ["--output", str(folder), "--overwrite"], None
    if job.method == "full":
        kept = work / "training" / f"{job.key}-{zlib.crc32(' '.join(words).encode()):08x}"
        going_on = (kept / PLAN).is_file()
        last += ["--work-dir", str(kept), *(["--resume"] if going_on else [])]
        clock = kept.with_suffix(".seconds")
        clock.parent.mkdir(parents=True, exist_ok=True)
        if not going_on:
            clock.unlink(missing_ok=True)
    seconds, said, code = _timed([sys.executable, "-m", "mobiquant", *words, *last], clock)
    if code:
        raise InputError((said.strip().splitlines() or [f"exit code {code}"])[-1].removeprefix("mobiquant: "))
    return describe(folder, seconds)


def _timed(words: list[str], clock: Path | None) -> tuple[float, str, int]:
    """Seconds, stderr and exit code of a command; `clock` is a file that adds up the seconds of calls, killed ones too.

    What the command says goes on to stderr line by line, so that the log of a long job can be followed.
    """
    before = float(clock.read_text()) if clock is not None and clock.is_file() else 0.0
    started, said = time.perf_counter(), list[str]()
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        reader = Thread(target=_pass_on, args=(process.stderr, said))
        reader.start()
        ended = False
        while not ended:
            with suppress(subprocess.TimeoutExpired):
                process.wait(TICK)
                ended = True
            seconds = before + time.perf_counter() - started
            if clock is not None:
                clock.write_text(f"{seconds:.3f}")
        reader.join()
    return seconds, "".join(said), process.returncode


def _pass_on(lines: IO[str], kept: list[str]) -> None:
    for line in lines:
        print(line, end="", file=sys.stderr, flush=True)
        kept.append(line)


def describe(folder: Path, seconds: float | None = None) -> Made:
    """What a checkpoint holds; raises InputError where the folder is none."""
    facts = estimate.describe(folder)
    made = checkpoint.read_config(folder)["quantization_config"].get("calibration", {})
    names = {"tokens": "tokens", "crc32": "tokens_crc32", "trained_on": "training_tokens"}
    kept = {key: made[name] for key, name in names.items() if name in made}
    return Made(folder, seconds, float(facts["stored_bits_per_weight"]["total"]), json.loads(json.dumps(kept)))
