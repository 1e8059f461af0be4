"""The `paper` recipe: learned weight clipping in two stages, routers trained through their gates (MoBiQuant, section 4).

For each block, with the pretrained weights frozen and the error of the block's output as loss:

1. the clips of all layers are trained with the base slice alone; a clip is `sigmoid(v)` times the end of the range, `v` = 4
   at the start;
2. clips and routers are trained with all slices, the gates hard in the forward pass and soft in the backward pass
   (straight-through, temperature 1.0 to 0.3), plus a budget term `(avg_bits - target)^2` whose target falls from all bits to
   the goal over the first half.

Ours where the paper is silent: the loss is relative to the mean square of the output, inputs come from the routed student,
targets from the float model, zero points are rounded to whole steps, both stages take `epochs` passes.

How: on CUDA products are in bf16 and the pass of a batch is captured as a graph (`passes.Replayed`), since launching its small
operations costs more than doing them. So what changes between steps, temperature and budget, lies in tensors, as do the sums
for the log.
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
from mobiquant.calibrate.passes import Replayed
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
        self.base = form.slices[0]
        self.weight = nn.Parameter(torch.randn(hidden, columns, generator=generator) / columns**0.5)
        self.rms, self.bias = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(hidden))
        self.out = nn.Parameter(torch.randn(outputs, hidden, generator=generator) / hidden**0.5)
        self.out_bias = nn.Parameter(torch.zeros(outputs))
        self.widths: Tensor
        self.temperature: Tensor
        self.register_buffer("widths", torch.tensor(form.slices[1:], dtype=torch.float32))
        self.register_buffer("temperature", torch.tensor(TEMPERATURES[0]))
        self.bits: Tensor = torch.zeros(())

    def forward(self, x: Float[Tensor, "T K"]) -> Float[Tensor, "T R"]:
        """Gate of each residual slice: 0 or 1, with the gradient of a sigmoid."""
        with torch.autocast(x.device.type, enabled=False):
            f, log_rms = router.features(x)
            hidden = silu(f @ self.weight.T + log_rms * self.rms + self.bias)
            score = router.order(hidden @ self.out.T + self.out_bias)
            soft = torch.sigmoid(score / self.temperature)
            gates = (score > 0).float() + soft - soft.detach()
            self.bits = self.base + (gates * self.widths).sum(1).mean()
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
        y = flat @ weights[0].T
        gates = self.gates(flat).to(y.dtype)
        for e in range(1, len(weights)):
            y = y + gates[:, e - 1 : e] * (flat @ (weights[e] - weights[e - 1]).T)
        y = y.view(*x.shape[:-1], -1)  # [T, N] -> [..., N]
        return y if self.bias is None else y + self.bias.to(y.dtype)


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
    log = _train(stage, streams, wanted, layers, None, settings)
    log += _train(stage, streams, wanted, layers, owners, settings)
    return _finish(stage, streams, groups, layers, owners, form), log


class Lesson:
    """One stage of training of a block: adds the gradients of a batch to those of the parameters, and sums loss and bits read.

    With `owners` the layers read what their gates say and a budget is asked of them, else the base slice alone.
    """

    def __init__(self, stage: Stage, layers: dict[str, LearnedClip], owners: dict[str, Gates] | None, rate: float):
        self.stage, self.owners = stage, owners or {}
        for name, layer in layers.items():
            layer.gates = self.owners.get(name)
        every = (*layers.values(), *self.owners.values())
        self.parameters = list(dict.fromkeys(p for module in every for p in module.parameters()))
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        on_gpu, device = stage.device.type == "cuda", stage.device
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.0, fused=on_gpu)
        sizes = torch.tensor([float(layer.weight.numel()) for layer in layers.values()], device=device)
        self.shares, self.target = sizes / sizes.sum(), torch.zeros((), device=device)
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.captured: tuple[Tensor, Tensor, Replayed] | None = None

    def begin(self, target: float, temperature: float) -> None:
        """Start an epoch: the bits asked for and the temperature of the gates."""
        self.target.fill_(target)
        for gates in self.owners.values():
            gates.temperature.fill_(temperature)
        self.sums.zero_()

    @torch.enable_grad()
    def learn(self, hidden: Float[Tensor, "S L D"], goal: Float[Tensor, "S L D"]) -> None:
        """Add the gradients of a batch, whose outputs should be `goal`."""
        made = self.stage.calls.run(self.stage.student, self.stage.index, hidden)
        loss = (made - goal).square().mean() / goal.square().mean().clamp_min(1e-12)
        self.sums[0] += loss.detach()
        if self.owners:
            read = torch.stack([gates.bits for gates in self.owners.values()]) @ self.shares
            self.sums[1] += read.detach()
            loss = loss + (read - self.target) ** 2
        loss.backward()

    def step(self, hidden: Float[Tensor, "S L D"], goal: Float[Tensor, "S L D"]) -> None:
        """Train on one batch; on CUDA as a graph, which batches of other sizes do without."""
        if hidden.is_cuda and self.captured is None:
            held = hidden.clone(), goal.clone()
            sums = self.sums.clone()
            self.captured = (*held, Replayed(lambda: self.learn(*held), self.parameters))
            self.captured[2].prepare()
            self.sums.copy_(sums)
        if self.captured is not None and hidden.shape == self.captured[0].shape:
            for to, value in zip(self.captured, (hidden, goal), strict=False):
                to.copy_(value)
            self.captured[2]()
        else:
            self.learn(hidden, goal)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)


def _train(
    stage: Stage,
    streams: Streams,
    wanted: Float[Tensor, "S L D"],
    layers: dict[str, LearnedClip],
    owners: dict[str, Gates] | None,
    settings: Calibration,
) -> list[dict[str, Any]]:
    """One stage of training toward the outputs `wanted` of the float block; returns the loss and the bits of each epoch."""
    lesson, batches = Lesson(stage, layers, owners, settings.learning_rate), -(-streams.count // streams.batch)
    most = next(iter(layers.values())).form.widths[-1]
    log: list[dict[str, Any]] = []
    for epoch in range(settings.epochs):
        done = epoch / max(settings.epochs - 1, 1)
        target = most + (settings.target_bits - most) * min(1.0, 2 * done)
        lesson.begin(target, TEMPERATURES[0] + (TEMPERATURES[1] - TEMPERATURES[0]) * done)
        for part in streams.parts():
            lesson.step(streams.hidden[ROUTED][part].to(stage.device), wanted[part].to(stage.device))
        loss, bits = (lesson.sums / batches).tolist()
        entry = {"stage": 2 if owners else 1, "epoch": epoch, "loss": loss}
        log.append({**entry, "avg_bits": bits, "target_bits": target} if owners else entry)
    # a graph that knows its lesson would keep its memory until Python looks for cycles
    lesson.captured = None
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
