"""Our side: a recipe through the command `mobiquant quantize`, and what a checkpoint holds.

The command runs in a process of its own, so that what is timed is what a user waits for: loading and writing are in it.
"""

import json
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

from plan import Job, Settings

from mobiquant import checkpoint, estimate
from mobiquant.calibrate.work import PLAN
from mobiquant.config import InputError


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

    The checkpoint stays below `work`. So does what the full recipe keeps while it trains: a run that was killed goes on there.
    """
    words, folder = command(settings, job, device), work / "checkpoints" / job.key
    last = ["--output", str(folder), "--overwrite"]
    if job.method == "full":
        kept = work / "training" / f"{job.key}-{zlib.crc32(' '.join(words).encode()):08x}"
        last += ["--work-dir", str(kept), *(["--resume"] if (kept / PLAN).is_file() else [])]
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "mobiquant", *words, *last], capture_output=True, text=True)
    seconds = time.perf_counter() - started
    print(done.stdout, done.stderr, file=sys.stderr)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise InputError(said[-1].removeprefix("mobiquant: "))
    return describe(folder, seconds)


def describe(folder: Path, seconds: float | None = None) -> Made:
    """What a checkpoint holds; raises InputError where the folder is none."""
    facts = estimate.describe(folder)
    made = checkpoint.read_config(folder)["quantization_config"].get("calibration", {})
    kept = {key: made[name] for key, name in (("tokens", "tokens"), ("crc32", "tokens_crc32")) if name in made}
    return Made(folder, seconds, float(facts["stored_bits_per_weight"]["total"]), json.loads(json.dumps(kept)))
