"""MoBiRoute: scores of the residual slices for each token, and the depth that follows from a threshold.

What, for a token `x` [K] (MoBiQuant, arXiv 2602.20191, section 4.2, with ordered gates):

    d = C silu(A x / rms(x) + a log rms(x) + a0) + c0         A [h, K] int8 with a scale for each row, C [E - 1, h]
    score_2 = d_1,   score_e = score_(e-1) - softplus(d_(e-1))
    depth = 1 + sum_e [score_e > tau],   at most cap

Why ordered: a deeper slice never scores above a shallower one, so the open gates are always a prefix and a lower threshold
never reads less. A token of fixed depth is `tau = -inf` with its depth as cap, so one pair of numbers for each token says
both modes and a batch may mix them.

Trade-off: `A` is nearly all of a router and is stored in int8; everything else is fp16 or fp32 and small.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Float16, Float32, Int, Int8
from torch import Tensor
from torch.nn.functional import silu, softplus

RMS_FLOOR = 1e-6


@dataclass(frozen=True)
class Router:
    """Parameters of one router, as stored."""

    weight: Int8[Tensor, "h K"]
    weight_scale: Float16[Tensor, " h"]
    rms: Float32[Tensor, " h"]
    bias: Float32[Tensor, " h"]
    out: Float32[Tensor, "R h"]
    out_bias: Float32[Tensor, " R"]


NAMES = tuple(field.name for field in fields(Router))


def shapes(columns: int, hidden: int, outputs: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each stored tensor of a router, in the order of `Router`."""
    return {
        "weight": ((hidden, columns), torch.int8),
        "weight_scale": ((hidden,), torch.float16),
        "rms": ((hidden,), torch.float32),
        "bias": ((hidden,), torch.float32),
        "out": ((outputs, hidden), torch.float32),
        "out_bias": ((outputs,), torch.float32),
    }


def stored_bits(columns: int, hidden: int, outputs: int) -> int:
    """Bits that one router takes in the checkpoint."""
    entries = shapes(columns, hidden, outputs).values()
    return sum(torch.Size(shape).numel() * dtype.itemsize * 8 for shape, dtype in entries)


def features(x: Float[Tensor, "T K"]) -> tuple[Float32[Tensor, "T K"], Float32[Tensor, "T 1"]]:
    """`x / rms(x)` and `log rms(x)`, fp32."""
    x = x.float()
    rms = x.square().mean(1, keepdim=True).sqrt().clamp_min(RMS_FLOOR)
    return x / rms, rms.log()


def order(d: Float[Tensor, "T R"]) -> Float[Tensor, "T R"]:
    """Free outputs -> scores that fall from slice to slice."""
    return torch.cat([d[:, :1], d[:, :1] - softplus(d[:, 1:]).cumsum(1)], 1)


def scores(x: Float[Tensor, "T K"], router: Router) -> Float32[Tensor, "T R"]:
    """Score of each residual slice for each token, falling along the slices."""
    return scores_of_all(x, [router])[0]


def scores_of_all(x: Float[Tensor, "T K"], routers: Sequence[Router]) -> list[Float32[Tensor, "T R"]]:
    """`scores` by several routers that read the same input; in fp32 under autocast too."""
    if not routers:
        return []
    with torch.autocast(x.device.type, enabled=False):
        f, log_rms = features(x)
        return [outputs(f @ one.weight.float().T, log_rms, one) for one in routers]


def outputs(projected: Float[Tensor, "T h"], log_rms: Float[Tensor, "T 1"], router: Router) -> Float32[Tensor, "T R"]:
    """Scores from the features times the stored rows of the first matrix."""
    hidden = projected * router.weight_scale.float() + log_rms * router.rms + router.bias
    return order(silu(hidden) @ router.out.T + router.out_bias)


def depths(score: Float32[Tensor, "T R"], tau: Float32[Tensor, " T1"], cap: Int[Tensor, " T1"]) -> Int[Tensor, " T"]:
    """Slices that each token reads; `tau` and `cap` have one entry, or one for each token."""
    return torch.minimum(1 + (score > tau[:, None]).sum(1), cap)


def store(weight: Float[Tensor, "h K"], rms: Tensor, bias: Tensor, out: Tensor, out_bias: Tensor) -> Router:
    """Trained parameters -> stored router; the rows of `weight` are rounded to int8."""
    scale = (weight.abs().amax(1) / 127).clamp(2.0**-24, 65504).half()
    rounded = (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return Router(rounded, scale, rms.float(), bias.float(), out.float(), out_bias.float())
