"""Requests by vLLM's client, and what became of each: when it began, its first token, and each token after that."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Load:
    """Requests that arrive at random at `rate` a second from `start` seconds on, all of the same length."""

    start: float
    rate: float
    count: int
    input_length: int
    output_length: int
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """One request: when it was sent (monotonic clock), seconds to the first token and between tokens, or an error."""

    start: float
    first: float
    gaps: tuple[float, ...]
    error: str = ""

    @property
    def per_token(self) -> float:
        """Mean seconds of a token after the first."""
        return sum(self.gaps) / max(1, len(self.gaps))

    @property
    def end(self) -> float:
        """When the last token came."""
        return self.start + self.first + sum(self.gaps)


def arguments(load: Load, url: str, tokenizer: str, result: Path) -> list[str]:
    """The command line of the client."""
    given = {
        "backend": "openai", "base-url": url, "endpoint": "/v1/completions", "model": "served", "tokenizer": tokenizer,
        "dataset-name": "random", "random-input-len": load.input_length, "random-output-len": load.output_length,
        "num-prompts": load.count, "request-rate": load.rate, "seed": load.seed, "ready-check-timeout-sec": 0,
        "result-dir": result.parent, "result-filename": result.name,
    }  # fmt: skip
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    return [*words, "--ignore-eos", "--save-result", "--save-detailed", "--disable-tqdm"]


def run(loads: list[Load], url: str, tokenizer: str, folder: Path, loading: float) -> tuple[float, list[list[Request]]]:
    """Send several loads side by side, once clients had `loading` seconds to load.

    Returns when time 0 of the loads was, and their requests. Raises RuntimeError where a client fails.
    """
    begun, jobs = time.monotonic() + loading, []
    folder.mkdir(parents=True, exist_ok=True)
    for number, load in enumerate(loads):
        result = folder / f"load-{number}.json"
        result.unlink(missing_ok=True)
        words = [sys.executable, str(HERE / "client.py"), str(begun + load.start)]
        words += arguments(load, url, tokenizer, result)
        with (folder / f"load-{number}.log").open("w") as log:
            job = subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        jobs.append((job, result))
    found = []
    for job, result in jobs:
        if job.wait() or not result.is_file():
            log = result.with_suffix(".log").read_text()
            raise RuntimeError(f"the client failed: {log.strip().splitlines()[-1] if log.strip() else 'without a word'}")
        found.append(requests(json.loads(result.read_text())))
    return begun, found


def requests(result: dict[str, list[float]]) -> list[Request]:
    """What the client noted."""
    columns = (result[name] for name in ("start_times", "ttfts", "itls", "errors"))
    return [Request(start, first, tuple(gaps), error or "") for start, first, gaps, error in zip(*columns, strict=True)]  # type: ignore[arg-type]


def percentile(values: list[float], share: float) -> float:
    """A percentile; nan of nothing."""
    return float(np.percentile(values, share)) if values else float("nan")
