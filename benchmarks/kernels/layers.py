"""All linear layers of a model as one CUDA graph, at fixed widths and routed, beside bf16 and torch's own 4-bit product.

Weights are random and each block has its own, so that a graph reads far more than the second-level cache holds. Nothing is
timed on zeros. Bytes are those that the widths say: planes, scales and zero points, and routers where they decide.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from clock import captured, median
from shapes import Input, Model
from torch import Tensor
from torch.nn.functional import linear

from mobiquant import router
from mobiquant.config import Format
from mobiquant.kernels.cuda import few, many, tiles

SLICES, WIDTHS, GROUP, HIDDEN = (2, 1, 1, 2, 2), (2, 3, 4, 6, 8), 128, Format().router_hidden
SHUT, OPEN = float("-inf"), -1e30
DTYPE = torch.bfloat16


@dataclass
class Row:
    """One measurement: microseconds for all blocks, bytes of weights that were read, bits by token and at most in the batch."""

    name: str
    tokens: int
    bits: float | None
    deepest: float | None
    microseconds: float
    bytes: float


def random_tiles(rows: int, columns: int, generator: torch.Generator) -> tiles.Tiles:
    """A weight of random codes, in the layout of the kernels at once."""
    device = generator.device
    across, down = -(-columns // tiles.COLUMNS), -(-rows // tiles.ROWS)
    pieces = [
        torch.randint(0, 256, (down, across, 32, 8 * piece.width), dtype=torch.uint8, device=device, generator=generator)
        for piece in tiles.pieces_of(SLICES)
    ]
    shape = down, -(-columns // GROUP), 8, 4
    scale = (torch.rand(shape, device=device, generator=generator) * 0.01 + 0.01).half()
    zero = torch.randint(60, 200, shape, dtype=torch.uint8, device=device, generator=generator)
    return tiles.Tiles(pieces, scale, zero, rows, columns, SLICES, GROUP)


def random_router(columns: int, generator: torch.Generator) -> router.Router:
    """A router whose scores differ from token to token and fall from slice to slice."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=generator.device, generator=generator)

    outputs = len(SLICES) - 1
    return router.store(
        normal(HIDDEN, columns) / columns**0.5, normal(HIDDEN), normal(HIDDEN), normal(outputs, HIDDEN), normal(outputs)
    )


@dataclass
class Launch:
    """The layers of one input: with routers, without, and where the depths of its tokens lie once they are decided."""

    input: Input
    routed: few.Group
    plain: few.Group
    decided: Tensor
    ahead: bool


class Stack:
    """The layers of all blocks, and the inputs that they are given; routers are `config.Format.routers`."""

    def __init__(self, model: Model, device: torch.device, routers: str = "per-block", seed: int = 0):
        self.model, self.device, self.routers = model, device, routers
        generator = torch.Generator(device).manual_seed(seed)
        self.generator = generator
        self.launches: list[Launch] = []
        for _ in range(model.blocks):
            self.launches += self._block(generator)
        self.tau = torch.full((1,), SHUT, device=device)
        self.cap = torch.full((1,), len(SLICES), device=device)
        self.read = torch.zeros(1, len(SLICES), dtype=torch.float64, device=device)

    def _block(self, generator: torch.Generator) -> list[Launch]:
        made: list[Launch] = []
        decided: list[Tensor] = []
        ahead = self.routers == "per-block"
        before = self.launches[-len(self.model.inputs)] if ahead and self.launches else None
        last = len(self.launches) == (self.model.blocks - 1) * len(self.model.inputs)
        for i, one in enumerate(self.model.inputs):
            laid = [random_tiles(rows, one.columns, generator) for rows in one.rows]
            none: list[Tensor | None] = [None] * len(laid)
            # the first layers decide for the rest of the block and the first of the next, in the first block for themselves
            count = (0 if i else len(self.model.inputs) - last + (before is None)) if ahead else 1
            scoring = [tiles.prepare_router(random_router(one.columns, generator)) for _ in range(count)]
            given = ahead and (i > 0 or before is not None)
            routed = few.Group(laid, none, scoring, given)
            if not ahead:
                decided = [routed.depths[0]]
            elif i == 0:
                # what the block before has decided, then what this one does, in the order of the inputs
                decided = [*([] if before is None else before.routed.depths[-1:]), *routed.depths]
            made.append(Launch(one, routed, few.Group(laid, none), decided[i if ahead else 0], given))
        return made

    def inputs(self, tokens: int) -> dict[int, Tensor]:
        """Random activations by their columns."""
        columns = {one.columns for one in self.model.inputs}
        return {c: torch.randn(tokens, c, device=self.device, generator=self.generator).to(DTYPE) for c in columns}

    def all(self, x: dict[int, Tensor], routed: bool) -> Callable[[], Any]:
        """Every product of every block; with routers or without."""

        def run() -> Any:
            for one in self.launches:
                given = one.decided if routed and one.ahead else None
                group = one.routed if routed else one.plain
                made = group(x[one.input.columns], self.tau, self.cap, self.read, given)
            return made

        return run

    def bits_read(self, replay: Callable[[], Any]) -> tuple[float, float]:
        """Mean bits that the tokens of one replay read, and the mean over launches of the deepest token's."""
        self.read.zero_()
        for one in self.launches:
            # tokens of a larger batch before
            one.decided.fill_(1)
        replay()
        shares = (self.read[0] / self.read.sum()).tolist()
        mean = sum(share * width for share, width in zip(shares, WIDTHS, strict=True))
        sizes = [float(sum(one.input.rows) * one.input.columns) for one in self.launches]
        most = [WIDTHS[int(one.decided.max()) - 1] for one in self.launches]
        return mean, sum(size * width for size, width in zip(sizes, most, strict=True)) / sum(sizes)

    def aim(self, replay: Callable[[], Any], bits: float) -> None:
        """Set the threshold at which a replay reads about so many bits."""
        low, high = -60.0, 60.0
        self.cap.fill_(len(SLICES))
        for _ in range(16):
            middle = (low + high) / 2
            self.tau.fill_(middle)
            mean, _ = self.bits_read(replay)
            low, high = (low, middle) if mean < bits else (middle, high)

    def bytes(self, bits: float, routed: bool) -> float:
        """Bytes of weights at a width, with scales and zero points and the routers that decide."""
        scoring = sum(HIDDEN * one.input.columns * len(one.routed.routers) for one in self.launches) if routed else 0
        return self.model.weights * (bits + 24 / GROUP) / 8 + scoring


def decode(stack: Stack, tokens: int, fixed: tuple[int, ...], routed: tuple[float, ...]) -> Iterator[Row]:
    """Rows of few tokens: without routers, with routers that come out at one width for all tokens, and routed."""
    x, device = stack.inputs(tokens), stack.device
    plain, scored = captured(stack.all(x, False), device), captured(stack.all(x, True), device)
    for width in fixed:
        depth = WIDTHS.index(width) + 1
        stack.tau.fill_(SHUT)
        stack.cap.fill_(depth)
        yield Row("fixed", tokens, width, width, median(plain, device), stack.bytes(width, False))
        stack.tau.fill_(OPEN)
        yield Row("all at one width, with routers", tokens, width, width, median(scored, device), stack.bytes(width, True))
    for bits in routed:
        stack.aim(scored, bits)
        mean, deepest = stack.bits_read(scored)
        yield Row("routed", tokens, mean, deepest, median(scored, device), stack.bytes(deepest, True))


def prefill(stack: Stack, tokens: int, fixed: tuple[int, ...]) -> Iterator[Row]:
    """Rows of many tokens, the layers of one input together."""
    x, device = stack.inputs(tokens), stack.device
    layers = [(one.input.columns, one.plain.members) for one in stack.launches]
    drawn = torch.randint(1, 4, (tokens,), device=device, generator=stack.generator)

    def run(depth: Any) -> Callable[[], Any]:
        return lambda: [many.product(x[columns], members, depth) for columns, members in layers]

    for width in fixed:
        taken = median(captured(run(WIDTHS.index(width) + 1), device), device)
        yield Row("fixed", tokens, width, width, taken, stack.bytes(width, False))
    taken = median(captured(run(drawn), device), device)
    yield Row("mixed", tokens, 3.0, 4.0, taken, stack.bytes(4.0, False))


@contextmanager
def dense(model: Model, device: torch.device) -> Iterator[list[tuple[int, Tensor]]]:
    """Random bf16 weights of all blocks, the layers of one input together, freed afterwards."""
    made = [
        (one.columns, torch.randn(sum(one.rows), one.columns, device=device, dtype=DTYPE))
        for _ in range(model.blocks)
        for one in model.inputs
    ]
    try:
        yield made
    finally:
        made.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def bf16(weights: list[tuple[int, Tensor]], x: dict[int, Tensor], device: torch.device, size: int) -> Row:
    """torch's own product in bf16."""
    run = captured(lambda: [linear(x[columns], weight) for columns, weight in weights], device)
    tokens = next(iter(x.values())).shape[0]
    return Row("bf16 (torch)", tokens, 16, 16, median(run, device), size * 2.0)


def tinygemm(weights: list[tuple[int, Tensor]], x: dict[int, Tensor], device: torch.device, size: int) -> Row | None:
    """torch's own 4-bit product (`_weight_int4pack_mm`), groups of 128, random codes; None where this torch has none."""
    if device.type != "cuda" or any(columns % 128 or weight.shape[0] % 8 for columns, weight in weights):
        return None
    laid = []
    for columns, weight in weights:
        codes = torch.randint(0, 256, (weight.shape[0], columns // 2), dtype=torch.uint8, device=device)
        scales = torch.rand(columns // 128, weight.shape[0], 2, dtype=DTYPE, device=device)
        laid.append((columns, torch.ops.aten._convert_weight_to_int4pack(codes, 8), scales))
    run = captured(
        lambda: [torch.ops.aten._weight_int4pack_mm(x[c], packed, 128, scales) for c, packed, scales in laid], device
    )
    tokens = next(iter(x.values())).shape[0]
    return Row("int4 (torch)", tokens, 4, 4, median(run, device), size * (4 + 32 / 128) / 8)
