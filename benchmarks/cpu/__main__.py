"""Time of single layers on a CPU at every width, beside torch: `python benchmarks/cpu -o docs/results`.

Random weights at the layer shapes of Llama-3-8B and a square one. Weights are rotated through more memory than the caches are
likely to keep; what is timed is one call of `mobiquant::product` or of `F.linear`, and the median of the calls is shown.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from mobiquant.kernels.cpu import library
from mobiquant.kernels.cpu.product import product

SHAPES = {
    "square": (4096, 4096),
    "Llama-3-8B query, output": (4096, 4096),
    "Llama-3-8B key, value": (1024, 4096),
    "Llama-3-8B gate, up": (14336, 4096),
    "Llama-3-8B down": (4096, 14336),
}
SLICES, WIDTHS, GROUP = (2, 1, 1, 2, 2), (2, 3, 4, 6, 8), 64
ROTATED = 4e8  # bytes of weights at 8 bits


def stored(rows: int, columns: int) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Random planes, scales and zero points."""
    planes = [torch.randint(0, 256, (width, rows, columns // 8), dtype=torch.uint8) for width in SLICES]
    shape = rows, columns // GROUP
    return planes, (torch.rand(shape) * 0.01 + 0.01).half(), torch.randint(60, 200, shape, dtype=torch.uint8)


def median(call: Any, copies: int, repetitions: int) -> float:
    """Median milliseconds of `call(number of the copy)`."""
    times = []
    for turn in range(repetitions + 2):
        started = time.perf_counter()
        call(turn % copies)
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times[2:])


def measure(rows: int, columns: int, tokens: int, repetitions: int) -> dict[str, float]:
    """Milliseconds of one layer by what computes it."""
    copies = max(2, int(ROTATED / (rows * columns)))
    weights, x, found = [stored(rows, columns) for _ in range(copies)], torch.randn(tokens, columns), {}
    for width in WIDTHS:
        bits = torch.full((tokens,), width, dtype=torch.int8)

        def ours(copy: int, bits: torch.Tensor = bits) -> None:
            product(x, *weights[copy], bits, SLICES[0], GROUP, columns)

        found[f"{width} bits"] = median(ours, copies, repetitions)
    del weights
    for dtype in (torch.float32, torch.bfloat16):
        few = max(2, copies // (4 if dtype == torch.float32 else 2))
        dense, given = [torch.randn(rows, columns).to(dtype) for _ in range(few)], x.to(dtype)
        found[f"torch {str(dtype)[6:]}"] = median(lambda copy, d=dense, g=given: linear(g, d[copy]), few, repetitions)
        del dense
    return found


def table(results: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The results as markdown."""
    names = list(results[0]["ms"])
    lines = [
        f"Milliseconds of one layer, {about['threads']} threads, {about['instructions']}, groups of {GROUP} (medians).",
        "",
    ]
    lines += [f"| layer | rows, columns | tokens | {' | '.join(names)} |", f"|---|---|---|{'---|' * len(names)}"]
    for row in results:
        cells = " | ".join(f"{row['ms'][name]:.3g}" for name in names)
        lines.append(f"| {row['layer']} | {row['rows']}, {row['columns']} | {row['tokens']} | {cells} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write JSON and a table where a folder is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="folder for cpu-layers.json and cpu-layers.md")
    parser.add_argument("--tokens", default="1,8,64", help="tokens of a call, with commas")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=30)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if library.load() is None:
        parser.error("the CPU kernels are not built: install a C++ compiler and mobiquant again")
    results = []
    for name, (rows, columns) in SHAPES.items():
        for tokens in [int(part) for part in asked.tokens.split(",")]:
            ms = measure(rows, columns, tokens, asked.repetitions)
            results.append({"layer": name, "rows": rows, "columns": columns, "tokens": tokens, "ms": ms})
            print(name, tokens, {key: round(value, 3) for key, value in ms.items()}, flush=True)
    about = {
        "threads": asked.threads,
        "instructions": library.instructions()[-1],
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    if asked.output:
        asked.output.mkdir(parents=True, exist_ok=True)
        (asked.output / "cpu-layers.json").write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
        (asked.output / "cpu-layers.md").write_text(table(results, about))
    print(table(results, about))


if __name__ == "__main__":
    main()
