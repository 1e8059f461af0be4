"""Perplexity, divergence from the float model, and the bits really read.

What: for each budget the perplexity over non-overlapping windows, `exp` of the mean negative log-likelihood of all tokens of a
window but its first, and the mean over those tokens of `KL(float || quantised)` of the next-token distribution, in nats.

How: windows are the outer loop, budgets the inner one, so that the float model predicts each window once. On CUDA several
windows run in one pass: reading the weights costs more there than the products with one window.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import kl_div, nll_loss

from mobiquant import blocks, budget, clip
from mobiquant import slices as s
from mobiquant.config import InputError
from mobiquant.progress import Report

ROWS = 256
WINDOWS = 8


@dataclass(frozen=True)
class Row:
    """One line of a report; `bits` is what was asked for, None for a float model, `kl` None without a reference."""

    name: str
    bits: float | None
    bits_read: float | None
    perplexity: float
    kl: float | None = None


class _Sums:
    """Running sums of one budget."""

    def __init__(self) -> None:
        self.loss = self.kl = self.read = 0.0
        self.tokens = 0

    def add(self, logits: Float[Tensor, "L V"], tokens: Int[Tensor, " L"], expected: Float[Tensor, "L V"] | None) -> None:
        """Add the predictions of one window, in parts of `ROWS` rows to bound memory; `expected` are log-probabilities."""
        targets = tokens[1:]
        for i in range(0, targets.numel(), ROWS):
            part = slice(i, min(i + ROWS, targets.numel()))
            predicted = logits[part].float().log_softmax(1)
            self.loss += float(nll_loss(predicted, targets[part], reduction="sum"))
            if expected is not None:
                self.kl += float(kl_div(predicted, expected[part], reduction="sum", log_target=True))
        self.tokens += targets.numel()

    def row(self, name: str, bits: float | None, windows: int, referenced: bool) -> Row:
        """The finished line."""
        # a model read at too few bits may be off by more than a float can say
        perplexity = math.exp(min(self.loss / self.tokens, 700.0))
        read = None if bits is None else self.read / windows
        return Row(name, bits, read, perplexity, self.kl / self.tokens if referenced else None)


def windows_per_pass(model: nn.Module, length: int) -> int:
    """Windows in one pass: one on a CPU; on CUDA up to `WINDOWS` whose logits fit in an eighth of the free memory."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return 1
    # logits in the model's dtype and fp32, and log-probabilities of the reference
    size = length * model.config.get_text_config().vocab_size * 12  # type: ignore[union-attr, operator]
    return max(1, min(WINDOWS, torch.cuda.mem_get_info(device)[0] // 8 // size))


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    windows: Int[Tensor, "S L"],
    bits: Sequence[float] = (),
    *,
    fixed: bool = False,
    reference: nn.Module | None = None,
    progress: Report = lambda *_: None,
) -> list[Row]:
    """One row for each budget of a quantised model, or one row where `bits` is empty (the model as it is).

    With `fixed` every token reads exactly the width, without routers. The precision of the model is as before afterwards.
    Raises InputError before any work on budgets that cannot be read.
    """
    if windows.shape[1] < 2:
        raise InputError(f"windows of {windows.shape[1]} token leave nothing to predict: give a --sequence-length of 2 or more")
    budgets: list[float | None] = [None] if not bits else list(bits)
    for b in bits:
        with budget.precision(model, b, routed=not fixed):
            pass
    sums = [_Sums() for _ in budgets]
    device = next(model.parameters()).device
    done = 0
    for part in windows.split(windows_per_pass(model, windows.shape[1])):
        tokens = part.to(device)
        expected = reference(tokens, use_cache=False).logits.float().log_softmax(-1) if reference is not None else None
        for b, total in zip(budgets, sums, strict=True):
            with nullcontext() if b is None else budget.precision(model, b, routed=not fixed):
                if b is not None:
                    budget.bits_read(model, reset=True)
                logits = model(tokens, use_cache=False).logits
                total.read += 0.0 if b is None else budget.bits_read(model, reset=True) * len(part)
            for i, window in enumerate(tokens):
                total.add(logits[i], window, None if expected is None else expected[i])
        done += len(part)
        progress("evaluating", done, windows.shape[0])
    kind = "float" if not bits else "fixed" if fixed else "routed"
    return [t.row(kind, b, windows.shape[0], reference is not None) for b, t in zip(budgets, sums, strict=True)]


@torch.no_grad()
def round_to_nearest(model: nn.Module, bits: int, group_size: int) -> None:
    """Replace the weights in the blocks by their round-to-nearest values of one width: the baseline, in place.

    Ordinary asymmetric quantisation of min and max of each group, with a whole zero point.
    """
    _, stack = blocks.find_blocks(model)
    for layer in blocks.linears(stack).values():
        weight = blocks.weight_of(layer)
        scale, _ = clip.min_max(weight, (bits,), group_size)
        low = clip.group_reduce(weight.float(), group_size, "amin", float("inf")).clamp(max=0)
        whole = (-low / scale.float()).round().clamp(0, 2**bits - 1)
        zero = (whole * 2 ** (s.ZERO_BITS - bits)).to(torch.uint8)
        code = s.encode(weight, scale, zero, (bits,), group_size)
        weight.copy_(s.dequantize(code, scale, zero, (bits,), group_size, 1))
