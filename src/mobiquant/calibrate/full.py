"""The `full` recipe: `fast` as a start, then training.

1. nested block training, block by block over all depths (`nested`);
2. end-to-end training against the float model (`distill`);
3. routers and thresholds anew, by regression on the trained codes (`routers`, `thresholds`).

Stages are left out by giving them no steps. With a work folder a killed run goes on where it was and ends with the same bytes.
"""

import time
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from mobiquant import blocks
from mobiquant.calibrate import distill, fast, nested
from mobiquant.calibrate.latent import Depth, open_latents
from mobiquant.calibrate.nested import NestedStage
from mobiquant.calibrate.streams import Stage, Streams
from mobiquant.calibrate.thresholds import Measured
from mobiquant.calibrate.work import Work
from mobiquant.config import Calibration, Checkpoint, Format, Training
from mobiquant.linear import MobiLinear, Precision
from mobiquant.progress import Report, by_width

# of the time that is left after `fast`: block training gets a third, the rest is end to end but for what routers take
BLOCK_SHARE, DISTILL_SHARE = 0.33, 0.9
TRIAL_STEPS = 3


class Plan:
    """Steps of each stage, cut to what a budget of minutes allows; decided once and kept in the work folder."""

    def __init__(self, training: Training, started: float, work: Work):
        self.training, self.started, self.work = training, started, work

    def steps(self, stage: str, asked: int, share: float, units: int, seconds_of_a_step: Any) -> int:
        """Steps for each of `units` (blocks, or the one model); `seconds_of_a_step` is called only where a budget bounds."""
        kept = self.work.load(f"steps-{stage}")
        if kept is not None:
            return int(kept[1])
        if self.training.budget_minutes is not None and asked:
            left = self.training.budget_minutes * 60 - (time.monotonic() - self.started)
            asked = max(0, min(asked, int(left * share / (seconds_of_a_step() * units))))
        self.work.save(f"steps-{stage}", dict, asked)
        return asked


def train(
    model: PreTrainedModel,
    original: PreTrainedModel,
    windows: Int[Tensor, "W L"],
    tokens: Int[Tensor, "S L"],
    stored: Checkpoint,
    settings: Calibration,
    training: Training,
    device: torch.device,
    work: Work,
    started: float,
    progress: Report,
) -> tuple[Checkpoint, list[dict[str, Any]]]:
    """Train the layers of a model that `fast` has quantised; returns what to store and the log.

    `original` is the float model, `tokens` are for blocks and routers, `windows` (all of the text) for the end-to-end stage.
    """
    form, plan, log = stored.format, Plan(training, started, work), []
    root, originals = blocks.find_blocks(original)
    stack: nn.ModuleList = model.get_submodule(root)  # type: ignore[assignment]
    hidden, calls = blocks.capture(original, tokens, device, settings.batch)
    if training.block_steps:
        log += _blocks(originals, stack, hidden, calls, form, settings, plan, device, progress)
    if training.distill_steps:
        log += _end_to_end(model, original, stack, windows, form, settings, plan, device, progress)
    fitted, explained = _routers(originals, stack, root, hidden, calls, stored, settings, device, progress)
    measured = Measured(hidden, form, fitted)
    measured.run(stack, calls, device, progress)
    return replace(stored, thresholds=measured.table()), log + explained


def _blocks(
    originals: nn.ModuleList,
    stack: nn.ModuleList,
    hidden: Float[Tensor, "S L D"],
    calls: blocks.Calls,
    form: Format,
    settings: Calibration,
    plan: Plan,
    device: torch.device,
    progress: Report,
) -> list[dict[str, Any]]:
    """Train every block in order."""

    def trial() -> float:
        streams = Streams(hidden, nested.readings(form), settings.batch, device)
        stage = NestedStage(originals[0], stack[0], 0, calls, device)
        begun = time.monotonic()
        nested.train_block(stage, streams, form, replace(plan.training, block_steps=TRIAL_STEPS), settings.seed)
        return (time.monotonic() - begun) / TRIAL_STEPS

    steps = plan.steps("blocks", plan.training.block_steps, BLOCK_SHARE, len(stack), trial)
    training, log = replace(plan.training, block_steps=steps), []
    streams = Streams(hidden, nested.readings(form), settings.batch, device)
    for index, (original, quantised) in enumerate(zip(originals, stack, strict=True)):
        stage = NestedStage(original, quantised, index, calls, device)
        entries = nested.block(stage, streams, form, training, settings.seed, plan.work)
        log += entries
        nested.finish_block(stage, quantised)
        last = {entry["bits"]: entry["last"] for entry in entries if entry["last"] is not None}
        progress("training blocks", index + 1, len(stack), f"error {by_width(last)}")
    return log


def _end_to_end(
    model: PreTrainedModel,
    original: PreTrainedModel,
    stack: nn.ModuleList,
    windows: Int[Tensor, "W L"],
    form: Format,
    settings: Calibration,
    plan: Plan,
    device: torch.device,
    progress: Report,
) -> list[dict[str, Any]]:
    """Train all layers against the float model, then put them back."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, MobiLinear)}
    count = sum(layer.in_features * layer.out_features for layer in layers.values())
    depth, dtype = Depth(1), next(model.parameters()).dtype
    latents = open_latents(model, depth)
    weights = distill.fits(count, device)
    if not weights:
        distill.notice_of_fallback(count, device)
        distill.recompute_blocks(stack)
    model.float().to(device).requires_grad_(False)
    original.to(device).requires_grad_(False)
    for latent in latents.values():
        latent.requires_grad_(True)
    everything = (model, original, latents, depth, windows.to(device), form)

    def trial() -> float:
        begun = time.monotonic()
        distill.distill(
            *everything, replace(plan.training, distill_steps=TRIAL_STEPS, position_rate=0.0, scale_rate=0.0, zero_rate=0.0),
            settings.seed, Work(None, {}, False), weights, lambda *_: None,
        )  # fmt: skip
        return (time.monotonic() - begun) / TRIAL_STEPS

    steps = plan.steps("distillation", plan.training.distill_steps, DISTILL_SHARE, 1, trial)
    training = replace(plan.training, distill_steps=steps)
    log = distill.distill(*everything, training, settings.seed, plan.work, weights, progress)
    if not weights:
        distill.keep_blocks(stack)
    for name, latent in latents.items():
        latent.to(torch.device("cpu"))
        latent.store(layers[name])
        blocks.replace(model, name, layers[name])
    model.to(dtype).to("cpu")
    original.to("cpu")
    return log


class _Pair(Stage):
    """A quantised block beside its float original."""

    def __init__(self, original: nn.Module, quantised: nn.Module, index: int, calls: blocks.Calls, device: torch.device):
        self.index, self.calls, self.device = index, calls, device
        float_stage = Stage(original, index, calls, Precision((1,)), device)
        form = next(iter(self.mobilinears(quantised).values())).format
        self.precision = Precision(form.widths)
        self.teacher = float_stage.teacher
        self.student = Stage(quantised, index, calls, self.precision, device).teacher


def _routers(
    originals: nn.ModuleList,
    stack: nn.ModuleList,
    root: str,
    hidden: Float[Tensor, "S L D"],
    calls: blocks.Calls,
    stored: Checkpoint,
    settings: Calibration,
    device: torch.device,
    progress: Report,
) -> tuple[list[fast.Fitted], list[dict[str, Any]]]:
    """Fit all routers to the codes as they are now."""
    form, fitted = stored.format, []
    streams = Streams(hidden, fast.readings(form), settings.batch, device)
    for index, (original, quantised) in enumerate(zip(originals, stack, strict=True)):
        stage, head = _Pair(original, quantised, index, calls, device), f"{root}.{index}."
        for names in [[n.removeprefix(head) for n in names] for names in stored.inputs if names[0].startswith(head)]:
            layers = [stage.student.get_submodule(name) for name in names]
            weight = torch.cat([blocks.weight_of(stage.teacher.get_submodule(name)) for name in names])
            depths = range(1, len(form.slices) + 1)
            reads = torch.stack([torch.cat([layer.packed().read(d) for layer in layers]) for d in depths])  # type: ignore
            with torch.no_grad():
                fitted += fast.fit_routers(names, layers, streams.sample(stage, names[0]), weight, reads, form)  # type: ignore
            for name, layer in zip(names, layers, strict=True):
                if layer.router_names:
                    quantised.get_submodule(name).set_router(layer.get_router())  # type: ignore[operator]
        streams.advance(stage)
        progress("fitting routers", index + 1, len(stack))
    log = [{"input": one.names[0], "router_explains": round(one.explains, 4)} for one in fitted]
    return fitted, log
