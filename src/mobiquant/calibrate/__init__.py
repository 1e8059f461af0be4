"""From a float model to a quantised one: the block loop that closed recipes share, and `quantize`, the public call."""

import platform
import time
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from mobiquant import blocks, budget, data, integration, matmul, quantizer
from mobiquant.calibrate import fast, full, paper, thresholds, work
from mobiquant.calibrate.passes import Pair
from mobiquant.calibrate.streams import First, Stage, Streams
from mobiquant.calibrate.work import Work
from mobiquant.config import BETWEEN, Calibration, Checkpoint, Format, InputError, Training, default_routers
from mobiquant.knob import Precision
from mobiquant.linear import mobilinears
from mobiquant.progress import Report, bars


def quantize(
    model: str | Path | PreTrainedModel,
    *,
    calibration: str | Sequence[str] = "builtin",
    recipe: str = "fast",
    tokenizer: Any = None,
    format: Format | None = None,
    device: str | torch.device = "auto",
    training: Training | None = None,
    work_dir: str | Path | None = None,
    resume: bool = False,
    progress: Report | None = None,
    **settings: Any,
) -> PreTrainedModel:
    """Quantise a causal language model into one that runs at every precision.

    `model` is a hub id, a folder, a `.gguf` file, `smollm2-135m`, or a loaded model (changed in place; then give its
    `tokenizer`). `calibration` names a text (`data.py`), or several whose windows are drawn alike, `format` how weights are
    stored, `settings` are the fields of `config.Calibration` such as `samples`, `sequence_length` and `seed`; `progress` is
    called with the stage, steps done and steps in all (and by the full recipe with a text of its losses), by default for bars
    on a terminal. `training`, `work_dir` and `resume` are for the full recipe: how it trains, where it keeps what is done, and
    whether to go on with what a killed run has kept there.
    Returns the model on the CPU at full precision; its `save_pretrained` writes the checkpoint. Raises InputError on bad input.
    """
    started = time.monotonic()
    if recipe != "full" and (training or work_dir or resume):
        raise InputError(f"recipe '{recipe}' has no training to keep or go on with: use recipe full")
    # before anything takes time
    work.check(None if work_dir is None else Path(work_dir), resume)
    form, target = format or Format(routers=default_routers(recipe)), pick_device(device)
    if recipe == "paper" and form.routers == "per-block":
        raise InputError("recipe paper trains routers block by block: give it routers per-input or per-linear")
    names = [calibration] if isinstance(calibration, str) else list(calibration)
    chosen = Calibration(recipe=recipe, text=BETWEEN.join(names), **settings).resolved(form.slices, target.type == "cpu")
    texts = {name: data.load_text(name, "calibrate") for name in names}
    # codes, routers and thresholds are fitted to what is stored, not to how one backend rounds activations
    with matmul.exact(), nullcontext(progress) if progress else bars() as report:
        report("loading model and text", 0, 1)
        loaded, tokenizer = _float(model, tokenizer)
        every = data.windows_of_all(texts, tokenizer, chosen.sequence_length or 0)
        tokens = data.sample(every, chosen.samples or 0, chosen.seed)
        report("loading model and text", 1, 1)
        if recipe != "full":
            stored, log = run(loaded, tokens, form, chosen, target, report)
        else:
            how = training or Training()
            plan = {"model": work.digest(loaded.state_dict()), "text": work.digest({"": every}), "format": asdict(form)}
            # the text counts by its tokens, wherever its file lies
            plan |= {"settings": _kept(chosen) | {"text": ""}, "training": asdict(how), "versions": versions()}
            kept = Work(None if work_dir is None else Path(work_dir), plan, resume)
            stored, log = _run_full(loaded, every, tokens, form, chosen, how, target, kept, started, tokenizer, report)
    quantizer.make_quantized(loaded, stored, tokenizer, log)
    return loaded


def _float(model: str | Path | PreTrainedModel, tokenizer: Any) -> tuple[PreTrainedModel, Any]:
    """The float model and the tokenizer that go by a name, or those that are given."""
    if not isinstance(model, PreTrainedModel):
        return (integration.load_float(model), tokenizer) if tokenizer else integration.load_float_and_tokenizer(model)
    if tokenizer is None:
        raise InputError("a loaded model needs its tokenizer to read calibration text: give tokenizer=")
    integration.check_float(model, model.name_or_path)
    return model, tokenizer


def _run_full(
    model: PreTrainedModel,
    every: Int[Tensor, "W L"],
    tokens: Int[Tensor, "S L"],
    form: Format,
    settings: Calibration,
    training: Training,
    device: torch.device,
    work: Work,
    started: float,
    tokenizer: Any,
    progress: Report,
) -> tuple[Checkpoint, list[dict[str, Any]]]:
    """`fast`, or what a killed run has kept of it, then training; the layers of `model` are replaced."""
    windows = every if training.whole_text else tokens
    original = deepcopy(model)
    start = None if work.folder is None else work.folder / "fast"
    if start is not None and start.is_dir():
        known = integration.load(start)
        for name, layer in mobilinears(known).items():
            blocks.replace(model, name, layer)
        stored, log = budget.checkpoint_of(known), []
    else:
        stored, log = run(model, tokens, form, replace(settings, recipe="fast"), device, progress, route=False)
        trained = {"training": asdict(training), "training_tokens": windows.numel()}
        stored = replace(stored, calibration=provenance(model, tokens, settings) | trained)
        if start is not None:
            copied = deepcopy(model)
            quantizer.make_quantized(copied, stored, tokenizer, log)
            copied.save_pretrained(start)
    plan = full.Plan(training, started, work)
    stored, more = full.Run(Pair.of(model, original), stored, windows, tokens, settings, plan, device, progress).train()
    _wire(model, Precision(form.widths))
    return stored, log + more


def pick_device(device: str | torch.device) -> torch.device:
    """The device of that name; `auto` is CUDA where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    # torch raises RuntimeError, AssertionError or NotImplementedError, by device
    except Exception:
        raise InputError(f"device '{device}' is not available here: choose cpu, or auto for the best there is") from None


def run(
    model: PreTrainedModel,
    tokens: Int[Tensor, "S L"],
    form: Format,
    settings: Calibration,
    device: torch.device,
    progress: Report,
    route: bool = True,
) -> tuple[Checkpoint, list[dict[str, Any]]]:
    """Replace the linear layers in the blocks of `model`; returns what to store and the training log of the recipe.

    `settings` are resolved ones. Codes that will be trained need no routers yet: `route` False leaves them and thresholds out.
    """
    recipe = paper.quantize_block if settings.recipe == "paper" else partial(fast.quantize_block, route=route)
    torch.manual_seed(settings.seed)
    model.eval()
    root, stack = blocks.find_blocks(model)
    count = len(stack)
    progress("reading the model", 0, count)
    hidden, calls = blocks.capture(model, tokens, device, settings.batch)
    short = blocks.capture(model, thresholds.beginnings(tokens, device), device, settings.batch) if route else None
    readings = (paper if settings.recipe == "paper" else fast).readings(form)
    streams = Streams(hidden, readings, settings.batch, device)
    precision, inputs, fitted, skipped = Precision(form.widths), [], [], left_out(model, root)
    begins: list[int] = []
    before: First | None = None
    log: list[dict[str, Any]] = []
    for index, block in enumerate(stack):
        stage = Stage(block, index, calls, precision, device)
        groups = stage.groups(hidden[:1])
        stage.place, stage.before = len(inputs), before
        stage.next_place = len(inputs) + len(groups) if index < count - 1 else None
        unused = set(blocks.linears(stage.teacher)) - {name for names in groups for name in names}
        skipped.update({f"{root}.{index}.{name}": "not used when the block runs" for name in sorted(unused)})
        found, entries = recipe(stage, streams, groups, form, settings)
        fitted += found
        log += [{"block": index, **entry} for entry in entries]
        streams.advance(stage)
        _keep(stage, block)
        before = stage.first
        begins.append(len(inputs))
        inputs += [tuple(f"{root}.{index}.{name}" for name in names) for names in groups]
        progress("quantising blocks", index + 1, count)
    table = ()
    if short is not None:
        measured = thresholds.Measured(short[0], form, fitted, device)
        measured.run(stack, short[1], progress)
        table = measured.table()
    _wire(stack, precision)
    made_from = provenance(model, tokens, settings)
    return Checkpoint(form, tuple(inputs), tuple(begins), table, skipped, made_from, versions()), log


def _keep(stage: Stage, block: torch.nn.Module) -> None:
    """Move the quantised layers of a finished stage into the model, on the host."""
    for name, layer in mobilinears(stage.student).items():
        bias = getattr(block.get_submodule(name), "bias", None)
        if bias is not None and layer.bias is not None:
            # a stage works in fp32, a model keeps its dtype
            layer.bias = layer.bias.to(bias.dtype)
        blocks.replace(block, name, layer.cpu())


def _wire(stack: torch.nn.Module, precision: Precision) -> None:
    """Give all quantised layers the one precision of the model, at full depth, with its counters at zero."""
    precision.set([float("-inf")], [len(precision.widths)])
    precision.depth_shares(reset=True)
    for layer in mobilinears(stack).values():
        layer.precision = precision


def left_out(model: torch.nn.Module, root: str) -> dict[str, str]:
    """Matrices that are not quantised, with the reason; embeddings are not listed."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        inside = name.startswith(root + ".")
        matrices = [leaf for leaf, p in module.named_parameters(recurse=False) if p.dim() > 1]
        if not matrices or isinstance(module, torch.nn.Embedding) or (inside and blocks.is_linear(module)):
            continue
        found[name] = f"{type(module).__name__} is not a plain linear layer" if inside else "outside the blocks"
    return found


def provenance(model: PreTrainedModel, tokens: Tensor, settings: Calibration) -> dict[str, Any]:
    """What the checkpoint was made from and how."""
    kept = _kept(settings)
    text = BETWEEN.join(Path(name).name for name in settings.text.split(BETWEEN))
    digest = f"{zlib.crc32(tokens.contiguous().numpy()):08x}"
    return {**kept, "text": text, "model": Path(model.name_or_path).name, "tokens": tokens.numel(), "tokens_crc32": digest}


def _kept(settings: Calibration) -> dict[str, Any]:
    """The settings that decide what is made; the batch is a matter of memory."""
    return {name: value for name, value in vars(settings).items() if name != "batch"}


def versions() -> dict[str, str]:
    """Versions of what made the checkpoint."""
    found = {"python": platform.python_version()}
    for package in ("mobiquant", "torch", "transformers"):
        try:
            found[package] = metadata.version(package).split("+")[0]
        except metadata.PackageNotFoundError:
            found[package] = "source tree"
    return found
