"""The `fast` recipe: closed forms only, minutes on a CPU.

For each block, and in it for each input that linear layers share, in running order:

1. second moments of that input under the float model and under students that read each depth of at most 4 bits, the layers
   before it already quantised;
2. ranges chosen for all depths at once (`clip`), then codes by coordinate descent on the output error (`compensate`);
3. a router by regression on the measured gain of each slice.

Choice: the target of a depth is half way (`DRIFT`) between the outputs of the float model and what the float weights make of
the drifted inputs. The whole way repairs more at 2 bits, where drift is largest, but all depths share one code, so the
repair is paid for at 8 bits; no way at all leaves a third of the 2-bit perplexity on the table (`docs/results/fast.md`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mobiquant import blocks, clip, compensate, router
from mobiquant import slices as s
from mobiquant.calibrate import routers
from mobiquant.calibrate.streams import FLOAT, First, Holder, Reading, Sample, Stage, Streams, fixed
from mobiquant.config import Calibration, Format
from mobiquant.linear import MobiLinear

DRIFT = 0.5
# added to the diagonal of H, relative to its mean: keeps few tokens from inventing correlations
DAMPING = 0.01
STUDENT_BITS = 4


@dataclass(frozen=True)
class Fitted:
    """What a recipe reports of one router: layers it serves, their weights, scores of sample tokens.

    `explains` is the share of the variance of the first slice's gain over tokens that the scores explain.
    """

    names: tuple[str, ...]
    size: int
    scores: Float[Tensor, "T R"]
    explains: float = float("nan")


def readings(form: Format) -> list[Reading]:
    """Streams that the recipe needs: the float model and students of each depth of at most 4 bits."""
    return [FLOAT, *(fixed(d + 1) for d, width in enumerate(form.widths) if width <= STUDENT_BITS)]


def quantize_block(
    stage: Stage, streams: Streams, groups: list[list[str]], form: Format, settings: Calibration, route: bool = True
) -> tuple[list[Fitted], list[dict[str, Any]]]:
    """Replace the named layers of the student by quantised ones; the log says how well routers fit, if they are to `route`."""
    fitted: list[Fitted] = []
    for place, names in enumerate(groups):
        own, mixed, sample = streams.moments(stage, names[0])
        weights = [blocks.weight_of(stage.teacher.get_submodule(name)) for name in names]
        grid, code = solve(torch.cat(weights), own, mixed, form, settings)
        layers = install(stage, names, grid, code, form, place)
        if place == 0:
            stage.first = First(layers[0], sample)
        if route:
            read, holder = stage.router_of(place, layers[0], sample, form)
            fitted += fit_routers(names, layers, sample, read, holder, torch.cat(weights), grid.read(code), form)
    return fitted, log_of(fitted)


def log_of(fitted: list[Fitted]) -> list[dict[str, Any]]:
    """How well each router fits, for the log."""
    return [{"input": one.names[0], "router_explains": round(one.explains, 4)} for one in fitted]


@torch.no_grad()
def solve(
    weight: Float[Tensor, "N K"],
    own: dict[Reading, Tensor],
    mixed: dict[Reading, Tensor],
    form: Format,
    settings: Calibration,
) -> tuple[compensate.Grid, Tensor]:
    """Grid and codes of one weight matrix from the second moments of its inputs."""
    lam = settings.depth_weights or ()
    unit = own[FLOAT].diagonal().mean().clamp_min(1e-30)
    hessians: dict[Reading, Tensor] = {}
    crosses: dict[Reading, Tensor] = {}
    for reading in own:
        h = own[reading] / unit
        target = h if reading is FLOAT else DRIFT * mixed[reading] / unit + (1 - DRIFT) * h
        ridge = torch.eye(h.shape[0], device=h.device) * (DAMPING * h.diagonal().mean())
        hessians[reading] = h + ridge
        crosses[reading] = weight @ (target + ridge)
    scale, zero = clip.search(weight, hessians[FLOAT].diagonal(), form.slices, form.group_size, lam)
    grid = compensate.Grid(scale, zero, form.slices, form.group_size)
    by_depth = [fixed(d) if fixed(d) in own else FLOAT for d in range(1, len(form.slices) + 1)]
    problem = compensate.Problem(torch.stack([hessians[r] for r in by_depth]), torch.stack([crosses[r] for r in by_depth]), lam)
    code = s.encode(weight, scale, zero, form.slices, form.group_size)
    return grid, compensate.descend(code, grid, problem, settings.sweeps or 0)


def install(stage: Stage, names: list[str], grid: compensate.Grid, code: Tensor, form: Format, place: int) -> list[MobiLinear]:
    """Put quantised layers in the place of the student's; rows of `code` are those of the layers one after another.

    `place` is that of their input in the block.
    """
    layers: list[MobiLinear] = []
    start, columns, ahead = 0, code.shape[1], form.routers == "per-block"
    first = stage.first.layer if stage.first and ahead else None
    # the router of the first layers of a block lies in the block before
    carried = ahead and place == 0 and stage.before is not None
    for name in names:
        old = stage.student.get_submodule(name)
        rows = slice(start, start + blocks.weight_of(old).shape[0])
        bias = getattr(old, "bias", None)
        owns = not layers or form.routers == "per-linear"
        reads = (first.in_features if first else columns) if owns and not carried else None
        dtype, following = None if bias is None else bias.dtype, stage.next_place if ahead and place == 0 and owns else None
        layer = MobiLinear(columns, rows.stop - start, form, reads, dtype, following).to(stage.device)
        layer.set_weight(code[rows], grid.scale[rows], grid.zero[rows], bias)
        among = stage.place + place if ahead and owns and (first or carried) else None
        layer.attach(stage.precision, layer if owns else layers[0], among, first if owns else None)
        blocks.replace(stage.student, name, layer)
        layers.append(layer)
        start = rows.stop
    return layers


def fit_routers(
    names: list[str],
    layers: list[MobiLinear],
    sample: Sample,
    read: Sample,
    holder: Holder,
    weight: Float[Tensor, "N K"],
    reads: Float[Tensor, "E N K"],
    form: Format,
    offset: Float[Tensor, " R"] | None = None,
) -> list[Fitted]:
    """Fit the routers of the layers of one input, whose rows lie one after another in `weight` and `reads`.

    `sample` is of that input, `read` of what the routers read, for the same tokens; `holder` keeps a router that layers share.
    """
    if form.routers != "per-linear":
        return [_route(names, holder, sample, read, weight, reads, form, offset)]
    fitted: list[Fitted] = []
    start = 0
    for name, layer in zip(names, layers, strict=True):
        rows = slice(start, start + layer.out_features)
        fitted.append(_route([name], (layer, False), sample, read, weight[rows], reads[:, rows], form, offset))
        start = rows.stop
    return fitted


def _route(
    names: list[str], holder: Holder, sample: Sample, read: Sample, weight: Tensor, reads: Tensor, form: Format,
    offset: Tensor | None,
) -> Fitted:  # fmt: skip
    target = routers.targets(sample.tokens, weight, reads, offset)
    fitted = routers.fit(read.tokens, target, read.firsts, form)
    layer, ahead = holder
    layer.set_router(fitted, ahead)
    with torch.no_grad():
        scores = router.scores(read.tokens, fitted)
        return Fitted(tuple(names), weight.numel(), scores.cpu(), routers.explained(scores, target))
