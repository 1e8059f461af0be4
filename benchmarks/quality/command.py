"""The command `python benchmarks/quality MODEL`: one run, one table, one picture and one JSON file.

Peers make one model for each width, each recipe of ours one checkpoint for all; all calibrate with the same tokens and are
measured by the same code. README.md beside this file says how to get the peers and what to run.
"""

import json
import shlex
import sys
from dataclasses import asdict
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import methods
import picture
import plan
import table
import typer
import zero_shot
from rich.console import Console
from schedule import Schedule

from mobiquant.config import InputError, Training
from mobiquant.console import numbers

out, err = Console(), Console(stderr=True)
KNOWN = f"{methods.FLOAT}, {', '.join(methods.PEERS)}; ours: {', '.join(methods.RECIPES)}"
WORK, OUTPUT = Path("quality-work"), Path("docs/results")
FETCHED = ("wikitext2", "c4", "ptb")
TEXT = "builtin, wikitext2, c4, ptb, a .txt or .jsonl file, or wikitext2:FILE"


def words(text: str) -> list[str]:
    """'rtn, gptq' -> ['rtn', 'gptq']."""
    return [part.strip() for part in text.split(",") if part.strip()]


def several(text: str, kind: Any = float, what: str = "bits") -> list[Any]:
    """As `numbers`, but there may be none."""
    return numbers(",".join(words(text)), what, "2,3,4", kind) if words(text) else []


def pairs(options: list[str]) -> dict[str, Path]:
    """NAME=DIR -> folder by name; raises InputError on what is none or does not exist."""
    found: dict[str, Path] = {}
    for option in options:
        name, equals, folder = option.partition("=")
        if not equals or not (Path(folder) / "config.json").is_file():
            raise InputError(f"checkpoint '{option}' is not usable: give NAME=DIR with the folder of a mobiquant checkpoint")
        found[name] = Path(folder)
    return found


def variants(full_args: str, samples: int) -> dict[str, tuple[str, ...]]:
    """Arguments of the ablations of `full`, whose own are `full_args`."""
    words = shlex.split(full_args)
    given = {word: value for word, value in pairwise(words) if word in ("--distill-steps", "--samples")}
    steps = int(given.get("--distill-steps", Training().distill_steps))
    found = methods.ablations(int(given.get("--samples", samples)), steps)
    return {name: tuple(shlex.split(how)) for name, how in found.items()}


def say(line: str) -> None:
    """A line of progress or of an error, on stderr."""
    err.print(line, markup=False, highlight=False, soft_wrap=True)


def check(settings: plan.Settings, devices: str, task_data: Path | None) -> list[str]:
    """The devices to use, tasks made ready; raises InputError on a device, model, text, package or task that will not do."""
    from mobiquant import calibrate, data, integration

    places = [calibrate.pick_device("auto").type] if devices == "auto" else words(devices)
    if not places:
        raise InputError("there is no device to run on: give --devices cpu, or cuda:0,cuda:1")
    for place in places:
        calibrate.pick_device(place)
    integration.load_config(settings.model)
    for name in (*settings.calibration, *settings.texts):
        # what is fetched from a hub is left to the jobs
        if name not in FETCHED:
            data.load_text(name, "measure")
    if settings.tasks and find_spec("lm_eval") is None:
        raise InputError("tasks need the lm-eval package: pip install 'mobiquant[tasks]', or leave out --tasks")
    if settings.task_folder is not None and task_data is not None:
        zero_shot.prepare(settings.tasks, task_data, Path(settings.task_folder))
    return places


def command_line() -> str:
    """This call without the folders of this machine."""

    def bare(word: str) -> str:
        if " " in word:
            return " ".join(bare(part) for part in word.split(" "))
        name, equals, rest = word.rpartition("=")
        return name + equals + plan.bare(rest)

    return "python benchmarks/quality " + shlex.join(bare(word) for word in sys.argv[1:])


def printable(settings: plan.Settings) -> dict[str, Any]:
    """The settings without the folders of this machine."""
    values = asdict(settings) | {"model": plan.bare(settings.model)}
    values |= {name: [plan.bare(text) for text in getattr(settings, name)] for name in ("calibration", "texts")}
    return {name: value for name, value in values.items() if name not in ("stamps", "task_folder")}


def write(output: Path, name: str, results: list[dict[str, Any]], settings: plan.Settings, bits: list[int]) -> Path:
    """Write `NAME.md`, `NAME.png` and `NAME.json`; returns the path of the page."""
    output.mkdir(parents=True, exist_ok=True)
    about = printable(settings) | {"command": command_line()}
    kept = []
    for result in results:
        job = result["made"]["job"]
        job = {**job, "arguments": [plan.bare(word) for word in job["arguments"]]}
        kept.append({"job": job, **{name: value for name, value in result.items() if name != "made"}})
    (output / f"{name}.json").write_text(json.dumps({**about, "results": kept}, indent=1) + "\n")
    found = table.lines(results)
    picture.draw(found, output / f"{name}.png", about["model"])
    page = output / f"{name}.md"
    page.write_text(table.markdown(results, about, bits, f"{name}.png"))
    return page


def compare(
    model: Annotated[str, typer.Argument(help="A hub id, a folder, a .gguf file, or smollm2-135m.")],
    methods_: Annotated[str, typer.Option("--methods", help=f"What to compare, with commas: {KNOWN}.")] = ",".join(
        (methods.FLOAT, *methods.PEERS, *methods.RECIPES)
    ),
    bits: Annotated[str, typer.Option(help="Widths of the peers' models, with commas.")] = "2,3,4",
    fixed: Annotated[str, typer.Option(help="Widths to read ours at, the same for every token.")] = "2,3,4,6,8",
    routed: Annotated[
        str, typer.Option(help="Average bits to read ours at by its routers.")
    ] = "2.25,2.5,2.75,3,3.25,3.5,4.5,5,7",
    calibration: Annotated[list[str] | None, typer.Option(help=f"Calibration text, again for more: {TEXT} [builtin].")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a calibration window.")] = 2048,
    seeds: Annotated[
        str, typer.Option(help="Seeds of ours, with commas; peers calibrate with the windows of the first.")
    ] = "0",
    group_size: Annotated[int, typer.Option(help="Weights that share a scale.")] = 64,
    text: Annotated[list[str] | None, typer.Option(help=f"Text to measure on, again for more: {TEXT} [builtin].")] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window to measure on.")] = 2048,
    max_windows: Annotated[int | None, typer.Option(help="Measure no more than the first N windows of each text.")] = None,
    tasks: Annotated[str, typer.Option(help="Zero-shot tasks of lm-eval, with commas.")] = "",
    task_data: Annotated[Path | None, typer.Option(help="Folder with the items of piqa and arc_easy, for use offline.")] = None,
    task_bits: Annotated[str, typer.Option(help="Budgets of ours to run tasks at; all where not given.")] = "",
    limit: Annotated[int | None, typer.Option(help="Run no more than the first N items of each task.")] = None,
    checkpoint: Annotated[list[str] | None, typer.Option(help="NAME=DIR: measure a mobiquant checkpoint too.")] = None,
    fast_args: Annotated[str, typer.Option(help="More arguments of mobiquant quantize for the recipe fast.")] = "",
    paper_args: Annotated[str, typer.Option(help="The same for the recipe paper.")] = "",
    full_args: Annotated[str, typer.Option(help="The same for the recipe full, such as '--block-steps 0'.")] = "",
    ablations: Annotated[bool, typer.Option(help="Run full once for each thing left out of it or set otherwise.")] = False,
    devices: Annotated[str, typer.Option(help="Devices with commas, a job at a time on each: cpu, or cuda:0,cuda:1.")] = "auto",
    job_minutes: Annotated[float, typer.Option(help="A job that takes longer has failed.")] = 180.0,
    work: Annotated[Path, typer.Option(help="Folder for results of jobs, logs and checkpoints; a call goes on there.")] = WORK,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the page, the picture and the figures.")] = OUTPUT,
    name: Annotated[str, typer.Option(help="Name of these three files, which are replaced.")] = "quality",
) -> None:
    """Compare quantisers on one model: perplexity, divergence from the float model, stored bits, seconds, accuracy.

    Example: python benchmarks/quality smollm2-135m --methods float,rtn,hqq,fast --max-windows 4
    """
    extra = dict(zip(methods.RECIPES, (fast_args, paper_args, full_args), strict=True))
    whole, drawn = several(bits, int), several(seeds, int, "seeds")
    jobs = plan.jobs(
        words(methods_), whole, drawn, pairs(checkpoint or []),
        {name: tuple(shlex.split(given)) for name, given in extra.items()}, variants(full_args, samples) if ablations else {},
    )  # fmt: skip
    folder = work.resolve() / "zero-shot" if tasks and task_data else None
    calibration, text = calibration or ["builtin"], text or ["builtin"]
    settings = plan.Settings(
        model, tuple(calibration), samples, sequence_length, drawn[0], group_size, tuple(text), window, max_windows,
        tuple(several(fixed)), tuple(several(routed)), tuple(words(tasks)), tuple(several(task_bits)), folder and str(folder),
        limit, tuple(plan.stamp(name) for name in (model, *calibration, *text)),
    )  # fmt: skip
    places = check(settings, devices, task_data)
    results = Schedule(settings, work.resolve(), job_minutes, say).run(jobs, places)
    page = write(output, name, results, settings, whole)
    out.print(table.everything(table.lines(results)), markup=False, highlight=False, soft_wrap=True)
    say(f"written: {page}")
    if all(result["error"] for result in results):
        raise typer.Exit(1)


def main() -> None:
    """Entry point; bad input is one sentence and exit code 2."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(compare)
    try:
        app()
    except InputError as error:
        say(f"quality: {error}")
        sys.exit(2)
