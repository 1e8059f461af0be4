"""Runs jobs, one at a time on each device, each in its own process, and collects their results.

A result that lies in the work folder and was made with the same settings is taken as it is: a run that was killed goes on where
it was, and a run with one more method runs only that. Failures are run again.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from queue import Empty, Queue
from threading import Event
from typing import Any

from plan import Job, Settings, describe, known

POLL = 0.2


class Schedule:
    """A run: where things lie, what the jobs share, and how long one may take."""

    def __init__(self, settings: Settings, work: Path, minutes: float, say: Callable[[str], None]) -> None:
        self.settings, self.work, self.minutes, self.say = settings, work, minutes, say
        self.started, self.stop = time.monotonic(), Event()

    def run(self, jobs: list[Job], devices: list[str]) -> list[dict[str, Any]]:
        """The results of all jobs, in their order; an interrupt ends the processes and is raised again."""
        for name in ("results", "logs", "jobs"):
            (self.work / name).mkdir(parents=True, exist_ok=True)
        found: dict[str, dict[str, Any]] = {}
        waiting: Queue[Job] = Queue()
        for job in jobs:
            result = known(self._file(job), self.settings, job)
            if result is None:
                waiting.put(job)
            else:
                found[job.key] = result
        if found:
            self._tell(f"{len(found)} of {len(jobs)} jobs are done already")

        def serve(device: str) -> None:
            while not self.stop.is_set():
                try:
                    job = waiting.get_nowait()
                except Empty:
                    return
                found[job.key] = self._one(job, device)
                self._tell(f"{len(found)}/{len(jobs)} {told(job, found[job.key])}")

        with ThreadPoolExecutor(len(devices)) as pool:
            try:
                for ended in [pool.submit(serve, device) for device in devices]:
                    ended.result()
            except BaseException:
                self.stop.set()
                raise
        return [found[job.key] for job in jobs]

    def _file(self, job: Job) -> Path:
        return self.work / "results" / f"{job.key}.json"

    def _tell(self, text: str) -> None:
        elapsed = int(time.monotonic() - self.started)
        self.say(f"[{elapsed // 3600}:{elapsed // 60 % 60:02d}:{elapsed % 60:02d}] {text}")

    def _one(self, job: Job, device: str) -> dict[str, Any]:
        """Run a job; a process that ends without a result has failed."""
        seen, environment = visible(device, dict(os.environ))
        file = self._file(job)
        task = {"settings": asdict(self.settings), "job": asdict(job), "device": seen, "work": str(self.work)}
        path = self.work / "jobs" / f"{job.key}.json"
        path.write_text(json.dumps(task | {"result": str(file)}))
        file.unlink(missing_ok=True)
        self._tell(f"{named(job)} starts on {device}")
        log = self.work / "logs" / f"{job.key}.log"
        command = [sys.executable, str(Path(__file__).with_name("job.py")), str(path)]
        with log.open("w") as out:
            # a session of its own: what a job starts ends with it
            process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
            end = time.monotonic() + 60 * self.minutes
            while process.poll() is None and time.monotonic() < end and not self.stop.wait(POLL):
                pass
            late = process.poll() is None
            if late:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if file.is_file():
            return json.loads(file.read_text())
        ended = "interrupted" if self.stop.is_set() else f"took more than {self.minutes:g} minutes"
        reason = ended if late else f"its process ended with code {process.returncode}"
        return {"made": describe(self.settings, job), "label": job.label, "error": reason}


def visible(device: str, environment: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The device as the process sees it, and its environment: packages take the first GPU, so it is the only one."""
    environment.setdefault("TQDM_DISABLE", "1")
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not device.startswith("cuda"):
        return device, environment
    number = int(device.partition(":")[2] or 0)
    shown = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    environment["CUDA_VISIBLE_DEVICES"] = shown[number] if number < len(shown) else str(number)
    return "cuda:0", environment


def named(job: Job) -> str:
    """A job in words."""
    return job.label + {"peer": f", {job.bits} bits", "recipe": f", seed {job.seed}"}.get(job.kind, "")


def told(job: Job, result: dict[str, Any]) -> str:
    """How a job went, in words."""
    if result["error"]:
        return f"{named(job)} failed: {result['error']}"
    shown = [f"{next(iter(row['scores'].values()))['perplexity']:.4g}" for row in result["rows"]]
    took = "" if result["seconds"] is None else f", {result['seconds']:.0f} s"
    failed = f"; tasks failed: {result['task_error']}" if result.get("task_error") else ""
    return f"{named(job)}: perplexity {', '.join(shown)}{took}{failed}"
