"""Activations flowing through the model block by block: what the float model computes, and what readers of some depth do.

A stream is named by its reading `(tau, cap)`, the pair that `linear.Precision` takes, or by `FLOAT`. Streams of low depth let a
layer be fitted to the inputs it will get, which at 2 bits differ much from those of the float model. Activations rest in
fp32, [S, L, D] for each stream, on the device while they take a small part of it, else on the host; one block is on the
device at a time. On CUDA a block works in bf16, as it will when it is used: attention in fp32 took most of the time there.
"""

from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mobiquant import blocks
from mobiquant.config import Format
from mobiquant.knob import Precision
from mobiquant.linear import MobiLinear, mobilinears

Reading = tuple[float, int]
FLOAT: Reading = (float("nan"), 0)
ROUTER_TOKENS = 2048


@dataclass(frozen=True)
class Sample:
    """Inputs of a layer that a router is fitted on: first tokens of sequences, and others, spread over all streams.

    All others attend to a first token, many of them for want of anything better (an attention sink), so it carries more
    than those that come after it; with one in a sequence, a plain sample would hardly hold any.
    """

    tokens: Float[Tensor, "T K"]
    firsts: Float[Tensor, "F K"]

    @classmethod
    def joined(cls, parts: "list[Sample]") -> "Sample":
        """One sample of several, with at most `ROUTER_TOKENS` tokens."""
        tokens = torch.cat([part.tokens for part in parts])
        return cls(tokens[:ROUTER_TOKENS], torch.cat([part.firsts for part in parts]))


# the layer that keeps a router, and whether as that for the next block
Holder = tuple[MobiLinear, bool]


@dataclass
class First:
    """The first layer of a block, whose input routers read, and a sample of that."""

    layer: MobiLinear
    sample: Sample


def fixed(depth: int) -> Reading:
    """The reading in which every token reads `depth` slices."""
    return float("-inf"), depth


class Stage:
    """One block in work, fp32 on the device: the block as it is, and a copy whose layers are quantised one by one.

    `student` is None where the block is quantised already. `place` counts the inputs of the blocks before, `next_place` those
    with its own, None for the last block; `before` and `first` are the first layers of the block before and of this one, once
    there are any.
    """

    place = 0
    next_place: int | None = None
    before: First | None = None
    first: First | None = None

    def __init__(self, block: nn.Module, index: int, calls: blocks.Calls, precision: Precision, device: torch.device):
        self.index, self.calls, self.precision, self.device = index, calls, precision, device
        self.teacher = deepcopy(block).float().to(device).requires_grad_(False)
        quantised = mobilinears(self.teacher)
        for layer in quantised.values():
            layer.precision = precision
        self.student = self.teacher if quantised else deepcopy(self.teacher)

    def module(self, reading: Reading) -> nn.Module:
        """The teacher for FLOAT, else the student told to read so; layers not yet quantised are float."""
        if reading is FLOAT:
            return self.teacher
        self.precision.set([reading[0]], [reading[1]])
        return self.student

    def run(self, reading: Reading, hidden: Float[Tensor, "S L D"]) -> Float[Tensor, "S L D"]:
        """Outputs of the block for a batch, fp32 on the device."""
        return self.calls.run(self.module(reading), self.index, hidden.to(self.device))

    def groups(self, hidden: Float[Tensor, "S L D"]) -> list[list[str]]:
        """Linear layers of the block, those that read the same input together, in running order."""
        return blocks.shared_inputs(self.teacher, lambda: self.run(FLOAT, hidden))

    def router_of(self, place: int, owner: MobiLinear, sample: Sample, form: Format) -> tuple[Sample, Holder]:
        """What the router of the input at a place of the block reads, of which `sample` is one, and who keeps it."""
        if form.routers != "per-block" or self.first is None:
            return sample, (owner, False)
        if place == 0 and self.before is not None:
            return self.before.sample, (self.before.layer, True)
        return self.first.sample, (owner, False)

    def inputs(self, reading: Reading, hidden: Float[Tensor, "S L D"], name: str) -> Float[Tensor, "T K"]:
        """What the layer `name` reads for a batch, fp32."""
        seen: list[Tensor] = []
        with blocks.watch_inputs(self.module(reading), [name], lambda _, x: seen.append(x), last=name):
            self.run(reading, hidden)
        return seen[0].flatten(0, -2).float()  # [S, L, K] -> [T, K]


def resting_place(size: int, device: torch.device) -> torch.device:
    """Where `size` bytes of activations rest: on the device where they take at most a third of its free memory."""
    if device.type == "cuda" and size <= torch.cuda.mem_get_info(device)[0] / 3:
        return device
    return torch.device("cpu")


class Streams:
    """`hidden[reading]`: states before the block in work, [S, L, D] fp32."""

    def __init__(self, hidden: Float[Tensor, "S L D"], readings: Iterable[Reading], batch: int, device: torch.device):
        self.count, self.length, self.batch = hidden.shape[0], hidden.shape[1], batch
        every = list(readings)
        place = resting_place(hidden.numel() * 4 * len(every), device)
        self.hidden = {reading: hidden.to(place, copy=True) for reading in every}

    def parts(self) -> Iterator[slice]:
        """Batches of sequences."""
        return (slice(i, i + self.batch) for i in range(0, self.count, self.batch))

    @torch.no_grad()
    def moments(self, stage: Stage, name: str) -> tuple[dict[Reading, Tensor], dict[Reading, Tensor], Sample]:
        """Second moments of the inputs of a layer, and a sample of them; one stream must be FLOAT.

        Returns for each reading `H_e = X_e^T X_e` and `M_e = X^T X_e` [K, K], X the float inputs, both divided by the number of
        tokens; and a sample with up to `ROUTER_TOKENS` tokens on the device, drawn in turn from all streams.
        """
        own: dict[Reading, Tensor] = {}
        mixed: dict[Reading, Tensor] = {}
        sample: list[Sample] = []
        tokens = self.count * self.length
        for part in self.parts():
            x = stage.inputs(FLOAT, self.hidden[FLOAT][part], name)
            for reading in self.hidden:
                x_e = x if reading is FLOAT else stage.inputs(reading, self.hidden[reading][part], name)
                own[reading] = own.get(reading, 0) + x_e.T @ x_e / tokens
                if reading is not FLOAT:
                    mixed[reading] = mixed.get(reading, 0) + x.T @ x_e / tokens
                sample.append(self._thinned(x_e.view(-1, self.length, x_e.shape[1])[self._turn(reading)]))
        return own, mixed, Sample.joined(sample)

    @torch.no_grad()
    def sample(self, stage: Stage, name: str) -> Sample:
        """The sample of `moments` alone."""
        sample: list[Sample] = []
        for part in self.parts():
            for reading in self.hidden:
                hidden = self.hidden[reading][part][self._turn(reading)]
                if len(hidden):
                    x = stage.inputs(reading, hidden, name)
                    sample.append(self._thinned(x.view(len(hidden), self.length, -1)))
        return Sample.joined(sample)

    def _turn(self, reading: Reading) -> slice:
        """The sequences of a batch that are sampled from a stream: streams take turns."""
        return slice(list(self.hidden).index(reading), None, len(self.hidden))

    def _thinned(self, x: Float[Tensor, "S L K"]) -> Sample:
        """Of some sequences the first tokens, and as many others as make up `ROUTER_TOKENS` over all sequences."""
        step = max(1, self.count * (self.length - 1) // ROUTER_TOKENS)
        # copies: a view would keep all of x
        return Sample(x[:, 1:].flatten(0, 1)[::step].clone(), x[:, 0].clone())

    @torch.no_grad()
    def ahead(self, stage: Stage, reading: Reading) -> Float[Tensor, "S L D"]:
        """One stream behind the block in work, where the stream rests; the stream itself stays."""
        hidden = self.hidden[reading]
        made = torch.empty_like(hidden)
        for part in self.parts():
            made[part] = stage.run(reading, hidden[part])
        return made

    @torch.no_grad()
    def advance(self, stage: Stage) -> None:
        """Move all streams behind the block in work."""
        for reading in self.hidden:
            self.hidden[reading] = self.ahead(stage, reading)
