"""Routers trained end to end against the float model, with a budget drawn for each sequence; codes stay as they are.

What: a layer computes `y = sum_e m_e (x D_e)` with `D_1 = read(q, 1)` and `D_e = read(q, e) - read(q, e - 1)`. A gate `m_e` is
`[score_e > tau]` in the forward pass and `sigmoid((score_e - tau) / temperature)` in the backward pass (straight-through, as in
MoBiQuant, arXiv 2602.20191), the temperature falling from 1 to 0.3. The loss of a sequence is `KL(float || routed)^p / p`.

How the budget is held: the threshold of each budget follows what was really read, and a bit has a price in the loss, set so
that moving the threshold of all gates together would change nothing. What is left to learn is order: gates that gain more for
a bit than the price go up and the others down, over layers, slices and tokens alike. A penalty on the distance from the budget
would leave the routers to find the threshold, and they would spend their steps on that.

Above 4 bits half of the gradient is that of the text itself, `-log p(next token)`. There the float model's predictions are
nearly followed, and what follows them better is not what predicts the text better: routers trained on the divergence alone read
4.5 to 7 bits 0.1 to 0.5 % above the straight line in perplexity, and below it in divergence (`docs/results/full.md`).

Trade-off: all depths of a layer are computed for every token, which takes five products in place of one and the memory for
them; where that is not there, routers stay as regression left them, and a notice says so.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from mobiquant import blocks, budget, checkpoint, router
from mobiquant.calibrate import routers
from mobiquant.calibrate.distill import free_memory, notice
from mobiquant.calibrate.fast import Fitted
from mobiquant.calibrate.latent import lower
from mobiquant.calibrate.nested import generator_for, repeatable, set_rate
from mobiquant.calibrate.passes import Pair, divergence, powered
from mobiquant.calibrate.thresholds import tau_for
from mobiquant.calibrate.work import Work
from mobiquant.config import Checkpoint, Format, Training
from mobiquant.linear import MobiLinear, mobilinears
from mobiquant.progress import Report

NAME = "routing"
# shares of the budgets between two widths that are trained
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
HOT, COLD = 1.0, 0.3
# rates of the output layer, the hidden layer and the wide first matrix, relative to that of the output biases
OUT, HIDDEN, FIRST = 0.3, 0.3, 0.03
# how fast a threshold and a price follow what one batch says, and by how much a threshold moves at most
FOLLOW, FOLLOW_PRICE, MOST = 0.5, 0.2, 0.5
# bits that a threshold moved by one is worth at least: nearly shut gates would ask for giant steps
LEAST = 0.02
# share of the gradient that is the text's where budgets are above 4 bits
TEXT = 0.5
# turns over all budgets before the first step
AHEAD = 2
# sample tokens of each router whose scores give the shape of the threshold table, and the sequences that they are taken from
SAMPLE, SEQUENCES = 4096, 8


@dataclass
class Budgets:
    """The budgets that are trained: bits, depth cap, threshold and price of a bit of each, `[B]`."""

    bits: Tensor
    cap: Tensor
    tau: Tensor
    price: Tensor
    shares: Tensor

    @classmethod
    def of(cls, form: Format, fitted: list[Fitted], device: torch.device) -> "Budgets":
        """Budgets at `SHARES` between neighbouring widths, and the widths between; thresholds from the fitted scores."""
        found: list[tuple[float, int]] = []
        for cap, edges in budget.regions(form):
            found += [(low + share * (high - low), cap) for low, high in pairwise(edges) for share in SHARES]
            found += [(float(width), cap) for width in edges[1:-1]]
        taus = [tau_for(bits, cap, form, fitted) for bits, cap in found]
        bits, cap = zip(*found, strict=True)
        at = torch.tensor(bits, device=device)
        # small budgets have more to gain
        return cls(at, torch.tensor(cap, device=device), torch.tensor(taus, device=device), torch.zeros_like(at), 1 / (at - 1))

    def draw(self, generator: torch.Generator, count: int) -> Int[Tensor, " S"]:
        """`count` budgets, different ones while there are enough."""
        return torch.multinomial(self.shares.cpu(), count, replacement=count > self.shares.numel(), generator=generator)


@dataclass
class Step:
    """What all layers share while one batch passes: thresholds and caps of its sequences, and what was read so far."""

    tau: Float[Tensor, " S"]
    cap: Int[Tensor, " S"]
    temperature: float
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
        self.step = Step(torch.empty(0), torch.empty(0, dtype=torch.int64), HOT)
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
    power: float
    # depth cap of the budgets of up to 4 bits
    small: int

    @property
    def size(self) -> int:
        """Weights of all layers."""
        return sum(layer.in_features * layer.out_features for layer in self.layers.values())

    def losses(self, tokens: Int[Tensor, "S L"], step: Step) -> tuple[Float[Tensor, " S"], Float[Tensor, " S"], Tensor]:
        """Divergence of each sequence in nats a token, bits read by each (differentiable), and their slope by the threshold."""
        for gate in self.gates.values():
            gate.begin(step)
        with torch.no_grad(), lower(tokens.device):
            wanted = self.pair.teacher(tokens, use_cache=False).logits.flatten(0, 1)
        with lower(tokens.device):
            logits = self.pair.student(tokens, use_cache=False).logits.flatten(0, 1)
        each = divergence(logits, wanted).view(tokens.shape).mean(1)
        above = (step.cap > self.small).nonzero()[:, 0]
        if torch.is_grad_enabled() and len(above):
            picked = logits.view(*tokens.shape, -1)[above, :-1].flatten(0, 1).float()
            nll = cross_entropy(picked, tokens[above, 1:].flatten(), reduction="none").view(len(above), -1).mean(1)
            each = each.index_copy(0, above, _mixed(each[above], nll))
        return each, self.base + sum(step.read) / self.size, -sum(step.slope) / self.size  # type: ignore[return-value]


def _mixed(value: Float[Tensor, " S"], other: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
    """`value`, of whose gradient a part is that of another."""
    return value + TEXT * (other - other.detach() - value + value.detach())


def optimizer_for(gates: dict[str, GateRouter], rate: float) -> torch.optim.Adam:
    """Adam with a rate for each kind of parameter: many inputs of a unit move its sum by more than one does."""
    every = list(gates.values())
    groups = [
        {"params": [g.out_bias for g in every], "lr": rate},
        {"params": [g.out for g in every], "lr": rate * OUT},
        {"params": [p for g in every for p in (g.bias, g.rms)], "lr": rate * HIDDEN},
        {"params": [g.weight for g in every], "lr": rate * FIRST},
    ]
    for group in groups:
        group["first"] = group["lr"]
    return torch.optim.Adam(groups, betas=(0.9, 0.95))


def optimise(
    routed: Routed, budgets: Budgets, windows: Int[Tensor, "W L"], training: Training,
    steps_for: Callable[[float], int],
    seed: int, progress: Report,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train the routers; thresholds and prices of `budgets` follow. Returns the mean divergence and bits of each budget.

    `steps_for` says how many steps are taken, given the seconds of one.
    """
    count = training.distill_batch
    optimizer = optimizer_for(routed.gates, training.router_rate)
    sums = torch.zeros(3, budgets.bits.numel(), dtype=torch.float64)
    # every budget gets its threshold and price before the first step
    ahead = [part for _ in range(AHEAD) for part in torch.arange(budgets.bits.numel()).split(count)]
    times = [time.monotonic()]
    for number, picked in enumerate(ahead):
        _step(routed, budgets, picked, _batch(windows, len(picked), generator_for(seed, NAME, 1, number)), HOT, 1.0)
        times.append(time.monotonic())
    optimizer.zero_grad()
    # the first pass compiles and finds its memory
    steps = steps_for((times[-1] - times[1]) / (len(ahead) - 1))
    for number in range(steps):
        generator = generator_for(seed, NAME, 0, number)
        picked = budgets.draw(generator, count)
        heat = HOT * (COLD / HOT) ** (number / max(steps - 1, 1))
        each, read = _step(routed, budgets, picked, _batch(windows, count, generator), heat, FOLLOW_PRICE)
        set_rate(optimizer, number, steps)
        optimizer.step()
        optimizer.zero_grad()
        sums.index_add_(1, picked, torch.stack([each, read, torch.ones_like(read)]).double())
        progress("training routers", number + 1, steps, f"KL {each.mean():.3f}")
    found = zip(budgets.bits.tolist(), *(sums[:2] / sums[2]).tolist(), sums[2].tolist(), strict=True)
    return [{"budget": b, "kl": round(kl, 5), "read": round(read, 4)} for b, kl, read, seen in found if seen]


def _batch(windows: Int[Tensor, "W L"], count: int, generator: torch.Generator) -> Int[Tensor, "S L"]:
    """`count` windows, different ones while there are enough."""
    picked = torch.randperm(windows.shape[0], generator=generator)[:count]
    return windows[picked.repeat(-(-count // len(picked)))[:count].to(windows.device)]


def _step(
    routed: Routed, budgets: Budgets, picked: Int[Tensor, " S"], tokens: Int[Tensor, "S L"], heat: float, follow_price: float
) -> tuple[Float[Tensor, " S"], Float[Tensor, " S"]]:
    """Add the gradients of one batch; thresholds and prices follow. Returns divergence and bits of each sequence (host)."""
    picked = picked.to(tokens.device)
    step = Step(budgets.tau[picked].requires_grad_(), budgets.cap[picked], heat)
    with torch.enable_grad():
        each, read, slope = routed.losses(tokens, step)
        price = budgets.price[picked]
        (powered(each, routed.power) + price * read).sum().backward()
    slope = slope.clamp_max(-LEAST)
    assert step.tau.grad is not None
    budgets.price[picked] = price - follow_price * step.tau.grad / slope
    move = FOLLOW * (read.detach() - budgets.bits[picked]) / slope
    budgets.tau[picked] = step.tau.detach() - move.clamp(-MOST, MOST)
    return each.detach().cpu(), read.detach().cpu()


@torch.no_grad()
def sample_scores(routed: Routed, budgets: Budgets, windows: Int[Tensor, "W L"]) -> dict[str, Float[Tensor, "T R"]]:
    """Scores of about `SAMPLE` tokens by each router, on the host, from sequences at budgets from the least to the greatest."""
    budgets_of = torch.linspace(0, budgets.bits.numel() - 1, min(SEQUENCES, len(windows))).long()
    places = torch.linspace(0, len(windows) - 1, len(budgets_of)).long()
    picked, tokens = budgets_of.to(windows.device), windows[places.to(windows.device)]
    routed.losses(tokens, Step(budgets.tau[picked], budgets.cap[picked], COLD))
    stride = max(1, tokens.numel() // SAMPLE)
    return {name: gate.scores(gate.last)[::stride].cpu() for name, gate in routed.gates.items()}


@contextmanager
def opened(pair: Pair, stored: Checkpoint, power: float, device: torch.device) -> Iterator[Routed]:
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
        yield Routed(pair, gates, layers, float(form.widths[0]), power, budget.region_caps(form)[0])
    finally:
        for name, layer in layers.items():
            blocks.replace(student, name, layer)
        for model in (student, teacher):
            nn.Module.to(model, dtype).to("cpu")


def memory(routed_weights: int, rows: int, vocabulary: int, depths: int, tokens: int) -> int:
    """Bytes that a step takes on CUDA: bf16 weights and outputs at every depth, what blocks keep beside (fitted to 40 GB
    measured for SmolLM2 on an H200), and predictions of both models."""
    return routed_weights * depths * 2 + tokens * (rows * (depths + 8) * 2 + vocabulary * 28)


def train(
    pair: Pair, stored: Checkpoint, fitted: list[Fitted], windows: Int[Tensor, "W L"], training: Training,
    steps_for: Callable[[float], int], seed: int, device: torch.device, work: Work, progress: Report,
) -> tuple[list[Fitted], list[dict[str, Any]]]:  # fmt: skip
    """Train the routers of the student, which are stored in its layers; returns what they score on sample tokens, and the log.

    `fitted` is what regression left. Taken from `work` where it was finished there.
    `steps_for` says how many steps are taken, given the seconds of one.
    """
    layers, form = mobilinears(pair.student), stored.format
    kept = work.load(NAME)
    if kept is None:
        size, rows = sum(one.size for one in fitted), sum(layer.out_features for layer in layers.values())
        vocabulary = pair.teacher.config.get_text_config().vocab_size
        need = memory(size, rows, vocabulary, len(form.slices), training.distill_batch * windows.shape[1])
        if need > 0.9 * free_memory(device):
            notice("training routers end to end", need, device, "routers stay as fitted by regression")
            return fitted, []
        budgets, on_device = Budgets.of(form, fitted, device), windows.to(device)
        with repeatable(device), opened(pair, stored, training.loss_power, device) as routed:
            log = optimise(routed, budgets, on_device, training, steps_for, seed, progress)
            scores = sample_scores(routed, budgets, on_device)
            trained = {name: vars(gate.stored()) for name, gate in routed.gates.items()}
        values = {f"{name}.{key}": tensor.cpu() for name, parts in trained.items() for key, tensor in parts.items()}
        values |= {f"{name}.scores": value for name, value in scores.items()}
        work.save(NAME, lambda: values, log)
    else:
        values, log = kept
    holders = checkpoint.router_holders(layers, stored)
    for name, (layer, ahead) in holders.items():
        layer.set_router(router.Router(**{key: values[f"{name}.{key}"] for key in router.NAMES}), ahead)
    return [replace(one, scores=values[f"{name}.scores"]) for name, one in zip(holders, fitted, strict=True)], log
