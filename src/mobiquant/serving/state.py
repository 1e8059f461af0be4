"""The precision of one process of a server: a threshold and a cap for each token of a batch, and what tokens have read.

Requests of different budgets share a batch, so there is an entry for each token, in device tensors whose addresses stay:
a compiled model or a captured graph reads them anew in every step.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float32, Float64, Int
from torch import Tensor

from mobiquant import budget
from mobiquant.config import Checkpoint

SHUT = float("-inf")
# steps of the histogram of bits that tokens read on average
BUCKETS = 0.25


@dataclass(frozen=True)
class Budget:
    """What is asked for: average bits, or exactly these bits for every token where not `routed`."""

    bits: float
    routed: bool = True

    def pair(self, stored: Checkpoint) -> tuple[float, int]:
        """Threshold and cap; raises InputError outside the range of the checkpoint."""
        if self.routed:
            return budget.threshold(self.bits, stored.format, stored.thresholds)
        return SHUT, stored.format.depth(self.bits)


@dataclass
class State:
    """Thresholds and caps of the tokens of the next batch; what was read: weights at each depth, and bits of each token."""

    stored: Checkpoint
    capacity: int
    device: torch.device
    default: Budget
    tau: Tensor = field(init=False)
    cap: Tensor = field(init=False)
    read: Float64[Tensor, " E"] = field(init=False)
    # of the tokens of the running batch: bits of all weights that they read; and of all tokens before, by their mean
    summed: Float32[Tensor, " T"] = field(init=False)
    tokens: Int[Tensor, " B"] = field(init=False)
    running: int = field(init=False, default=0)
    weights: int = field(init=False, default=0)
    # known on the host: the depth that all tokens read without routers, or None
    fixed: int | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        depths = len(self.stored.format.slices)
        self.tau = torch.full((self.capacity,), SHUT, device=self.device)
        self.cap = torch.full((self.capacity,), depths, dtype=torch.int64, device=self.device)
        self.read = torch.zeros(depths, dtype=torch.float64, device=self.device)
        self.summed = torch.zeros(self.capacity, device=self.device)
        self.tokens = torch.zeros(int(8 / BUCKETS) + 1, dtype=torch.int64, device=self.device)
        self.widths = torch.tensor(self.stored.format.widths, dtype=torch.float32, device=self.device)
        self.fill([(self.capacity, self.default)])
        self.running = 0

    def set_default(self, wanted: Budget) -> None:
        """The budget of requests that name none, from the next batch on; raises InputError where it cannot be read."""
        wanted.pair(self.stored)
        self.default = wanted

    def fill(self, runs: list[tuple[int, Budget]]) -> None:
        """Budgets of the tokens of the next batch, as runs of so many tokens; those of the last batch are counted."""
        self.close()
        self.running = min(sum(count for count, _ in runs), self.capacity)
        pairs = [(count, *wanted.pair(self.stored)) for count, wanted in runs]
        alone = len({pair[1:] for pair in pairs}) == 1
        self.fixed = pairs[0][2] if alone and pairs[0][1] == SHUT else None
        if alone:
            # padding that graphs add reads what the others read
            pairs = [(self.capacity, *pairs[0][1:])]
        counts = torch.tensor([count for count, _, _ in pairs])
        tau = torch.tensor([tau for _, tau, _ in pairs]).repeat_interleave(counts)
        cap = torch.tensor([cap for _, _, cap in pairs]).repeat_interleave(counts)
        self.tau[: tau.numel()].copy_(tau)
        self.cap[: cap.numel()].copy_(cap)

    def record(self, depth: Int[Tensor, " T"] | int, tokens: int, size: int) -> None:
        """Count what tokens read in a layer of `size` weights."""
        if isinstance(depth, int):
            self.read[depth - 1] += tokens * size
        else:
            self.read += torch.bincount(depth - 1, minlength=self.read.numel()).double() * size
        self.summed[:tokens] += self.widths[depth - 1] * size

    def close(self) -> None:
        """Count the tokens of the batch that has run."""
        if self.weights and self.running:
            mean = self.summed[: self.running] / self.weights
            kept = mean[mean > 0]
            self.tokens += torch.bincount((kept / BUCKETS).round().long(), minlength=self.tokens.numel())[: self.tokens.numel()]
        self.summed.zero_()
        self.running = 0

    def counts(self) -> dict[str, list[float]]:
        """Weights read at each depth, and tokens by the bits that they read on average, in steps of `BUCKETS`."""
        return {"weights": self.read.tolist(), "tokens": [float(n) for n in self.tokens.tolist()]}
