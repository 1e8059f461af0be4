"""Divergence of two next-token distributions and its gradient in one Triton launch (`calibrate.passes`).

In torch the same takes a dozen passes over fp32 arrays as large as all logits. A program takes one token and reads its logits
twice: once for the normalisers, once for the divergence and the gradient. The order of sums is always the same.
"""

# Triton comes with CUDA builds of torch only, and kernels are a language of their own
# pyright: reportMissingImports=false, reportGeneralTypeIssues=false, reportIndexIssue=false
from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
@no_type_check
def _joined(greatest, total, x):
    """Greatest value and sum of exponentials below it, with the values of one more block."""
    new = tl.maximum(greatest, tl.max(x, axis=0))
    return new, total * tl.exp(greatest - new) + tl.sum(tl.exp(x - new), axis=0)


@triton.jit
@no_type_check
def _divergence(made, wanted, out, gradient, V, BLOCKS: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, B)
    ours, theirs = made + row * V, wanted + row * V
    high = tl.full([], float("-inf"), tl.float32)
    best = tl.full([], float("-inf"), tl.float32)
    sum_ours = tl.full([], 0.0, tl.float32)
    sum_theirs = tl.full([], 0.0, tl.float32)
    for i in range(0, BLOCKS):
        inside = i * B + lane < V
        x = tl.load(ours + i * B + lane, mask=inside, other=float("-inf")).to(tl.float32)
        y = tl.load(theirs + i * B + lane, mask=inside, other=float("-inf")).to(tl.float32)
        high, sum_ours = _joined(high, sum_ours, x)
        best, sum_theirs = _joined(best, sum_theirs, y)
    from_ours, from_theirs = high + tl.log(sum_ours), best + tl.log(sum_theirs)
    total = tl.full([], 0.0, tl.float32)
    for i in range(0, BLOCKS):
        inside = i * B + lane < V
        x = tl.load(ours + i * B + lane, mask=inside, other=0.0).to(tl.float32) - from_ours
        y = tl.load(theirs + i * B + lane, mask=inside, other=0.0).to(tl.float32) - from_theirs
        p = tl.exp(y)
        total += tl.sum(tl.where(inside, p * (y - x), 0.0), axis=0)
        tl.store(gradient + row * V + i * B + lane, (tl.exp(x) - p).to(gradient.dtype.element_ty), mask=inside)
    tl.store(out + row, total)


class Divergence(torch.autograd.Function):
    """`KL(softmax(wanted) || softmax(made))` of each row in nats, fp32 [T], from logits [T, V] of any float dtype.

    Differentiable by `made` once; the gradient has its dtype.
    """

    @staticmethod
    def forward(ctx: Any, made: Tensor, wanted: Tensor) -> Tensor:
        made, wanted = made.contiguous(), wanted.contiguous()
        rows, size = made.shape
        out = torch.empty(rows, dtype=torch.float32, device=made.device)
        ctx.gradient = torch.empty_like(made)
        _divergence[(rows,)](made, wanted, out, ctx.gradient, size, BLOCKS=triton.cdiv(size, BLOCK), B=BLOCK, num_warps=8)
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient, ctx.gradient = ctx.gradient, None
        return gradient.mul_(slope[:, None]), None
