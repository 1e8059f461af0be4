"""Routers trained end to end against the float model, with a budget drawn for each sequence; codes stay as they are.

What: the student reads what straight-through gates say (`gates`), whose temperature falls from 1 to 0.3. The loss of a sequence
is `KL(float || routed)^p / p`.

How the budget is held: the threshold of each budget follows what was really read, and a bit has a price in the loss, set so
that moving the threshold of all gates together would change nothing. What is left to learn is order: gates that gain more for
a bit than the price go up and the others down, over layers, slices and tokens alike. A penalty on the distance from the budget
would leave the routers to find the threshold, and they would spend their steps on that.

Half of the gradient is that of the text itself, `-log p(next token)`: what follows the float model better is not always what
predicts the text better. With it budgets of 3 and 3.5 bits lie 4 % lower in perplexity on text like that of the calibration, up
to 1 % on other text, and their divergence rises (`docs/results/full.md`).

Where the memory for gates of a whole batch is not there, its sequences go through the model in parts, which changes nothing but
the time; where it is not there for a single one, routers stay as regression left them. A notice says so.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mobiquant import budget, checkpoint, router
from mobiquant.calibrate.distill import free_memory, notice
from mobiquant.calibrate.fast import Fitted
from mobiquant.calibrate.gates import GateRouter, Routed, Step, opened
from mobiquant.calibrate.nested import generator_for, repeatable, set_rate
from mobiquant.calibrate.passes import Pair, Replayed, powered, steady
from mobiquant.calibrate.thresholds import Curve
from mobiquant.calibrate.work import Work
from mobiquant.config import Checkpoint, Format, Training
from mobiquant.linear import mobilinears
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
# share of the gradient that is the text's
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
        curve = Curve.of(form, fitted)
        taus = [curve.tau_for(bits, cap) for bits, cap in found]
        bits, cap = zip(*found, strict=True)
        at, tau = torch.tensor(bits, device=device), torch.tensor(taus, device=device)
        # small budgets have more to gain, but there is one region for each width above 4 bits and one for all below
        return cls(at, torch.tensor(cap, device=device), tau, torch.zeros_like(at), (at - 1).rsqrt())

    def turn(self, count: int) -> list[Int[Tensor, " S"]]:
        """All budgets, `count` at a time; where they do not come out even, the last part has some of the one before."""
        size = self.bits.numel()
        return [(torch.arange(count) + min(first, max(size - count, 0))) % size for first in range(0, size, count)]

    def draw(self, generator: torch.Generator, count: int) -> Int[Tensor, " S"]:
        """`count` budgets, different ones while there are enough."""
        return torch.multinomial(self.shares.cpu(), count, replacement=count > self.shares.numel(), generator=generator)


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
    learner: "Learner", budgets: Budgets, windows: Int[Tensor, "W L"], training: Training,
    steps_for: Callable[[float], int],
    seed: int, progress: Report,
) -> list[dict[str, Any]]:  # fmt: skip
    """Train the routers; thresholds and prices of `budgets` follow. Returns the mean divergence and bits of each budget.

    `steps_for` says how many steps are taken, given the seconds of one.
    """
    count = training.distill_batch
    optimizer = optimizer_for(learner.routed.gates, training.router_rate)
    sums = torch.zeros(3, budgets.bits.numel(), dtype=torch.float64)
    # every budget gets its threshold and price before the first step
    ahead = [part for _ in range(AHEAD) for part in budgets.turn(count)]
    times = [time.monotonic()]
    for number, picked in enumerate(ahead):
        _step(learner, budgets, picked, _batch(windows, count, generator_for(seed, NAME, 1, number)), HOT, 1.0)
        times.append(time.monotonic())
    optimizer.zero_grad(set_to_none=False)
    # the first pass compiles and finds its memory
    steps = steps_for((times[-1] - times[1]) / (len(ahead) - 1))
    for number in range(steps):
        generator = generator_for(seed, NAME, 0, number)
        picked = budgets.draw(generator, count)
        heat = HOT * (COLD / HOT) ** (number / max(steps - 1, 1))
        each, read = _step(learner, budgets, picked, _batch(windows, count, generator), heat, FOLLOW_PRICE)
        set_rate(optimizer, number, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        sums.index_add_(1, picked, torch.stack([each, read, torch.ones_like(read)]).double())
        progress("training routers", number + 1, steps, f"KL {each.mean():.3f}")
    found = zip(budgets.bits.tolist(), *(sums[:2] / sums[2]).tolist(), sums[2].tolist(), strict=True)
    return [{"budget": b, "kl": round(kl, 5), "read": round(read, 4)} for b, kl, read, seen in found if seen]


def _batch(windows: Int[Tensor, "W L"], count: int, generator: torch.Generator) -> Int[Tensor, "S L"]:
    """`count` windows, different ones while there are enough."""
    picked = torch.randperm(windows.shape[0], generator=generator)[:count]
    return windows[picked.repeat(-(-count // len(picked)))[:count].to(windows.device)]


class Learner:
    """Adds the gradients of batches to those of the routers, whose `.grad` is there; `together` sequences at a time."""

    def __init__(self, routed: Routed, power: float, together: int):
        self.routed, self.power, self.together = routed, power, together
        self.parameters = [p for gate in routed.gates.values() for p in gate.parameters()]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)

    @torch.enable_grad()
    def learn(
        self, tokens: Int[Tensor, "S L"], step: Step, price: Float[Tensor, " S"]
    ) -> tuple[Float[Tensor, " S"], Float[Tensor, " S"], Float[Tensor, " S"], Float[Tensor, " S"]]:
        """Divergence and bits of each sequence, the slope of the bits by the threshold, and the gradient of the threshold."""
        tau = step.tau.detach().requires_grad_()
        each, read, slope = self.routed.losses(tokens, replace(step, tau=tau, read=[], slope=[]), TEXT)
        (powered(each, self.power) + price * read).sum().backward()
        assert tau.grad is not None
        return each.detach(), read.detach(), slope, tau.grad


class CapturedLearner(Learner):
    """The same on CUDA, replayed as a graph, for batches of one shape."""

    def __init__(self, routed: Routed, power: float, tokens: Int[Tensor, "S L"]):
        super().__init__(routed, power, len(tokens))
        still = torch.zeros(len(tokens), device=tokens.device)
        self.tokens, self.price = tokens.clone(), still.clone()
        self.step = Step(still.clone(), torch.ones_like(still).long(), torch.ones_like(still[0]))
        self.replayed = Replayed(
            lambda: super(CapturedLearner, self).learn(self.tokens, self.step, self.price), self.parameters
        )

    def learn(self, tokens: Any, step: Step, price: Any) -> Any:
        """As `Learner.learn`."""
        for held, given in ((self.tokens, tokens), (self.price, price), (self.step.tau, step.tau), (self.step.cap, step.cap)):
            held.copy_(given)
        self.step.temperature.fill_(step.temperature)  # type: ignore[union-attr]
        return tuple(made.clone() for made in self.replayed())


@contextmanager
def _learner(routed: Routed, windows: Int[Tensor, "W L"], together: int, power: float) -> Iterator[Learner]:
    """A learner of `together` windows at a time, captured on CUDA."""
    tokens = windows[torch.arange(together) % len(windows)]
    if not tokens.is_cuda:
        yield Learner(routed, power, together)
        return
    pair, still = routed.pair, torch.zeros(len(tokens), device=tokens.device)
    routed.begin(Step(still, still.long() + 1, HOT))
    with steady(pair.student, pair.stack, tokens), steady(pair.teacher, pair.originals, tokens):
        yield CapturedLearner(routed, power, tokens)


def _step(
    learner: Learner, budgets: Budgets, picked: Int[Tensor, " S"], tokens: Int[Tensor, "S L"], heat: float, follow_price: float
) -> tuple[Float[Tensor, " S"], Float[Tensor, " S"]]:
    """Add the gradients of one batch; thresholds and prices follow. Returns divergence and bits of each sequence (host)."""
    at = picked.to(tokens.device)
    tau, price = budgets.tau[at], budgets.price[at]
    every = (one.split(learner.together) for one in (tokens, tau, budgets.cap[at], price))
    parts = [learner.learn(part, Step(tau_of, cap, heat), price_of) for part, tau_of, cap, price_of in zip(*every, strict=True)]
    each, read, slope, gradient = (torch.cat(found) for found in zip(*parts, strict=True))
    slope = slope.clamp_max(-LEAST)
    budgets.price[at] = price - follow_price * gradient / slope
    budgets.tau[at] = tau - (FOLLOW * (read - budgets.bits[at]) / slope).clamp(-MOST, MOST)
    return each.cpu(), read.cpu()


@torch.no_grad()
def sample_scores(
    routed: Routed, budgets: Budgets, windows: Int[Tensor, "W L"], together: int
) -> dict[str, Float[Tensor, "T R"]]:
    """Scores of about `SAMPLE` tokens by each router, on the host, from sequences at budgets from the least to the greatest."""
    picked = torch.linspace(0, budgets.bits.numel() - 1, min(SEQUENCES, len(windows))).long().to(windows.device)
    places = torch.linspace(0, len(windows) - 1, len(picked)).long().to(windows.device)
    found: dict[str, list[Tensor]] = {name: [] for name in routed.gates}
    for tokens, some in zip(windows[places].split(together), picked.split(together), strict=True):
        routed.losses(tokens, Step(budgets.tau[some], budgets.cap[some], COLD))
        for name, gate in routed.gates.items():
            found[name].append(gate.scores(gate.last))
    stride = max(1, len(places) * windows.shape[1] // SAMPLE)
    return {name: torch.cat(scores)[::stride].cpu() for name, scores in found.items()}


def memory(routed_weights: int, rows: int, vocabulary: int, depths: int, tokens: int) -> int:
    """Bytes that a step takes on CUDA: bf16 weights and outputs at every depth, what blocks keep beside (fitted to 40 GB
    measured for SmolLM2 on an H200), and predictions of both models."""
    return routed_weights * depths * 2 + tokens * (rows * (depths + 8) * 2 + vocabulary * 28)


def sequences_at_once(need: Callable[[int], int], count: int, device: torch.device) -> int:
    """How many of `count` sequences go through the model at a time, in parts of one size; 0 where there is no room for one.

    `need` says how many bytes so many take. Anything less than all is said in a notice.
    """
    room = 0.9 * free_memory(device)
    fitting = next((size for size in range(count, 0, -1) if count % size == 0 and need(size) <= room), 0)
    if fitting < count:
        instead = f"{fitting} of {count} sequences go through at a time" if fitting else "routers stay as fitted by regression"
        notice("training routers end to end", need(count if fitting else 1), device, instead)
    return fitting


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
        count, length = training.distill_batch, windows.shape[1]
        together = sequences_at_once(lambda few: memory(size, rows, vocabulary, len(form.slices), few * length), count, device)
        if not together:
            return fitted, []
        budgets, on_device = Budgets.of(form, fitted, device), windows.to(device)
        with repeatable(device), opened(pair, stored, device) as routed:
            with _learner(routed, on_device, together, training.loss_power) as learner:
                log = optimise(learner, budgets, on_device, training, steps_for, seed, progress)
            scores = sample_scores(routed, budgets, on_device, together)
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
