"""The table `avg_bits <-> threshold`, measured on calibration tokens that run through the routed model.

The scores that sample tokens got while the routers were fitted give the shape of the curve, steps at every slice included.
Depths chosen in one block change the inputs of the next, so at a few thresholds the bits really read are measured, by running
tokens through the quantised blocks at all of them side by side, as sequences of one batch. The table is the fine curve, moved
by the measured difference. Straight lines between the measured points alone were off by 0.08 bits half way.

What texts read at one threshold differs by 0.04 to 0.06 bits from one sequence to another, whether of 128 or 512 tokens, so
many are measured. The first 256 tokens read 0.01 bits more than later ones with routers fitted by regression and up to 0.1 more
with trained ones: on a CPU, where a user waits, beginnings of sequences are measured all the same, elsewhere longer ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor, nn

from mobiquant import blocks, budget
from mobiquant.calibrate.fast import Fitted
from mobiquant.calibrate.streams import Stage, resting_place
from mobiquant.config import Format
from mobiquant.knob import Precision
from mobiquant.linear import mobilinears
from mobiquant.progress import Report

# shares of the budgets between two widths at which a row is measured
SHARES = (0.15, 0.5, 0.85)
# rows between two widths in the table
FINE = 16
# tokens that rows are measured on: half of the calibration tokens, but this many and no more, in sequences of at most so many
LEAST = 1024
MOST, LENGTH = {"cpu": 8192, "cuda": 32768}, {"cpu": 256, "cuda": 2048}
# tokens in work at once: enough that reading the weights costs little beside the products
BATCH = {"cpu": 8192, "cuda": 32768}


def _kind(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else "cuda"


def measured_shape(count: int, length: int, device: torch.device) -> tuple[int, int]:
    """How many of `count` calibration sequences of `length` tokens rows are measured on, and how long their beginnings are."""
    kind = _kind(device)
    wanted, length = max(LEAST, min(count * length // 2, MOST[kind])), min(length, LENGTH[kind])
    return min(count, -(-wanted // length)), length


def beginnings(tokens: Int[Tensor, "S L"], device: torch.device) -> Int[Tensor, "S1 L1"]:
    """The part of the calibration tokens that rows are measured on."""
    kept, length = measured_shape(*tokens.shape, device)
    return tokens[torch.linspace(0, len(tokens) - 1, kept).long(), :length]


@dataclass(frozen=True)
class Curve:
    """What sample tokens read at any threshold, by the scores that they got from each router."""

    form: Format
    sizes: Float64[Tensor, " F"]  # weights that each router decides for
    scores: Float[Tensor, "R F T"]  # of each residual slice, rising: a threshold is looked up instead of counting tokens

    @classmethod
    def of(cls, form: Format, fitted: list[Fitted]) -> "Curve":
        """The curve of routers that scored equally many tokens."""
        sizes = torch.tensor([f.size for f in fitted], dtype=torch.float64)
        return cls(form, sizes, torch.stack([f.scores.T for f in fitted], 1).sort(-1).values)

    def bits(self, tau: float, cap: int) -> list[float]:
        """Average bits of the sample tokens at a threshold, for every cap up to `cap`."""
        scores = self.scores[: cap - 1]
        sought = torch.full((*scores.shape[:2], 1), tau, dtype=scores.dtype)
        shut = torch.searchsorted(scores, sought, right=True)[:, :, 0]  # [cap - 1, F] tokens
        open_gates = (scores.shape[2] - shut).double() / scores.shape[2]
        steps = (open_gates @ self.sizes / self.sizes.sum()) * torch.tensor(self.form.slices[1:cap], dtype=torch.float64)
        return [float(self.form.widths[0]), *(self.form.widths[0] + steps.cumsum(0)).tolist()]

    def tau_for(self, bits: float, cap: int) -> float:
        """Threshold at which the sample tokens read `bits` on average, by bisection."""
        low, high = float(self.scores[:, :, 0].min()) - 1, float(self.scores[:, :, -1].max()) + 1
        for _ in range(24):
            tau = (low + high) / 2
            low, high = (tau, high) if self.bits(tau, cap)[-1] > bits else (low, tau)
        return tau

    def rows(self, shares: Sequence[float]) -> list[tuple[float, int]]:
        """`(tau, cap)` at shares of the budgets between neighbouring widths; thresholds falling.

        Where a budget is a width of the format, many thresholds may read it: the row is the middle of them, far from reading
        less.
        """
        found: list[tuple[float, int]] = []
        for cap, edges in budget.regions(self.form):
            taus = [self.tau_for(low + share * (high - low), cap) for low, high in pairwise(edges) for share in shares]
            # nothing is routed at the narrowest width and at that of the cap
            for width in [width for width in edges[:-1] if width > self.form.widths[0]]:
                taus.append(sum(self.tau_for(width + side, cap) for side in (-1e-6, 1e-6)) / 2)
            found += [(tau, cap) for tau in sorted(taus, reverse=True)]
        return list(dict.fromkeys(found))


class Measured:
    """Sequences at each row of the table, and what they read so far; `hidden` are their states before the first block."""

    def __init__(self, hidden: Float[Tensor, "S L D"], form: Format, fitted: list[Fitted], device: torch.device):
        self.form, self.curve, self.device = form, Curve.of(form, fitted), device
        self.rows = self.curve.rows(SHARES)
        place = resting_place(4 * hidden.numel() * len(self.rows), device)
        self.hidden = hidden.to(place).repeat(len(self.rows), 1, 1, 1)  # [rows, S, L, D]
        self.counts = torch.zeros(len(self.rows), len(form.slices), dtype=torch.float64)
        # what one block has decided for the next, by the first row of a batch
        self.carried: dict[int, tuple[int, Tensor]] = {}

    @torch.no_grad()
    def run_block(self, block: nn.Module, index: int, calls: blocks.Calls) -> None:
        """Move every sequence behind one quantised block and count the depths read in it."""
        device = self.device
        stage = Stage(block, index, calls, Precision(self.form.widths), device)
        _, sequences, length, width = self.hidden.shape
        batch = BATCH[_kind(device)]
        for part in torch.arange(len(self.rows)).split(max(1, batch // (sequences * length))):
            pairs = [self.rows[row] for row in part for _ in range(sequences)]
            stage.precision.set([tau for tau, _ in pairs], [cap for _, cap in pairs])
            if int(part[0]) in self.carried:
                stage.precision.tell(*self.carried[int(part[0])])
            out = calls.run(stage.student, index, self.hidden[part].view(-1, length, width).to(device))
            self.hidden[part] = out.to(self.hidden.device).view(len(part), sequences, length, width)
            self.counts[part] += stage.precision.entry_counts().view(len(part), sequences, -1).sum(1)
            stage.precision.depth_shares(reset=True)
            ahead = [layer.next_place for layer in mobilinears(stage.student).values() if layer.next_place is not None]
            for place in ahead:
                self.carried[int(part[0])] = place, stage.precision.told(place, out.shape[0] * length)

    def run(self, stack: nn.ModuleList, calls: blocks.Calls, progress: Report) -> None:
        """`run_block` for every block of a model."""
        for index, block in enumerate(stack):
            self.run_block(block, index, calls)
            progress("measuring thresholds", index + 1, len(stack))

    def table(self) -> tuple[dict[str, Any], ...]:
        """Regions for `config.Checkpoint.thresholds`: thresholds falling, bits for every cap up to that of the region."""
        fine = self.curve.rows(np.linspace(0.004, 0.996, FINE).tolist())
        regions = []
        for cap in budget.region_caps(self.form):
            known = sorted(tau for tau, c in self.rows if c == cap)
            moved = [np.subtract(self._bits(tau, cap), self.curve.bits(tau, cap)) for tau in known]
            taus = sorted({tau for tau, c in fine if c == cap}, reverse=True)
            bits = np.array([self.curve.bits(tau, cap) for tau in taus])
            for c in range(cap):
                shifted = bits[:, c] + np.interp(taus, known, [m[c] for m in moved])
                # a lower threshold reads no less
                bits[:, c] = np.maximum.accumulate(shifted.clip(self.form.widths[0], self.form.widths[c]))
            # nor does a higher cap
            bits = np.maximum.accumulate(bits, axis=1)
            regions.append({"cap": cap, "tau": taus, "bits": bits.round(6).tolist()})
        return tuple(regions)

    def _bits(self, tau: float, cap: int) -> list[float]:
        """Average bits measured at a row, for every cap up to `cap`."""
        counts = self.counts[self.rows.index((tau, cap))]
        shares = (counts / counts.sum()).tolist()
        return [budget.average_bits(shares, self.form.widths, c) for c in range(1, cap + 1)]
