"""Quantised layers whose tokens read what differentiable gates say, for the training of routers (`routing`).

What: a layer computes `y = sum_e m_e (x D_e)` with `D_1 = read(q, 1)` and `D_e = read(q, e) - read(q, e - 1)`. A gate `m_e` is
`[score_e > tau]` in the forward pass and `sigmoid((score_e - tau) / temperature)` in the backward pass (straight-through, as in
MoBiQuant, arXiv 2602.20191).

Trade-off: all depths of a layer are computed for every token, which takes five products in place of one and the memory for
them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from mobiquant import blocks, checkpoint, router
from mobiquant.calibrate import routers
from mobiquant.calibrate.passes import Pair, divergence
from mobiquant.config import Checkpoint, Format
from mobiquant.linear import MobiLinear, mobilinears


@dataclass
class Step:
    """What all layers share while one batch passes: thresholds and caps of its sequences, and what was read so far."""

    tau: Float[Tensor, " S"]
    cap: Int[Tensor, " S"]
    temperature: float | Float[Tensor, ""]
    # bits times weights of each layer, and how much more they would be were the threshold lower by one
    read: list[Float[Tensor, " S"]] = field(default_factory=list)
    slope: list[Float[Tensor, " S"]] = field(default_factory=list)


@dataclass(frozen=True)
class Gates:
    """Gates of the tokens of one input, and the residual bits that a weight reads by them on average, with their slope."""

    open: Float[Tensor, "S L R"]
    read: Float[Tensor, " S"]
    slope: Float[Tensor, " S"]


class GateRouter(nn.Module):
    """A router in training; `gates` opens the gates of the tokens of a batch."""

    def __init__(self, start: router.Router, form: Format):
        super().__init__()
        self.weight = nn.Parameter(start.weight.float() * start.weight_scale.float()[:, None])
        self.rms, self.bias = nn.Parameter(start.rms.clone()), nn.Parameter(start.bias.clone())
        self.out, self.out_bias = nn.Parameter(start.out.clone()), nn.Parameter(start.out_bias.clone())
        self.widths: Tensor
        self.register_buffer("widths", torch.tensor(form.slices[1:], dtype=torch.float32))
        self.step = Step(torch.empty(0), torch.empty(0, dtype=torch.int64), 1.0)
        # of the last pass: what the layers read, what the router read (the same, or what earlier layers did), and its gates
        self._last: tuple[Tensor, Tensor, Gates] | None = None
        self._first: tuple[GateRouter, ...] = ()

    def scores(self, x: Float[Tensor, "*T K"]) -> Float[Tensor, "T1 R"]:
        """As `router.scores`, differentiable; one row for each token."""
        with torch.autocast(x.device.type, enabled=False):
            f, log_rms = router.features(x.reshape(-1, x.shape[-1]))
            return routers.scores(f, log_rms, self.weight, self.rms, self.bias, self.out, self.out_bias)

    def gates(self, x: Float[Tensor, "*T K"]) -> Gates:
        """Straight-through gates at the thresholds of the step, for layers that read `x`, which share them.

        Some models (OPT) hand their layers all tokens of a batch in one row.
        """
        if self._last is None or self._last[0] is not x:
            read = self._first[0].seen if self._first else x
            step, score = self.step, self.scores(read).unflatten(0, (len(self.step.tau), -1))  # [S, L, R]
            inside = torch.arange(1, score.shape[-1] + 1, device=x.device) < step.cap[:, None, None]  # [S, 1, R]
            soft = torch.sigmoid((score - step.tau[:, None, None]) / step.temperature) * inside
            hard = (score > step.tau[:, None, None]) * inside
            opened = hard + soft - soft.detach()
            slope = (soft * (1 - soft)).detach() / step.temperature
            self._last = x, read, Gates(opened, (opened @ self.widths).mean(1), (slope @ self.widths).mean(1))
        return self._last[2]

    @property
    def last(self) -> Float[Tensor, "*T K"]:
        """What the router read in the last pass."""
        assert self._last is not None
        return self._last[1]

    @property
    def seen(self) -> Float[Tensor, "*T K"]:
        """What the layers of this router read in the last pass."""
        assert self._last is not None
        return self._last[0]

    def follow(self, first: "GateRouter") -> None:
        """Read what the layers of another router read."""
        self._first = (first,)

    def begin(self, step: Step) -> None:
        """Work at the thresholds of another step."""
        self.step, self._last = step, None

    def stored(self) -> router.Router:
        """What the trained router is stored as."""
        return router.store(*(p.detach() for p in (self.weight, self.rms, self.bias, self.out, self.out_bias)))


class GatedLinear(nn.Module):
    """A quantised layer whose tokens read what differentiable gates say; maps [..., K] to [..., N]."""

    def __init__(self, layer: MobiLinear, gate: GateRouter, dtype: torch.dtype):
        super().__init__()
        # a tuple hides the router, which several layers share
        self._gate, packed = (gate,), layer.packed()
        reads = [packed.read(depth) for depth in range(1, len(layer.format.slices) + 1)]
        self.steps: Tensor
        self.register_buffer("steps", torch.cat([reads[0], *(new - old for old, new in pairwise(reads))]).to(dtype))  # [E N, K]
        self.bias: Tensor | None
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())
        self.rows, self.size = layer.out_features, layer.in_features * layer.out_features

    def forward(self, x: Float[Tensor, "*T K"]) -> Float[Tensor, "*T N"]:
        gates, step = self._gate[0].gates(x), self._gate[0].step
        step.read.append(gates.read * self.size)
        step.slope.append(gates.slope * self.size)
        opened = gates.open.view(*x.shape[:-1], -1, 1)  # [S, L, R] -> [..., R, 1]
        parts = linear(x, self.steps).unflatten(-1, (-1, self.rows))  # [..., E, N]
        y = parts[..., 0, :] + (parts[..., 1:, :] * opened.to(parts.dtype)).sum(-2)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@dataclass(frozen=True)
class Routed:
    """A student whose layers are `GatedLinear`s, beside the float model, both on one device."""

    pair: Pair
    gates: dict[str, GateRouter]
    layers: dict[str, MobiLinear]
    base: float

    @property
    def size(self) -> int:
        """Weights of all layers."""
        return sum(layer.in_features * layer.out_features for layer in self.layers.values())

    def begin(self, step: Step) -> None:
        """Let all layers work at the thresholds of another step."""
        for gate in self.gates.values():
            gate.begin(step)

    def losses(
        self, tokens: Int[Tensor, "S L"], step: Step, text: float = 0.0
    ) -> tuple[Float[Tensor, " S"], Float[Tensor, " S"], Tensor]:
        """Divergence of each sequence in nats a token, bits read by each (differentiable), and their slope by the threshold.

        `text` is the share of the gradient of a divergence that is that of the text itself, `-log p(next token)`.
        """
        self.begin(step)
        with torch.no_grad(), blocks.lower(tokens.device):
            wanted = self.pair.teacher(tokens, use_cache=False).logits.flatten(0, 1)
        with blocks.lower(tokens.device):
            logits = self.pair.student(tokens, use_cache=False).logits.flatten(0, 1)
        each = divergence(logits, wanted).view(tokens.shape).mean(1)
        if text:
            predicted = logits.view(*tokens.shape, -1)[:, :-1].flatten(0, 1).float()
            nll = cross_entropy(predicted, tokens[:, 1:].flatten(), reduction="none").view(len(tokens), -1).mean(1)
            # the value of the divergence, of whose gradient a part is that of the text
            each = each + text * (nll - nll.detach() - each + each.detach())
        return each, self.base + sum(step.read) / self.size, -sum(step.slope) / self.size  # type: ignore[return-value]


@contextmanager
def opened(pair: Pair, stored: Checkpoint, device: torch.device) -> Iterator[Routed]:
    """While open, both models are on the device and the layers of the student have differentiable gates."""
    layers, student, teacher, form = mobilinears(pair.student), pair.student, pair.teacher, stored.format
    dtype = next(student.parameters()).dtype
    holders, read = checkpoint.router_holders(layers, stored), stored.read_by_routers()
    by_layer = {id(layers[name]): name for name in holders}
    gates = {name: GateRouter(layer.get_router(ahead), form).to(device) for name, (layer, ahead) in holders.items()}
    for name, other in read.items():
        if other != name:
            gates[name].follow(gates[other])
    lowered = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name, layer in layers.items():
        blocks.replace(student, name, GatedLinear(layer.to(device), gates[by_layer[id(layer.owner)]], lowered))
        layer.cpu()
    try:
        for model in (student, teacher):
            # in fp32 but for the quantised weights; transformers refuses to cast a model that is marked as quantised
            for parameter in model.parameters():
                parameter.requires_grad_(False).data = parameter.data.float()
            model.to(device)
        yield Routed(pair, gates, layers, float(form.widths[0]))
    finally:
        for name, layer in layers.items():
            blocks.replace(student, name, layer)
        for model in (student, teacher):
            nn.Module.to(model, dtype).to("cpu")
