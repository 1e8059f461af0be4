"""The demonstration: a real model, quantised, measured and heard at several precisions, in minutes on two cores."""

import platform
import time
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mobiquant import calibrate, checkpoint, data, integration, load, set_precision
from mobiquant.config import Format
from mobiquant.evaluate import Row, evaluate, round_to_nearest
from mobiquant.generate import generate
from mobiquant.progress import Report
from mobiquant.report import plot

GROUP, LENGTH, WINDOWS = 64, 1024, 3
BUDGETS = (2.0, 2.5, 3.0, 3.5, 4.0, 6.0, 8.0)
BASELINES = (2, 3, 4, 8)
SPOKEN = (2, 3, 4, 8)
PROMPT = "The capital of France is"


def demo(output: Path, progress: Report) -> dict[str, Any]:
    """Run the demonstration and fill the folder `output`; returns rows, continuations and paths."""
    made, tokenizer = integration.load_float_and_tokenizer(integration.DEMO_MODEL)
    original = deepcopy(made).float()
    started = time.perf_counter()
    calibrate.quantize(made, tokenizer=tokenizer, format=Format(group_size=GROUP), progress=progress)
    seconds = time.perf_counter() - started
    rows: list[Row] = []
    continuations: list[dict[str, Any]] = []

    def write(folder: Path) -> None:
        made.save_pretrained(folder / "checkpoint")
        model = load(folder / "checkpoint", dtype=torch.float32)
        rows.extend(_measure(model, original, tokenizer, progress))
        for number, bits in enumerate(SPOKEN):
            set_precision(model, bits)
            text = generate(model, tokenizer, PROMPT, max_new_tokens=24)
            continuations.append({"bits": bits, "text": text})
            progress("continuing the prompt", number + 1, len(SPOKEN))
        plot([asdict(row) for row in rows], folder / "perplexity.png", "SmolLM2-135M-Instruct, built-in text")

    checkpoint.write_whole(output, write)
    return {
        "rows": [asdict(row) for row in rows],
        "prompt": PROMPT,
        "continuations": continuations,
        "checkpoint": str(output / "checkpoint"),
        "plot": str(output / "perplexity.png"),
        "quantize_s": round(seconds, 1),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }


def _measure(model: Any, reference: PreTrainedModel, tokenizer: Any, progress: Report) -> list[Row]:
    """Rows of the float model, of the checkpoint at each budget, and of round-to-nearest at each width."""
    windows = data.windows(data.load_text("builtin", "measure"), tokenizer, LENGTH, "builtin")[:WINDOWS]

    def staged(stage: str) -> Report:
        return lambda _, done, total: progress(stage, done, total)

    rows = [replace(row, name="float") for row in evaluate(reference, windows, progress=staged("measuring the float model"))]
    rows += [
        replace(row, name="mobiquant")
        for row in evaluate(model, windows, BUDGETS, reference=reference, progress=staged("measuring budgets"))
    ]
    for number, bits in enumerate(BASELINES):
        rounded = deepcopy(reference)
        round_to_nearest(rounded, bits, GROUP)
        found = evaluate(rounded, windows, reference=reference)[0]
        rows.append(replace(found, name="round to nearest", bits=float(bits), bits_read=float(bits)))
        progress("measuring round-to-nearest", number + 1, len(BASELINES))
    return rows
