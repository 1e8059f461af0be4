"""Times on a GPU: medians over replays of CUDA graphs, by events; and what the machine is."""

import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

REPLAYS, WARM_UP = 21, 3


def captured(work: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """`work` as one CUDA graph, run before so that everything is compiled; as it is on a CPU."""
    work()
    if device.type != "cuda":
        return work
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = work()

    def replay() -> Any:
        graph.replay()
        return held

    return replay


def median(work: Callable[[], Any], device: torch.device, repetitions: int = REPLAYS) -> float:
    """Median microseconds of one call."""
    times = []
    for turn in range(WARM_UP + repetitions):
        if device.type == "cuda":
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            work()
            after.record()
            torch.cuda.synchronize()
            taken = before.elapsed_time(after) * 1e3
        else:
            started = time.perf_counter()
            work()
            taken = (time.perf_counter() - started) * 1e6
        times += [taken] if turn >= WARM_UP else []
    return statistics.median(times)


def copy_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes a second of a copy on the device, read and written bytes both counted; random data."""
    source = torch.randint(0, 255, (size if device.type == "cuda" else 2**20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2e6 * source.numel() / median(lambda: target.copy_(source), device)


def machine(device: torch.device) -> dict[str, str]:
    """Device, driver, clocks as they are at the moment, and versions."""
    found = {"torch": torch.__version__, "cuda": str(torch.version.cuda)}
    if device.type == "cuda":
        query = [
            "nvidia-smi",
            f"--id={device.index or 0}",
            "--query-gpu=name,driver_version,clocks.sm,clocks.mem",
            "--format=csv,noheader",
        ]
        said = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().split(", ")
        names = ("device", "driver", "clock", "memory clock")
        found |= (
            dict(zip(names, said, strict=False)) if len(said) == len(names) else {"device": torch.cuda.get_device_name(device)}
        )
    return found
