"""The `full` recipe: `fast` as a start, then training.

1. nested block training, block by block over all depths (`nested`), by default only where the next stage cannot train weights:
   it costs as much time as that and gains less (`docs/results/full.md`);
2. end-to-end training against the float model (`distill`);
3. what each slice of each layer is worth to the model (`sensitivity`), then routers anew, by regression on the trained codes
   (`routers`);
4. routers trained end to end (`routing`), then the table of thresholds (`thresholds`).

Part of the text can be held out of end-to-end training, for routers and thresholds alone: what codes know by heart says little
about which tokens need more bits elsewhere.

Stages are left out by giving them no steps. With a work folder a killed run goes on where it was and ends with the same bytes.
"""

import time
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mobiquant import blocks
from mobiquant.calibrate import distill, fast, nested, routing, sensitivity, thresholds
from mobiquant.calibrate.latent import Depth, open_latents
from mobiquant.calibrate.nested import NestedStage
from mobiquant.calibrate.passes import Pair
from mobiquant.calibrate.streams import First, Stage, Streams
from mobiquant.calibrate.work import Work
from mobiquant.config import Calibration, Checkpoint, Format, Training
from mobiquant.knob import Precision
from mobiquant.linear import mobilinears
from mobiquant.progress import Report, by_width

# of the time that is left before each stage: the end-to-end stages leave some to what follows
BLOCK_SHARE, DISTILL_SHARE, ROUTING_SHARE = 0.33, 0.8, 0.6
TRIAL_STEPS = 4
# steps for each block where the end-to-end stage cannot train weights
BLOCK_STEPS = 100
# sequences that routers are fitted to
ROUTED = 32
# windows kept from the training of codes; a text that gives fewer is used for everything
LEAST_HELD = 32


def held_out(windows: Int[Tensor, "W L"], share: float) -> Bool[Tensor, " W"]:
    """Which windows are kept for the routers: every so many-th one, or none where they would be too few."""
    every = round(1 / share) if share else 0
    kept = torch.zeros(len(windows), dtype=torch.bool)
    if every and len(windows) // every >= LEAST_HELD:
        kept[every - 1 :: every] = True
    return kept


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


@dataclass(frozen=True)
class Run:
    """One run of the recipe on a model that `fast` has quantised.

    `tokens` are for blocks, `windows` are what the end-to-end stages draw from; routers see those that are held out of these.
    """

    pair: Pair
    stored: Checkpoint
    windows: Int[Tensor, "W L"]
    tokens: Int[Tensor, "S L"]
    settings: Calibration
    plan: Plan
    device: torch.device
    progress: Report

    @property
    def form(self) -> Format:
        """How weights are stored."""
        return self.stored.format

    def train(self) -> tuple[Checkpoint, list[dict[str, Any]]]:
        """Train the layers of the student; returns what to store and the log."""
        log: list[dict[str, Any]] = []
        if self.block_steps:
            log += self._blocks(*self._capture(self.tokens))
        if self.plan.training.distill_steps:
            log += self._end_to_end()
        fitted = self._routers()
        log += fast.log_of(fitted)
        if self.plan.training.routing_steps:
            fitted, more = self._train_routers(fitted)
            log += more
        hidden, calls = self._capture(thresholds.beginnings(self.unseen, self.device))
        measured = thresholds.Measured(hidden, self.form, fitted, self.device)
        measured.run(self.pair.stack, calls, self.progress)
        return replace(self.stored, thresholds=measured.table()), log

    @cached_property
    def held(self) -> Bool[Tensor, " W"]:
        """Which windows codes are not trained on."""
        return held_out(self.windows, self.plan.training.held_out)

    @property
    def unseen(self) -> Int[Tensor, "S L"]:
        """Windows for the start of routers and for thresholds."""
        return self.windows[self.held] if self.held.any() else self.tokens

    @property
    def block_steps(self) -> int:
        """Steps asked for each block."""
        return block_steps(self.plan.training, self.weights, self.device)

    @property
    def weights(self) -> int:
        """Quantised weights of the model."""
        return sum(layer.in_features * layer.out_features for layer in mobilinears(self.pair.student).values())

    def _capture(self, tokens: Int[Tensor, "S L"]) -> tuple[Float[Tensor, "S L D"], blocks.Calls]:
        """States of the float model before the first block, and how blocks are called."""
        return blocks.capture(self.pair.teacher, tokens, self.device, self.settings.batch)

    def _blocks(self, hidden: Float[Tensor, "S L D"], calls: blocks.Calls) -> list[dict[str, Any]]:
        """Train every block in order."""
        form, plan, device, seed = self.form, self.plan, self.device, self.settings.seed
        pairs = list(zip(self.pair.originals, self.pair.stack, strict=True))

        def trial() -> float:
            streams = Streams(hidden, nested.readings(form), self.settings.batch, device)
            stage = NestedStage(*pairs[0], 0, calls, device)
            begun = time.monotonic()
            nested.train_block(stage, streams, form, replace(plan.training, block_steps=TRIAL_STEPS), seed)
            return (time.monotonic() - begun) / TRIAL_STEPS

        steps = plan.steps("blocks", self.block_steps, BLOCK_SHARE, len(pairs), trial)
        training, log = replace(plan.training, block_steps=steps), []
        streams = Streams(hidden, nested.readings(form), self.settings.batch, device)
        for index, (original, quantised) in enumerate(pairs):
            stage = NestedStage(original, quantised, index, calls, device)
            entries = nested.block(stage, streams, form, training, seed, plan.work)
            log += entries
            nested.finish_block(stage, quantised)
            last = {entry["bits"]: entry["last"] for entry in entries if entry["last"] is not None}
            self.progress("training blocks", index + 1, len(pairs), f"error {by_width(last)}")
        return log

    def _end_to_end(self) -> list[dict[str, Any]]:
        """Train all layers against the float model, then put them back."""
        model, original, plan, device = self.pair.student, self.pair.teacher, self.plan, self.device
        layers = mobilinears(model)
        weights = distill.fits(self.weights, device)
        if not weights:
            need, instead = (
                self.weights * distill.BYTES_PER_WEIGHT,
                "scales and zero points alone are trained, with blocks recomputed",
            )
            distill.notice("training all weights end to end", need, device, instead)
            distill.recompute_blocks(self.pair.stack)
        depth, dtype = Depth(1), next(model.parameters()).dtype
        # latents are made and stored on the device: unpacking takes long on a host
        nn.Module.to(model, device)
        latents = open_latents(model, depth)
        model.float().requires_grad_(False)
        original.to(device).requires_grad_(False)
        for latent in latents.values():
            latent.requires_grad_(True)
        everything = (self.pair, latents, depth, self.windows[~self.held].to(device), self.form)

        def trial() -> float:
            still = replace(plan.training, distill_steps=TRIAL_STEPS, position_rate=0.0, scale_rate=0.0, zero_rate=0.0)
            ends: list[float] = []
            nothing = Work(None, {}, False)
            distill.distill(*everything, still, self.settings.seed, nothing, weights, lambda *_: ends.append(time.monotonic()))
            # the first report comes before the first step, which compiles and captures: that takes as long as many steps
            return (ends[-1] - ends[1]) / (len(ends) - 2)

        steps = plan.steps("distillation", plan.training.distill_steps, DISTILL_SHARE, 1, trial)
        training = replace(plan.training, distill_steps=steps)
        log = distill.distill(*everything, training, self.settings.seed, plan.work, weights, self.progress)
        if not weights:
            blocks.restore_forward(self.pair.stack)
        for name, latent in latents.items():
            latent.store(layers[name])
            blocks.replace(model, name, layers[name])
        model.to(dtype).to("cpu")
        original.to("cpu")
        return log

    def _offsets(self) -> dict[str, Float[Tensor, " R"]]:
        """What the slices of each input's layers are worth, as offsets of scores."""
        gains = sensitivity.gains(self.pair, self.unseen, self.form, self.device, self.progress)
        layers = dict(self.pair.student.named_modules())
        sizes = {name: layers[name].in_features * layers[name].out_features for name in gains}  # type: ignore[operator]
        return sensitivity.offsets(gains, self.stored.inputs, sizes, self.form)

    def _routers(self) -> list[fast.Fitted]:
        """Fit all routers to the codes as they are now."""
        form, fitted, pair = self.form, [], self.pair
        offsets = self._offsets() if self.plan.training.sensitivity else {}
        tokens = self.unseen
        few = torch.linspace(0, len(tokens) - 1, min(ROUTED, len(tokens))).long()
        hidden, calls = self._capture(tokens[few])
        streams = Streams(hidden, fast.readings(form), self.settings.batch, self.device)
        before: First | None = None
        for index, (original, quantised) in enumerate(zip(pair.originals, pair.stack, strict=True)):
            stage, head = _Pair(original, quantised, index, calls, self.device), f"{pair.root}.{index}."
            stage.before = before
            every = [names for names in self.stored.inputs if names[0].startswith(head)]
            for place, full_names in enumerate(every):
                names = [name.removeprefix(head) for name in full_names]
                layers = [stage.student.get_submodule(name) for name in names]
                weight = torch.cat([blocks.weight_of(stage.teacher.get_submodule(name)) for name in names])
                depths = range(1, len(form.slices) + 1)
                reads = torch.stack([torch.cat([layer.packed().read(d) for layer in layers]) for d in depths])  # type: ignore
                # routers are kept by the layers of the model, not by those of the stage
                kept: Any = [quantised.get_submodule(name) for name in names]
                with torch.no_grad():
                    sample, offset = streams.sample(stage, names[0]), offsets.get(full_names[0])
                    if place == 0:
                        stage.first = First(kept[0], sample)
                    read, holder = stage.router_of(place, kept[0], sample, form)
                    fitted += fast.fit_routers(names, kept, sample, read, holder, weight, reads, form, offset)
            before = stage.first
            streams.advance(stage)
            self.progress("fitting routers", index + 1, len(pair.stack))
        return fitted

    def _train_routers(self, fitted: list[fast.Fitted]) -> tuple[list[fast.Fitted], list[dict[str, Any]]]:
        """Train all routers end to end."""
        plan = self.plan

        def steps(seconds: float) -> int:
            return plan.steps(routing.NAME, plan.training.routing_steps, ROUTING_SHARE, 1, lambda: seconds)

        windows = self.windows[self.held] if self.held.any() else self.windows
        everything = (self.pair, self.stored, fitted, windows, plan.training, steps, self.settings.seed)
        return routing.train(*everything, self.device, plan.work, self.progress)


def block_steps(training: Training, weights: int, device: torch.device) -> int:
    """Steps for each block: what is asked for, or `BLOCK_STEPS` where end-to-end training leaves weights as they are."""
    if training.block_steps is not None:
        return training.block_steps
    return 0 if training.distill_steps and distill.fits(weights, device) else BLOCK_STEPS


class _Pair(Stage):
    """A quantised block beside its float original."""

    def __init__(self, original: nn.Module, quantised: nn.Module, index: int, calls: blocks.Calls, device: torch.device):
        self.index, self.calls, self.device = index, calls, device
        float_stage = Stage(original, index, calls, Precision((1,)), device)
        form = next(iter(mobilinears(quantised).values())).format
        self.precision = Precision(form.widths)
        self.teacher = float_stage.teacher
        self.student = Stage(quantised, index, calls, self.precision, device).teacher
