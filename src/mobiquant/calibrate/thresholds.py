"""The table `avg_bits <-> threshold`, measured on calibration tokens that run through the routed model.

Thresholds are first read off the scores that sample tokens got while the routers were fitted. Depths chosen in one block
change the inputs of the next, so the bits really read are then measured by running one stream of tokens for each row of the
table through the quantised blocks.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mobiquant import blocks, budget
from mobiquant.calibrate.fast import Fitted
from mobiquant.calibrate.streams import Stage, Streams
from mobiquant.config import Format
from mobiquant.linear import Precision

# shares of the budgets of a region at which a row is measured
SHARES = (0.03, 0.15, 0.35, 0.6, 0.85, 0.97)
TOKENS = 1536


def rows(form: Format, fitted: list[Fitted]) -> list[tuple[float, int]]:
    """`(tau, cap)` of each row, from the scores of sample tokens."""
    found: list[tuple[float, int]] = []
    below = form.widths[0]
    for cap in budget.region_caps(form):
        low, high = form.widths[0], form.widths[cap - 1]
        # a later region is asked only for budgets that the one before cannot serve
        start = max(below - 0.3, low) if below > low else low
        for share in SHARES:
            found.append((_tau_for(start + share * (high - start), cap, form, fitted), cap))
        below = high
    return found


def _tau_for(bits: float, cap: int, form: Format, fitted: list[Fitted]) -> float:
    """Threshold at which the sample tokens read `bits` on average, by bisection."""
    low = min(float(f.scores.min()) for f in fitted) - 1
    high = max(float(f.scores.max()) for f in fitted) + 1
    sizes = torch.tensor([f.size for f in fitted], dtype=torch.float64)
    steps = torch.tensor(form.slices[1:cap], dtype=torch.float64)
    for _ in range(40):
        tau = (low + high) / 2
        open_gates = torch.stack([(f.scores[:, : cap - 1] > tau).double().mean(0) for f in fitted])
        read = form.widths[0] + float((sizes @ (open_gates @ steps)) / sizes.sum())
        low, high = (tau, high) if read > bits else (low, tau)
    return tau


class Measured:
    """Streams of calibration tokens, one for each row, with what they read so far."""

    def __init__(self, hidden: Float[Tensor, "S L D"], form: Format, fitted: list[Fitted], batch: int):
        kept = max(1, -(-TOKENS // hidden.shape[1]))
        spread = torch.linspace(0, hidden.shape[0] - 1, min(kept, hidden.shape[0])).long()
        self.form, self.rows = form, rows(form, fitted)
        self.streams = Streams(hidden[spread], self.rows, batch)
        self.counts = {reading: torch.zeros(len(form.slices), dtype=torch.float64) for reading in self.rows}

    @torch.no_grad()
    def run_block(self, block: nn.Module, index: int, calls: blocks.Calls, device: torch.device) -> None:
        """Move every stream behind one quantised block and count the depths read in it."""
        precision = Precision(self.form.widths)
        stage = Stage(block, index, calls, precision, device)
        size = sum(layer.in_features * layer.out_features for layer in stage.mobilinears(stage.student).values())
        for reading, hidden in self.streams.hidden.items():
            for part in self.streams.parts():
                hidden[part] = stage.run(reading, hidden[part]).cpu()
            self.counts[reading] += torch.tensor(precision.depth_shares(reset=True), dtype=torch.float64) * size

    def table(self) -> tuple[dict[str, object], ...]:
        """Regions for `config.Checkpoint.thresholds`: thresholds falling, bits for every cap up to that of the region."""
        regions: dict[int, dict[str, object]] = {}
        for tau, cap in sorted(self.rows, reverse=True):
            region = regions.setdefault(cap, {"cap": cap, "tau": [], "bits": []})
            shares = (self.counts[tau, cap] / self.counts[tau, cap].sum()).tolist()
            region["tau"].append(tau)  # type: ignore[attr-defined]
            bits = [round(budget.average_bits(shares, self.form.widths, c), 6) for c in range(1, cap + 1)]
            region["bits"].append(bits)  # type: ignore[attr-defined]
        return tuple(regions[cap] for cap in sorted(regions))
