"""What happens to single tokens: their error at each width, which of them are worst where, and what the router does with them.

Outlier migration (MoBiQuant, arXiv 2602.20191, section 3): the tokens that suffer most at one width are not those that suffer
most at another, so what is calibrated for one width fits another badly. Errors are divergences from the float model in the
next-token distribution, `KL(float || quantised)` in nats, one for each token of a text but the last of each window.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import kl_div

from mobiquant import blocks, budget, clip
from mobiquant import slices as s
from mobiquant.config import Format
from mobiquant.linear import MobiLinear, mobilinears
from mobiquant.progress import Report

WORST = 0.1


@dataclass(frozen=True)
class Routed:
    """What one budget reads: bits of each token averaged over layers by size, of each layer averaged over tokens, by name."""

    bits: float
    by_token: Float[Tensor, " T"]
    by_layer: dict[str, float]
    divergence: Float[Tensor, " T"]


@dataclass(frozen=True)
class Analysis:
    """Errors of tokens [T] at each width [W], and reads of one budget; `tokens` [T] are those that the model has just read.

    `crossed[a, b]` is the divergence of the float model with ranges chosen for width a alone, read at width b.
    """

    widths: tuple[int, ...]
    tokens: Int[Tensor, " T"]
    divergence: Float[Tensor, "W T"]
    routed: Routed
    crossed: Float[Tensor, "W W"]

    def overlap(self) -> Float[Tensor, "W W"]:
        """Share of the worst tokens at one width (rows) that are among the worst at another (columns)."""
        worst = torch.stack([self._worst(row) for row in self.divergence]).double()
        return (worst @ worst.T / worst.sum(1, keepdim=True)).float()

    def _worst(self, errors: Float[Tensor, " T"]) -> Tensor:
        count = max(1, round(WORST * len(errors)))
        found = torch.zeros(len(errors), dtype=torch.bool)
        found[errors.topk(count).indices] = True
        return found

    def bits_of_worst(self) -> tuple[list[float], list[float]]:
        """Average bits that the budget gives the worst tokens of each width, and all others."""
        masks = [self._worst(row) for row in self.divergence]
        read = self.routed.by_token
        return [float(read[mask].mean()) for mask in masks], [float(read[~mask].mean()) for mask in masks]

    def share_of_worst(self) -> list[float]:
        """Share of the divergence at each width that its worst tokens make up."""
        return [float(row[self._worst(row)].sum() / row.sum().clamp_min(1e-30)) for row in self.divergence]

    def rows(self) -> list[dict[str, float]]:
        """One line for each width, for a table."""
        worst, others = self.bits_of_worst()
        columns = {
            "bits": list(self.widths),
            "kl": self.divergence.mean(1).tolist(),
            "median_kl": self.divergence.median(1).values.tolist(),
            "made_by_worst": self.share_of_worst(),
            "worst_also_at_full_depth": self.overlap()[:, -1].tolist(),
            "bits_of_worst": worst,
            "bits_of_others": others,
            "rank_correlation": self.rank_correlation(),
        }
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def rank_correlation(self) -> list[float]:
        """Spearman's correlation between the error at each width and the bits read."""
        return [_correlation(_ranks(row), _ranks(self.routed.by_token)) for row in self.divergence]


def _ranks(values: Float[Tensor, " T"]) -> Float[Tensor, " T"]:
    """Ranks from 0, equal values share their mean rank."""
    _, place, count = values.unique(sorted=True, return_inverse=True, return_counts=True)
    last = count.cumsum(0).double()
    return (last - (count - 1) / 2 - 1)[place].float()


def _correlation(a: Float[Tensor, " T"], b: Float[Tensor, " T"]) -> float:
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return float((a @ b) / (a.norm() * b.norm()).clamp_min(1e-30))


@torch.inference_mode()
def analyze(
    model: nn.Module, reference: nn.Module, windows: Int[Tensor, "S L"], bits: float, progress: Report = lambda *_: None
) -> Analysis:
    """Measure a quantised model against the float one on a text; both on one device. Their weights and precision stay."""
    form = budget.checkpoint_of(model).format
    form.check_bits(bits)
    device, widths = next(model.parameters()).device, form.widths
    steps, done = len(windows) * (1 + len(widths)), 0
    errors: list[list[Tensor]] = [[] for _ in widths]
    reads: list[Tensor] = []
    layers: dict[str, list[float]] = {}
    routed: list[Tensor] = []
    for window in windows:
        tokens = window[None].to(device)
        wanted = reference(tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        for row, width in zip(errors, widths, strict=True):
            with budget.precision(model, width, routed=False):
                row.append(_divergence(model, tokens, wanted))
        with budget.precision(model, bits), _reads(model, form, layers) as read:
            routed.append(_divergence(model, tokens, wanted))
        reads.append(read.bits[:-1].cpu())
        done += 1
        progress("measuring tokens", done, steps)
    crossed = torch.zeros(len(widths), len(widths))
    for a in range(len(widths)):
        with _ranges_for(reference, form, a) as read_at:
            for window in windows:
                tokens = window[None].to(device)
                read_at(None)
                wanted = reference(tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)
                for b in range(len(widths)):
                    read_at(b + 1)
                    crossed[a, b] += float(_divergence(reference, tokens, wanted).mean()) / len(windows)
                done += 1
                progress("reading one width's ranges at others", done, steps)
    by_layer = {name: sum(values) / len(values) for name, values in layers.items()}
    found = Routed(bits, torch.cat(reads), by_layer, torch.cat(routed))
    divergence = torch.stack([torch.cat(row) for row in errors])
    return Analysis(widths, windows[:, :-1].flatten(), divergence, found, crossed)


def _divergence(model: nn.Module, tokens: Int[Tensor, "1 L"], wanted: Float[Tensor, "L1 V"]) -> Float[Tensor, " L1"]:
    made = model(tokens, use_cache=False).logits[0, :-1].float().log_softmax(-1)
    return kl_div(made, wanted, reduction="none", log_target=True).sum(-1).cpu()


class _Reads:
    """Bits of each token [L], averaged over layers by size."""

    bits: Tensor


@contextmanager
def _reads(model: nn.Module, form: Format, by_layer: dict[str, list[float]]) -> Iterator[_Reads]:
    """While open, remember what each token of the next pass reads in each layer."""
    layers = mobilinears(model)
    total, weights, found = 0.0, 0, _Reads()

    def hook(name: str, layer: MobiLinear):
        def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal total, weights
            flat = args[0].reshape(-1, layer.in_features)
            depth = layer.depths(flat, None)
            if isinstance(depth, int):
                depth = torch.full((flat.shape[0],), depth, device=flat.device)
            read = torch.tensor(form.widths, device=flat.device)[depth - 1].float()
            size = layer.in_features * layer.out_features
            total, weights = total + read * size, weights + size
            by_layer.setdefault(name, []).append(float(read.mean()))

        return before

    handles = [layer.register_forward_pre_hook(hook(name, layer)) for name, layer in layers.items()]
    try:
        yield found
        found.bits = total / weights  # type: ignore[operator]
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _ranges_for(model: nn.Module, form: Format, place: int) -> Iterator:
    """While open, yields a function that sets the weights of a float model to reads of codes whose ranges suit one depth alone.

    Its argument is the depth to read, None for the weights themselves, which come back at the end.
    """
    _, stack = blocks.find_blocks(model)
    weights = {name: blocks.weight_of(layer) for name, layer in blocks.linears(stack).items()}
    kept = {name: weight.clone() for name, weight in weights.items()}
    alone = tuple(float(d == place) for d in range(len(form.widths)))
    grids: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, weight in kept.items():
        even = torch.ones(weight.shape[1], device=weight.device)
        scale, zero = clip.search(weight.float(), even, form.slices, form.group_size, alone)
        grids[name] = s.encode(weight, scale, zero, form.slices, form.group_size), scale, zero

    def read_at(depth: int | None) -> None:
        for name, weight in weights.items():
            weight.copy_(kept[name] if depth is None else s.read(*grids[name], form.slices, form.group_size, depth))

    try:
        yield read_at
    finally:
        read_at(None)
