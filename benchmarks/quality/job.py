"""One job in a process of its own: quantise, measure, write one JSON file. Called by `schedule.py` as `job.py TASK.json`.

A process for each job keeps the packages apart (they patch torch and transformers when imported), frees all memory between
jobs, and makes a crash a failed row. Every method is measured by the same code, at bf16 on CUDA and fp32 on a CPU.
"""

import json
import os
import sys
import time
import traceback
import zlib
from importlib import metadata
from pathlib import Path
from typing import Any

import ours
import peers
import torch
from jaxtyping import Int
from plan import Job, Settings, describe, label
from torch import Tensor

import mobiquant
from mobiquant import budget, data, evaluate, integration, tasks
from mobiquant.config import InputError
from mobiquant.console import quiet

PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "auto-round", "hqq", "lm-eval")


def calibration_tokens(settings: Settings, tokenizer: Any) -> Int[Tensor, "S L"]:
    """The windows that all peers calibrate with: those that mobiquant itself draws from the same texts with the same seed."""
    texts = {name: data.load_text(name, "calibrate") for name in settings.calibration}
    return data.sample(data.windows_of_all(texts, tokenizer, settings.length), settings.samples, settings.seed)


class Bench:
    """What the jobs of one run measure with: the float model, the windows of each text, and the tasks."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device = settings, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.tokenizer = integration.load_tokenizer(settings.model)
        self.windows = {
            label(name): data.windows(data.load_text(name, "measure"), self.tokenizer, settings.window, name)[
                : settings.max_windows
            ]
            for name in settings.texts
        }

    def float_model(self) -> Any:
        """The model that everything is compared with, on the host."""
        return integration.load_float(self.settings.model, self.dtype)

    def rows(
        self, model: Any, bits: tuple[float, ...] | None = None, *, fixed: bool = False, reference: Any = None
    ) -> list[dict[str, Any]]:
        """A row for each budget, or one of the model as it is where `bits` is None: scores by text, bits read on the first."""
        if bits == ():
            return []
        rows = [{"bits": b, "bits_read": None, "routed": b is not None and not fixed, "scores": {}} for b in bits or (None,)]
        for name, windows in self.windows.items():
            found = evaluate.evaluate(model, windows, bits or (), fixed=fixed, reference=reference)
            for row, one in zip(rows, found, strict=True):
                row["scores"][name] = {"perplexity": one.perplexity, "kl": one.kl, "windows": windows.shape[0]}
                row["bits_read"] = one.bits_read if row["bits_read"] is None else row["bits_read"]
        return rows

    def accuracies(self, model: Any, rows: list[dict[str, Any]]) -> dict[str, str]:
        """Add the accuracies of the tasks to the rows, to those of `task_bits` where budgets are many.

        What went wrong is returned as `task_error`: perplexities stay what they are.
        """
        if not self.settings.tasks:
            return {}
        folder = None if self.settings.task_folder is None else Path(self.settings.task_folder)
        wanted = [row for row in rows if row["bits"] is None or row["bits"] in (self.settings.task_bits or (row["bits"],))]
        try:
            for row in wanted:
                found = tasks.measure(
                    model, self.tokenizer, self.settings.tasks, () if row["bits"] is None else (row["bits"],),
                    fixed=not row["routed"], folder=folder, limit=self.settings.limit,
                    batch=256 if self.device.type == "cuda" else 16,
                )  # fmt: skip
                row["accuracy"] = {**found[0].accuracy, "mean": found[0].mean}
        except InputError as error:
            traceback.print_exc()
            return {"task_error": str(error)}
        return {}


def run(settings: Settings, job: Job, device: torch.device, work: Path) -> dict[str, Any]:
    """Quantise and measure; returns the result without what it was made with."""
    if job.kind == "peer":
        peers.check_installed(job.method)
    bench = Bench(settings, device)
    if job.kind == "float":
        model = bench.float_model().to(device)
        rows = bench.rows(model)
        return {"seconds": None, "stored_bits": None, "rows": rows, **bench.accuracies(model, rows)}
    return _peer(bench, job) if job.kind == "peer" else _own(bench, job, work)


def _peer(bench: Bench, job: Job) -> dict[str, Any]:
    settings, bits = bench.settings, job.bits or 0
    tokens = calibration_tokens(settings, bench.tokenizer)
    given = peers.Given(bench.float_model(), bench.tokenizer, tokens, bits, settings.group_size, bench.device)
    started = time.perf_counter()
    made: Any = peers.METHODS[job.method](given)
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    model = made.to(bench.dtype).eval().requires_grad_(False)
    peers.check_grid(job.method, model, bits, settings.group_size)
    rows = bench.rows(model, reference=bench.float_model().to(bench.device))
    failed = bench.accuracies(model, rows)
    for row in rows:
        row |= {"bits": bits, "bits_read": bits}
    seen = {"tokens": tokens.numel(), "crc32": f"{zlib.crc32(tokens.contiguous().numpy()):08x}"}
    uses = job.method not in ("rtn", "hqq")
    stored = peers.stored_bits(job.method, model, bits, settings.group_size)
    return {"seconds": seconds, "stored_bits": stored, "rows": rows, "calibration": seen if uses else {}, **failed}


def _own(bench: Bench, job: Job, work: Path) -> dict[str, Any]:
    settings = bench.settings
    if job.kind == "checkpoint":
        made = ours.describe(Path(job.arguments[0]))
    else:
        made = ours.quantize(settings, job, bench.device.type, work)
    model = mobiquant.load(made.folder, device=bench.device, dtype=bench.dtype)
    widths = budget.checkpoint_of(model).format.widths
    fixed = tuple(b for b in settings.fixed if b in widths)
    routed = tuple(b for b in settings.routed if widths[0] <= b <= widths[-1])
    reference = bench.float_model().to(bench.device)
    rows = bench.rows(model, fixed, fixed=True, reference=reference) + bench.rows(model, routed, reference=reference)
    failed = bench.accuracies(model, rows)
    facts = {"seconds": made.seconds, "stored_bits": made.stored_bits, "calibration": made.calibration}
    return {**facts, "rows": rows, **failed}


def versions() -> dict[str, str]:
    """Versions of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> str:
    """What the job ran on, in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def main(path: Path) -> None:
    """Do the job in a file and write its result beside it; a failure is a result too."""
    task = json.loads(path.read_text())
    settings = Settings.from_dict(task["settings"])
    job = Job(**{**task["job"], "arguments": tuple(task["job"]["arguments"])})
    device = torch.device(task["device"])
    quiet()
    result: dict[str, Any] = {"made": describe(settings, job), "label": job.label, "error": None}
    try:
        result |= run(settings, job, device, Path(task["work"]))
        result |= {"versions": versions(), "machine": machine(device)}
    # whatever a package raises is a row of the table, and its trace is in the log
    except Exception as error:
        traceback.print_exc()
        text = next(iter(str(error).strip().splitlines()), "")
        result["error"] = text if isinstance(error, InputError) else f"{type(error).__name__}: {text}".strip(": ")
    new = Path(task["result"] + ".new")
    new.write_text(json.dumps(result, indent=1))
    new.replace(task["result"])


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    main(Path(sys.argv[1]))
