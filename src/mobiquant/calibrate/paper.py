"""The `paper` recipe: learned weight clipping in two stages, routers trained through their gates (MoBiQuant, section 4).

For each block, with the pretrained weights frozen and the error of the block's output as loss:

1. the clips of all layers are trained with the base slice alone; a clip is `sigmoid(v)` times the end of the range, `v` = 4
   at the start;
2. clips and routers are trained with all slices, the gates hard in the forward pass and soft in the backward pass
   (straight-through, temperature 1.0 to 0.3), plus a budget term `(avg_bits - target)^2` whose target falls from all bits to
   the goal over the first half.

Ours where the paper is silent: the loss is relative to the mean square of the output, inputs come from the routed student,
targets from the float model, zero points are rounded to whole steps, both stages take `epochs` passes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from mobiquant import blocks, clip, compensate, router
from mobiquant import slices as s
from mobiquant.calibrate import latent
from mobiquant.calibrate.fast import Fitted, install
from mobiquant.calibrate.streams import FLOAT, ROUTER_TOKENS, Reading, Stage, Streams
from mobiquant.config import Calibration, Format

CLIP_START = 4.0
TEMPERATURES = (1.0, 0.3)
ROUTED: Reading = (0.0, s.MAX_BITS)


def readings(form: Format) -> list[Reading]:
    """Streams that the recipe needs: the float model, and the student routed with a threshold of zero."""
    return [FLOAT, ROUTED]


class Gates(nn.Module):
    """A router in training; remembers the soft average of the bits its last tokens read."""

    def __init__(self, columns: int, form: Format, generator: torch.Generator):
        super().__init__()
        hidden, outputs = form.router_hidden, len(form.slices) - 1
        self.widths = form.slices
        self.weight = nn.Parameter(torch.randn(hidden, columns, generator=generator) / columns**0.5)
        self.rms, self.bias = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(hidden))
        self.out = nn.Parameter(torch.randn(outputs, hidden, generator=generator) / hidden**0.5)
        self.out_bias = nn.Parameter(torch.zeros(outputs))
        self.temperature = TEMPERATURES[0]
        self.bits: Tensor = torch.zeros(())

    def forward(self, x: Float[Tensor, "T K"]) -> Float[Tensor, "T R"]:
        """Gate of each residual slice: 0 or 1, with the gradient of a sigmoid."""
        f, log_rms = router.features(x)
        hidden = silu(f @ self.weight.T + log_rms * self.rms + self.bias)
        score = router.order(hidden @ self.out.T + self.out_bias)
        soft = torch.sigmoid(score / self.temperature)
        gates = (score > 0).float() + soft - soft.detach()
        self.bits = self.widths[0] + (gates * torch.tensor(self.widths[1:], device=x.device)).sum(1).mean()
        return gates

    def stored(self) -> router.Router:
        """The router as it is stored."""
        parts = (self.weight, self.rms, self.bias, self.out, self.out_bias)
        return router.store(*[part.detach() for part in parts])


class LearnedClip(nn.Module):
    """A linear layer whose weight is quantised in every forward pass, with trainable clips; `gates` None reads the base."""

    def __init__(self, old: nn.Module, form: Format):
        super().__init__()
        weight = blocks.weight_of(old).detach().float().contiguous()
        bias = getattr(old, "bias", None)
        self.form = form
        self.gates: Gates | None = None
        self.weight: Tensor
        self.bias: Tensor | None
        self.low: Tensor
        self.high: Tensor
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if bias is None else bias.detach())
        low = clip.group_reduce(weight, form.group_size, "amin", float("inf")).clamp(max=0)
        high = clip.group_reduce(weight, form.group_size, "amax", float("-inf")).clamp(min=0)
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.lower, self.upper = nn.Parameter(torch.full_like(low, CLIP_START)), nn.Parameter(torch.full_like(high, CLIP_START))

    def grid(self) -> tuple[Float[Tensor, "N G"], Float[Tensor, "N G"]]:
        """Differentiable scale and whole zero point."""
        low, high = self.low * torch.sigmoid(self.lower), self.high * torch.sigmoid(self.upper)
        scale = ((high - low) / (2 ** self.form.slices[0] - 1)).clamp_min(s.MIN_SCALE)
        zero = -low / scale
        return scale, zero + (zero.round() - zero).detach()

    def reads(self, depths: int) -> Iterator[Float[Tensor, "N K"]]:
        """Differentiable weights at the first depths; flooring passes gradients straight through."""
        return latent.read(self.weight, *self.grid(), self.form, range(1, depths + 1))

    def forward(self, x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        flat = x.reshape(-1, x.shape[-1])  # [..., K] -> [T, K]
        if self.gates is None:
            return linear(x, next(self.reads(1)), self.bias)
        weights = list(self.reads(len(self.form.slices)))
        gates = self.gates(flat)
        y = flat @ weights[0].T
        for e in range(1, len(weights)):
            y = y + gates[:, e - 1 : e] * (flat @ (weights[e] - weights[e - 1]).T)
        y = y.view(*x.shape[:-1], -1)  # [T, N] -> [..., N]
        return y if self.bias is None else y + self.bias


def quantize_block(
    stage: Stage, streams: Streams, groups: list[list[str]], form: Format, settings: Calibration
) -> tuple[list[Fitted], list[dict[str, Any]]]:
    """Train clips and routers of one block, then put quantised layers in; returns scores of sample tokens and the losses."""
    form.check_bits(settings.target_bits)
    generator = torch.Generator().manual_seed(settings.seed * 1009 + stage.index)
    layers: dict[str, LearnedClip] = {}
    owners: dict[str, Gates] = {}
    for names in groups:
        shared: Gates | None = None
        for name in names:
            layers[name] = LearnedClip(stage.student.get_submodule(name), form).to(stage.device)
            blocks.replace(stage.student, name, layers[name])
            if shared is None or form.routers == "per-linear":
                shared = Gates(layers[name].weight.shape[1], form, generator).to(stage.device)
            owners[name] = shared
    wanted = streams.ahead(stage, FLOAT)
    log = _train(stage, streams, wanted, layers, owners, settings, routed=False)
    log += _train(stage, streams, wanted, layers, owners, settings, routed=True)
    return _finish(stage, streams, groups, layers, owners, form), log


def _train(
    stage: Stage,
    streams: Streams,
    wanted: Float[Tensor, "S L D"],
    layers: dict[str, LearnedClip],
    owners: dict[str, Gates],
    settings: Calibration,
    routed: bool,
) -> list[dict[str, Any]]:
    """One stage of training toward the outputs `wanted` of the float block; returns the loss and the bits of each epoch."""
    unique = list(dict.fromkeys(owners.values()))
    parameters = [p for layer in layers.values() for p in layer.parameters()]
    for name, layer in layers.items():
        layer.gates = owners[name] if routed else None
    if routed:
        parameters = list(dict.fromkeys([*parameters, *(p for gates in unique for p in gates.parameters())]))
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    form = next(iter(layers.values())).form
    sizes = torch.tensor([float(layer.weight.numel()) for layer in layers.values()], device=stage.device)
    log: list[dict[str, Any]] = []
    for epoch in range(settings.epochs):
        done = epoch / max(settings.epochs - 1, 1)
        target = form.widths[-1] + (settings.target_bits - form.widths[-1]) * min(1.0, 2 * done)
        for gates in unique:
            gates.temperature = TEMPERATURES[0] + (TEMPERATURES[1] - TEMPERATURES[0]) * done
        total = bits = 0.0
        for part in streams.parts():
            goal = wanted[part].to(stage.device)
            with torch.enable_grad():
                made = stage.run(ROUTED, streams.hidden[ROUTED][part])
                loss = (made - goal).square().mean() / goal.square().mean().clamp_min(1e-12)
                total += float(loss.detach())
                if routed:
                    read = torch.stack([owners[name].bits for name in layers]) @ sizes / sizes.sum()
                    bits += float(read.detach())
                    loss = loss + (read - target) ** 2
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        batches = -(-streams.count // streams.batch)
        entry = {"stage": 2 if routed else 1, "epoch": epoch, "loss": total / batches}
        log.append({**entry, "avg_bits": bits / batches, "target_bits": target} if routed else entry)
    return log


@torch.no_grad()
def _finish(
    stage: Stage,
    streams: Streams,
    groups: list[list[str]],
    layers: dict[str, LearnedClip],
    owners: dict[str, Gates],
    form: Format,
) -> list[Fitted]:
    """Replace trained layers by quantised ones, input by input; returns scores of sample tokens."""
    fitted: list[Fitted] = []
    for place, names in enumerate(groups):
        sample = _sample(stage, streams, names[0])
        grids = [layers[name].grid() for name in names]
        scale = s.store_scale(torch.cat([scale for scale, _ in grids]))
        zero = s.store_zero(torch.cat([zero for _, zero in grids]), form.slices)
        weight = torch.cat([layers[name].weight for name in names])
        code = s.encode(weight, scale, zero, form.slices, form.group_size)
        grid = compensate.Grid(scale, zero, form.slices, form.group_size)
        for name, layer in zip(names, install(stage, names, grid, code, form, place), strict=True):
            if layer.router_names:
                stored = owners[name].stored()
                layer.set_router(stored)
                size = sum(layers[other].weight.numel() for other in names if owners[other] is owners[name])
                fitted.append(Fitted((name,), size, router.scores(sample, stored).cpu()))
    return fitted


def _sample(stage: Stage, streams: Streams, name: str) -> Float[Tensor, "T K"]:
    """Up to `ROUTER_TOKENS` inputs of a layer in the routed student, spread over the sequences."""
    tokens = streams.count * streams.length
    stride = -(-tokens // ROUTER_TOKENS)
    parts = [stage.inputs(ROUTED, streams.hidden[ROUTED][part], name)[::stride] for part in streams.parts()]
    return torch.cat(parts)
