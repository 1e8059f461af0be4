"""Activations flowing through the model block by block: what the float model computes, and what readers of some depth do.

A stream is named by its reading `(tau, cap)`, the pair that `linear.Precision` takes, or by `FLOAT`. Streams of low depth let a
layer be fitted to the inputs it will get, which at 2 bits differ much from those of the float model. Activations rest in
fp32, [S, L, D] for each stream, on the device while they take a small part of it, else on the host; one block is on the
device at a time.
"""

from collections.abc import Iterable, Iterator
from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mobiquant import blocks
from mobiquant.linear import MobiLinear, Precision

Reading = tuple[float, int]
FLOAT: Reading = (float("nan"), 0)
ROUTER_TOKENS = 2048


def fixed(depth: int) -> Reading:
    """The reading in which every token reads `depth` slices."""
    return float("-inf"), depth


class Stage:
    """One block in work, fp32 on the device: the block as it is, and a copy whose layers are quantised one by one.

    `student` is None where the block is quantised already.
    """

    def __init__(self, block: nn.Module, index: int, calls: blocks.Calls, precision: Precision, device: torch.device):
        self.index, self.calls, self.precision, self.device = index, calls, precision, device
        self.teacher = deepcopy(block).float().to(device).requires_grad_(False)
        quantised = self.mobilinears(self.teacher)
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
        """Outputs of the block for a batch, on the device."""
        return self.calls.run(self.module(reading), self.index, hidden.to(self.device))

    def groups(self, hidden: Float[Tensor, "S L D"]) -> list[list[str]]:
        """Linear layers of the block, those that read the same input together, in running order."""
        return blocks.shared_inputs(self.teacher, lambda: self.run(FLOAT, hidden))

    def inputs(self, reading: Reading, hidden: Float[Tensor, "S L D"], name: str) -> Float[Tensor, "T K"]:
        """What the layer `name` reads for a batch."""
        seen: list[Tensor] = []
        with blocks.watch_inputs(self.module(reading), [name], lambda _, x: seen.append(x), last=name):
            self.run(reading, hidden)
        return seen[0].flatten(0, -2)  # [S, L, K] -> [T, K]

    @staticmethod
    def mobilinears(module: nn.Module) -> dict[str, MobiLinear]:
        """Quantised layers by name."""
        return {name: m for name, m in module.named_modules() if isinstance(m, MobiLinear)}


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
    def moments(self, stage: Stage, name: str) -> tuple[dict[Reading, Tensor], dict[Reading, Tensor], Float[Tensor, "T K"]]:
        """Second moments of the inputs of a layer, and a sample of them; one stream must be FLOAT.

        Returns for each reading `H_e = X_e^T X_e` and `M_e = X^T X_e` [K, K], X the float inputs, both divided by the number of
        tokens; and up to `ROUTER_TOKENS` inputs on the device, drawn in turn from all streams.
        """
        own: dict[Reading, Tensor] = {}
        mixed: dict[Reading, Tensor] = {}
        sample: list[Tensor] = []
        tokens = self.count * self.length
        for number, part in enumerate(self.parts()):
            x = stage.inputs(FLOAT, self.hidden[FLOAT][part], name)
            for reading in self.hidden:
                x_e = x if reading is FLOAT else stage.inputs(reading, self.hidden[reading][part], name)
                own[reading] = own.get(reading, 0) + x_e.T @ x_e / tokens
                if reading is not FLOAT:
                    mixed[reading] = mixed.get(reading, 0) + x.T @ x_e / tokens
                if reading is self._turn(number):
                    sample.append(self._thinned(x_e))
        return own, mixed, torch.cat(sample)[:ROUTER_TOKENS]

    @torch.no_grad()
    def sample(self, stage: Stage, name: str) -> Float[Tensor, "T K"]:
        """The sample of `moments` alone."""
        found: list[Tensor] = []
        for number, part in enumerate(self.parts()):
            reading = self._turn(number)
            found.append(self._thinned(stage.inputs(reading, self.hidden[reading][part], name)))
        return torch.cat(found)[:ROUTER_TOKENS]

    def _turn(self, number: int) -> Reading:
        """The stream that batch `number` is sampled from."""
        return list(self.hidden)[number % len(self.hidden)]

    def _thinned(self, x: Float[Tensor, "T K"]) -> Float[Tensor, "T1 K"]:
        """As many inputs of a batch as make up `ROUTER_TOKENS` over all batches."""
        wanted = -(-ROUTER_TOKENS * x.shape[0] // (self.count * self.length))
        return x[:: max(x.shape[0] // wanted, 1)]

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
