"""The command: `python benchmarks/kernels -o docs/results`."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import clock
import layers
import report
import torch
import typer
import whole
from rich.console import Console
from shapes import MODELS

from mobiquant.config import InputError
from mobiquant.console import numbers
from mobiquant.kernels.cuda.product import missing

err = Console(stderr=True)


def check(device: str, model: str, whole_model: str | None) -> torch.device:
    """The device; raises InputError where there is none or a model is not known."""
    for name in (model, whole_model):
        if name is not None and name not in MODELS:
            raise InputError(f"model '{name}' has no shapes here: choose from {', '.join(MODELS)}")
    if not torch.cuda.is_available() or not device.startswith("cuda"):
        raise InputError(
            "the GPU kernels are measured on CUDA, and there is no such device: give --device cuda on a machine with one"
        )
    made = torch.device(device)
    made = torch.device("cuda", made.index or 0)
    if reason := missing(made.index):
        raise InputError(reason)
    return made


def run(
    device: torch.device,
    model: str,
    tokens: tuple[int, ...],
    routers: str,
    whole_model: str | None,
    prompt: int,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], list[layers.Row], list[whole.Speed]]:
    """Measure everything; lines of progress go to `say`."""
    found: dict[str, Any] = {"model": model, "whole": whole_model, "routers": routers, "copy": clock.copy_bandwidth(device)}
    shape, rows = MODELS[model], []

    def add(row: layers.Row | None) -> None:
        if row is not None:
            rows.append(row)
            bits = "" if row.bits is None else f", {row.bits:.2f} bits"
            say(f"{row.name}, {row.tokens} tokens{bits}: {row.microseconds:.0f} us")

    stack = layers.Stack(shape, device, routers)
    for count in tokens:
        if count <= 16:
            for row in layers.decode(stack, count, (2, 3, 4, 8), (2.5, 3.0, 4.0)):
                add(row)
        else:
            for row in layers.prefill(stack, count, (2, 3, 4)):
                add(row)
    # clocks while the device is busy
    found["machine"] = clock.machine(device)
    inputs = {count: stack.inputs(count) for count in tokens}
    del stack
    with layers.dense(shape, device) as weights:
        for count in tokens:
            add(layers.bf16(weights, inputs[count], device, shape.weights))
            add(layers.tinygemm(weights, inputs[count], device, shape.weights) if count <= 16 else None)
    speeds = whole.measure(MODELS[whole_model], device, prompt, (2, 3, 4), 4, routers) if whole_model else []
    for one in speeds:
        say(f"{whole_model}, {one.name}: {one.tokens_per_second:.1f} tokens/s")
    return found, rows, speeds


def kernels(
    model: Annotated[str, typer.Option(help=f"Shapes of the layers: {', '.join(MODELS)}.")] = "llama-2-7b",
    tokens: Annotated[str, typer.Option(help="Tokens of a product, with commas.")] = "1,8,16,64,512",
    routers: Annotated[str, typer.Option(help="What routers read: per-block or per-input.")] = "per-block",
    whole_model: Annotated[str, typer.Option("--whole", help="Model whose step is timed too, or none.")] = "llama-3-8b",
    prompt: Annotated[int, typer.Option(help="Tokens before those that are timed.")] = 512,
    device: Annotated[str, typer.Option(help="Where to measure: cuda, cuda:1.")] = "cuda",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the page, the picture and the figures.")] = Path(
        "results"
    ),
    name: Annotated[str, typer.Option(help="Name of these three files, which are replaced.")] = "kernels",
) -> None:
    """Time the GPU kernels: all linear layers of a model at several widths and batches, and a whole step of one.

    Example: python benchmarks/kernels --model llama-2-7b --tokens 1,8 -o docs/results
    """
    chosen = None if whole_model == "none" else whole_model
    if routers not in ("per-block", "per-input"):
        raise InputError(f"routers '{routers}' are not timed here: choose per-block or per-input")
    place = check(device, model, chosen)
    say = lambda line: err.print(line, markup=False, highlight=False)  # noqa: E731
    found, rows, speeds = run(place, model, tuple(numbers(tokens, "tokens", "1,8,512", int)), routers, chosen, prompt, say)
    command = f"python benchmarks/kernels --model {model} --tokens {tokens} --routers {routers} --whole {whole_model}"
    say(f"written: {report.write(output, name, found, rows, speeds, command)}")


def main() -> None:
    """Entry point; bad input is one sentence and exit code 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(kernels)
    try:
        app()
    except InputError as error:
        err.print(f"kernels: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
