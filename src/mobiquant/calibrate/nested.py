"""Nested block training: the layers of one block trained together, over all depths at once.

What: with the float block's outputs as targets, each step draws a depth and a batch of sequences and lowers the error of the
block's output at that depth. The inputs are those that a model read at that depth produces, as in `fast`.

Choice: the error of a token is taken relative to the mean of its own energy and the average energy. A few tokens with massive
activations would own a plain mean square; a purely relative one lets tokens of no energy own it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mobiquant import blocks
from mobiquant.calibrate.latent import Depth, LatentLinear, load_tensors, open_latents, project, tensors
from mobiquant.calibrate.streams import FLOAT, Reading, Stage, Streams, fixed
from mobiquant.calibrate.work import Work
from mobiquant.config import Format, Training
from mobiquant.knob import Precision
from mobiquant.linear import MobiLinear

STUDENT_BITS = 4


@dataclass(frozen=True)
class Draws:
    """How often each depth is drawn; one entry for each slice, in sum 1."""

    shares: tuple[float, ...]

    @classmethod
    def of(cls, widths: tuple[int, ...]) -> "Draws":
        """Depths of few bits are drawn more often: they have more to learn."""
        raw = [1.0 / max(width - 1, 1) for width in widths]
        return cls(tuple(value / sum(raw) for value in raw))

    def pick(self, generator: torch.Generator, count: int = 1) -> list[int]:
        """`count` different depths."""
        found = torch.multinomial(torch.tensor(self.shares, dtype=torch.float64), count, generator=generator)
        return [int(depth) + 1 for depth in found]


def generator_for(seed: int, stage: str, place: int, step: int = 0) -> torch.Generator:
    """Randomness of one step: the same whenever and wherever the step is taken."""
    names = ("blocks", "distillation", "routing")
    return torch.Generator().manual_seed(((seed * len(names) + names.index(stage)) * 10007 + place) * 1_000_003 + step)


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """On CUDA, operations that add in a fixed order: a resumed run must end with the same bytes.

    Raises RuntimeError in a model with an operation that has no such form.
    """
    if device.type != "cuda":
        yield
        return
    from torch._inductor import config as inductor

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    # without a fixed workspace cuBLAS may add in another order, and torch refuses to call it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        # with warnings in place of errors, attention would keep its unordered sums
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        # compiled code must not depend on which of its forms was faster when it was tried
        with inductor.patch(deterministic=True):
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filling


def readings(form: Format) -> list[Reading]:
    """The float model, students of each depth of at most 4 bits, and one that reads everything."""
    depths = [d + 1 for d, width in enumerate(form.widths) if width <= STUDENT_BITS or d == len(form.widths) - 1]
    return [FLOAT, *(fixed(depth) for depth in depths)]


def reading_of(depth: int, form: Format) -> Reading:
    """The stream that a depth is trained on."""
    return fixed(depth) if fixed(depth) in readings(form) else fixed(len(form.slices))


class NestedStage(Stage):
    """One block in training, beside its float original; `quantised` holds `MobiLinear`s."""

    def __init__(self, original: nn.Module, quantised: nn.Module, index: int, calls: blocks.Calls, device: torch.device):
        self.index, self.calls, self.device = index, calls, device
        self.teacher = deepcopy(original).float().to(device).requires_grad_(False)
        self.student: nn.Module = deepcopy(quantised).float().to(device).requires_grad_(False)
        self.depth = Depth(1)
        self.latents: dict[str, LatentLinear] = open_latents(self.student, self.depth)
        self.precision = Precision((1,))

    def module(self, reading: Reading) -> nn.Module:
        """The teacher for FLOAT, else the student at that depth."""
        if reading is FLOAT:
            return self.teacher
        self.depth.value = reading[1]
        return self.student


def relative_error(made: Float[Tensor, "S L D"], wanted: Float[Tensor, "S L D"]) -> Float[Tensor, ""]:
    """Mean over tokens of the squared error over half the token's own energy and half the mean energy."""
    energy = wanted.square().sum(-1)
    return ((made - wanted).square().sum(-1) / (0.5 * (energy + energy.mean())).clamp_min(1e-12)).mean()


def optimizer_for(latents: dict[str, LatentLinear], training: Training, weights: bool = True) -> torch.optim.AdamW:
    """AdamW without decay, with a rate each for positions, scales and zero points."""
    layers = list(latents.values())
    groups: list[dict[str, Any]] = []
    if weights:
        groups.append({"params": [layer.position for layer in layers], "lr": training.position_rate})
    groups.append({"params": [layer.log_scale for layer in layers], "lr": training.scale_rate})
    groups.append({"params": [layer.zero for layer in layers], "lr": training.zero_rate})
    for group in groups:
        group["first"] = group["lr"]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=layers[0].position.is_cuda)


def set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """A short rise, then half a cosine down to nothing."""
    rise = min(1.0, (step + 1) / max(1, steps // 20))
    fall = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / max(steps, 1))).item())
    for group in optimizer.param_groups:
        group["lr"] = group["first"] * rise * fall


def train_block(stage: NestedStage, streams: Streams, form: Format, training: Training, seed: int) -> list[dict[str, Any]]:
    """Train the latents of one block; returns the mean loss of each depth over the first and the last quarter of the steps."""
    wanted, draws = streams.ahead(stage, FLOAT), Draws.of(form.widths)
    optimizer, steps = optimizer_for(stage.latents, training), training.block_steps or 0
    losses: list[tuple[int, float]] = []
    with repeatable(stage.device):
        for step in range(steps):
            generator = generator_for(seed, "blocks", stage.index, step)
            (depth,) = draws.pick(generator)
            batch = torch.randperm(streams.count, generator=generator)[: training.block_batch].sort().values
            hidden = streams.hidden[reading_of(depth, form)]
            with torch.enable_grad():
                made = stage.run(fixed(depth), hidden[batch.to(hidden.device)])
                loss = relative_error(made, wanted[batch.to(wanted.device)].to(stage.device))
                optimizer.zero_grad()
                loss.backward()
            set_rate(optimizer, step, steps)
            optimizer.step()
            project(stage.latents)
            losses.append((depth, loss.detach().item()))
    quarter = max(1, steps // 4)
    return [
        {
            "block": stage.index,
            "bits": form.widths[d],
            "first": _mean(losses[:quarter], d + 1),
            "last": _mean(losses[-quarter:], d + 1),
        }
        for d in range(len(form.widths))
    ]


def _mean(losses: list[tuple[int, float]], depth: int) -> float | None:
    found = [loss for d, loss in losses if d == depth]
    return round(sum(found) / len(found), 6) if found else None


def finish_block(stage: NestedStage, quantised: nn.Module) -> None:
    """Write the trained latents into the block that they came from."""
    for name, latent in stage.latents.items():
        layer: MobiLinear = quantised.get_submodule(name).to(stage.device)  # type: ignore[assignment]
        latent.store(layer)
        layer.cpu()


def block(
    stage: NestedStage, streams: Streams, form: Format, training: Training, seed: int, work: Work
) -> list[dict[str, Any]]:
    """Train a block, or take it from the work folder; then move the streams behind it."""
    name = f"block-{stage.index:03d}"
    kept = work.load(name)
    if kept is None:
        log = train_block(stage, streams, form, training, seed)
        work.save(name, lambda: tensors(stage.latents), log)
    else:
        load_tensors(stage.latents, kept[0])
        log = kept[1]
    streams.advance(stage)
    return log
