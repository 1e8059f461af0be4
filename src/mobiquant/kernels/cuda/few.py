"""Few tokens by all layers that read one input, in one launch of `few.cu`: router, thresholds and products.

A `Group` is prepared once from the layers and their router. Thresholds, caps and counters are device tensors whose addresses
are handed over, so a captured CUDA graph follows when they are changed in place.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Float64, Int32, Int64
from torch import Tensor

from mobiquant.kernels.cuda import compiler
from mobiquant.kernels.cuda.tiles import COLUMNS, LANES, RouterTiles, Tiles, definitions

MEMBERS, ROUTERS, MOST = 4, 8, 16
# bytes of `Wanted` in `launch.h`, twice
WANTED = 2 * (12 * MOST + 16)


class Shape(NamedTuple):
    """Warps of a block, blocks for which a processor has registers (the next launch begins beside this one), bytes of tiles on
    their way to a warp (two of eight bits at least), and buffers of sums."""

    warps: int
    blocks: int
    ring: int = 4608
    buffers: int = 2


# by fours of tokens
SHAPES = {1: Shape(16, 2), 2: Shape(16, 1), 4: Shape(8, 1)}
# where routers neither score nor have decided, depths seldom differ
FIXED = {2: Shape(8, 2, ring=6912)}
# where shared memory does not hold these: x of more columns is worth more than warps
NARROW = {2: Shape(8, 1, buffers=1)}
# what `ROUTED` says in `score.h`
NOBODY, ITSELF, OTHERS = 0, 1, 2
# what `input` says in `launch.h`
PLAIN, NORM, GATE = 0, 1, 2
# tensors of a router but for its first matrix
SMALL = ("weight_scale", "rms", "bias", "out", "out_bias")
DTYPES = (torch.float16, torch.bfloat16)
# bytes of shared memory that a block may take on every GPU that the kernels are for, and of one that has less than Hopper
MEMORY = {(8, 0): 163 << 10, (8, 7): 163 << 10, (8, 6): 99 << 10, (8, 9): 99 << 10, (12, 0): 99 << 10, (12, 1): 99 << 10}
USUAL_MEMORY = 227 << 10
# beyond half of what a block may take: a processor has some more, in which two would fit
ALONE = 2 << 10


@dataclass(frozen=True)
class Norm:
    """What makes the input of a launch, for one token: `weight * h / rms(h)` with `h = x + more`, which `sum` becomes."""

    more: Float[Tensor, "1 K"] | None
    weight: Float[Tensor, " K"]
    sum: Float[Tensor, "1 K"]
    epsilon: float


@dataclass(frozen=True)
class Gate:
    """What makes the input of a launch, for one token: `silu(x) * up`."""

    up: Float[Tensor, "1 K"]


@lru_cache(maxsize=8)
def parameters(pieces: int) -> type[ctypes.Structure]:
    """`Params` of `few.cu` for a number of pieces."""
    address, whole = ctypes.c_uint64, ctypes.c_int32

    class Member(ctypes.Structure):
        _fields_ = [("pieces", address * pieces)] + [(n, address) for n in ("scale", "zero", "bias", "out")] \
            + [("rows", whole), ("end", whole)]  # fmt: skip

    class Router(ctypes.Structure):
        _fields_ = [(n, address) for n in (*SMALL, "weight", "partial", "depth")]

    class Routers(ctypes.Structure):
        _fields_ = [("each", Router * ROUTERS), ("state", address)] + [(n, whole) for n in ("count", "hidden", "scores")]

    class Params(ctypes.Structure):
        _fields_ = [("members", Member * MEMBERS), ("routers", Routers)] \
            + [(n, address) for n in ("given", "x", "more", "by", "sum", "staged", "tau", "cap", "read")] \
            + [("weights", ctypes.c_double)] \
            + [(n, whole) for n in ("tokens", "columns", "column_tiles", "row_tiles", "groups", "entries", "depths")] \
            + [(n, whole) for n in ("parts", "deciders", "busy", "before", "per", "input")] \
            + [("epsilon", ctypes.c_float)]  # fmt: skip

    return Params


class Group:
    """Layers that read one input, their weights in tiles on one device, with the routers that score it.

    The first router decides for these layers, the others for launches to come; where depths are `given` to each call, all do
    that. `depths` [routers, 16] int32 holds what they decided for the tokens of the last call.
    """

    def __init__(
        self, members: Sequence[Tiles], biases: Sequence[Tensor | None], routers: Sequence[RouterTiles] = (),
        given: bool = False,
    ):  # fmt: skip
        if not 1 <= len(members) <= MEMBERS or len(routers) > ROUTERS:
            raise ValueError(
                f"{len(members)} layers of one input and {len(routers)} routers: a launch takes {MEMBERS} and {ROUTERS}"
            )
        first = members[0]
        self.members, self.routers, self.given, self.device = members, routers, given, first.scale.device
        self.biases = [None if bias is None else bias.float().contiguous() for bias in biases]
        self.group_size = first.group_size
        self.row_tiles = sum(one.scale.shape[0] for one in members)
        self.processors, self.limit = compiler.processors(self.device), shared_memory(self.device)
        self.definitions = definitions(first.slices, first.group_size)
        self.params = parameters(len(first.pieces))()
        self._fill(first)

    def _fill(self, first: Tiles) -> None:
        """What stays the same from launch to launch."""
        p, end = self.params, 0
        p.columns, p.column_tiles, p.groups = first.columns, first.pieces[0].shape[1], first.scale.shape[1]
        p.depths, p.row_tiles = len(first.slices), self.row_tiles
        p.weights = float(sum(one.rows for one in self.members) * first.columns)
        for to, one, bias in zip(p.members, self.members, self.biases, strict=False):
            end += one.scale.shape[0]
            for i, piece in enumerate(one.pieces):
                to.pieces[i] = piece.data_ptr()
            to.scale, to.zero, to.bias = one.scale.data_ptr(), one.zero.data_ptr(), 0 if bias is None else bias.data_ptr()
            to.rows, to.end = one.rows, end
        routers = [one.router for one in self.routers]
        if len({one.out.shape for one in routers}) > 1:
            raise ValueError("routers of one input differ in hidden units or scores: a launch takes those of one format")
        p.routers.hidden = max((one.weight.shape[0] for one in routers), default=0)
        p.routers.scores = max((one.out.shape[0] for one in routers), default=0)
        # the first launch is number 1: partial sums of number 0 are none
        self.state = torch.tensor([1, 0], dtype=torch.int32, device=self.device)
        p.routers.state, p.routers.count = self.state.data_ptr(), len(routers)
        # read before it was ever written as a guess: any depth will do
        self.depths = torch.ones(max(len(routers), 1), MOST, dtype=torch.int32, device=self.device)
        sums = p.column_tiles * (p.routers.hidden + 1) * MOST
        self.partial = torch.zeros(len(routers), sums, 2, dtype=torch.int32, device=self.device)
        # held, since addresses are
        self.held = [[getattr(one, name).contiguous() for name in SMALL] for one in routers]
        for i, (to, one, small) in enumerate(zip(p.routers.each, self.routers, self.held, strict=False)):
            to.weight, to.partial, to.depth = (part.data_ptr() for part in (one.weight, self.partial[i], self.depths[i]))
            for name, tensor in zip(SMALL, small, strict=True):
                setattr(to, name, tensor.data_ptr())

    def staged(self, tokens: int) -> int:
        """Bytes of x in bytes, with scale and sum of each group."""
        columns = -(-self.params.column_tiles // 2) * 2 * COLUMNS
        return 2 * tokens * (columns + 64) + columns // self.group_size * 4 * fours(tokens) * 8

    def shape(self, tokens: int) -> Shape:
        """Of a launch for so many tokens."""
        count = fours(tokens)
        usual = SHAPES[count] if self.routers or self.given else FIXED.get(count, SHAPES[count])
        narrow = NARROW.get(count, usual)
        return narrow if self._memory(tokens, usual) > self.limit >= self._memory(tokens, narrow) else usual

    def memory(self, tokens: int) -> int:
        """Bytes of shared memory for so many tokens."""
        return self._memory(tokens, self.shape(tokens))

    def _memory(self, tokens: int, shape: Shape) -> int:
        """Tiles on their way, x in bytes, sums of warps, depths, thresholds and caps, and the router but its first matrix."""
        p, padded = self.params, 4 * fours(tokens)
        scoring = p.routers.hidden * (p.routers.scores + 3) + p.routers.scores
        floats = shape.buffers * shape.warps * padded * 33 + padded + scoring
        return shape.warps * shape.ring + self.staged(tokens) + floats * 4 + WANTED

    def fits(self) -> int:
        """Tokens that one launch takes: 16, or fewer where shared memory does not hold x of so many, or 0."""
        held = [n for n in (4, 8, 16) if self.memory(n) <= self.limit]
        return next((n for n in (16, 8, 4) if all(m in held for m in (4, 8, 16) if m <= n)), 0)

    def most(self) -> int:
        """Tokens that a call takes, in as many launches as are needed; 0 where shared memory does not hold x of four."""
        return MOST if self.fits() else 0

    def kernel(self, dtype: torch.dtype, tokens: int, name: str = "few", makes: bool = False) -> compiler.Kernel:
        """The kernel for a dtype of activations and up to 4, 8 or 16 tokens, one that `makes` x, or the one before, `bytes`."""
        # launches whose depths were decided before are one kernel, with routers or without: two would take turns in the cache
        # of instructions
        routed = OTHERS if self.given else ITSELF if self.routers else NOBODY
        how = int(dtype == torch.bfloat16), fours(tokens), *self.shape(tokens), routed if name == "few" else NOBODY
        more = zip(("BF16", "NT", "WARPS", "PER", "RING", "BUFFERS", "ROUTED", "MAKES"), (*how, int(makes)), strict=True)
        return compiler.kernel(name, (*self.definitions, *more), self.device.index or 0)

    def __call__(
        self, x: Float[Tensor, "T K"], tau: Float32[Tensor, " P"], cap: Int64[Tensor, " P"], read: Float64[Tensor, "P E"],
        given: Int32[Tensor, " T1"] | None = None, before: Norm | Gate | None = None, alone: bool = False,
    ) -> list[Float[Tensor, "T _"]]:  # fmt: skip
        """Products of 1 to 16 tokens, one for each layer; `tau` and `cap` are for T / P tokens each, `read` counts weights.

        `given` are depths that were decided before, for tokens with a threshold; `before` is what is done to x, of one token.
        `alone` asks for so much shared memory that no processor takes two blocks of the launch: where that before is none of
        these kernels, some would, and would be the last to end.
        Raises ValueError for more tokens than `most` says, and for depths that are missing or not expected.
        """
        tokens, p, x, fits = x.shape[0], self.params, x.contiguous(), self.fits()
        if tokens > (MOST if fits else 0):
            raise ValueError(f"{tokens} tokens of {p.columns} columns: a call takes {self.most()}")
        if (given is not None) != self.given:
            raise ValueError("depths are given to layers that decide themselves, or not to those that do not")
        self._begin(x, before)
        out = [x.new_empty(tokens, one.rows) for one in self.members]
        p.tau, p.cap, p.read, p.entries = tau.data_ptr(), cap.data_ptr(), read.data_ptr(), tau.numel()
        p.given = 0 if given is None else given.data_ptr()
        # each block makes its own of few tokens
        apart = fours(min(fits, tokens)) > 1
        held = x.new_empty(self.staged(min(fits, tokens)), dtype=torch.uint8) if apart else None
        p.staged = 0 if held is None else held.data_ptr()
        for first in range(0, tokens, max(fits, 1)):
            count = min(fits, tokens - first)
            for to, one in zip(p.members, out, strict=False):
                to.out = one[first:].data_ptr()
            p.x, p.tokens, p.before, p.per = x[first:].data_ptr(), count, first, max(1, tokens // p.entries)
            self._launch(x.dtype, count, alone)
        return out

    def _begin(self, x: Float[Tensor, "T K"], before: Norm | Gate | None) -> None:
        """Say what x is made of."""
        p = self.params
        p.input, p.more, p.by, p.sum = PLAIN, 0, 0, 0
        if before is None:
            return
        # the two eights of columns that a thread has of a norm
        most = self.shape(1).warps * LANES * 16 if isinstance(before, Norm) else p.columns
        if x.shape[0] != 1 or p.columns > most:
            raise ValueError(f"{x.shape[0]} tokens of {p.columns} columns: x is made on the way for one of at most {most}")
        if isinstance(before, Gate):
            p.input, p.more = GATE, before.up.data_ptr()
            return
        p.input, p.by, p.epsilon = NORM, before.weight.data_ptr(), before.epsilon
        if before.more is not None:
            p.more, p.sum = before.more.data_ptr(), before.sum.data_ptr()

    def _launch(self, dtype: torch.dtype, tokens: int, alone: bool) -> None:
        """Run the kernel with the parameters as they are."""
        p, shape = self.params, self.shape(tokens)
        # one on each processor, those without rows too: some score, and what each does for the next launch is said in few.cu
        blocks = self.processors
        self._share(blocks, shape)
        if p.staged:
            eights = tokens * -(-p.column_tiles // 4) * 32  # of each token, in whole warps
            self.kernel(dtype, tokens, "bytes").launch(
                -(-eights // (shape.warps * LANES)), shape.warps * LANES, p, overlap=True
            )
        memory = max(self.memory(tokens), self.limit // 2 + ALONE if alone else 0)
        # launches of a step are one kernel, whether they make x or not, as those whose depths were decided before are
        makes = alone or p.input != PLAIN
        self.kernel(dtype, tokens, makes=makes).launch(blocks, shape.warps * LANES, p, memory, overlap=True)

    def _share(self, blocks: int, shape: Shape) -> None:
        """Which blocks score and decide."""
        p = self.params
        count = max(p.routers.count, 1)
        # a warp scores one tile of columns at a time
        most = -(-p.column_tiles // shape.warps)
        # where nobody waits for scores, only blocks with the fewest rows score, and others of those decide
        lighter = blocks - self.row_tiles % blocks
        p.parts = max(1, min(lighter // count - 1 if self.given else blocks // count, most))
        # sums of all parts, and scores, lie in shared memory where those of warps do
        p.parts = min(p.parts, max(1, (shape.buffers * 33 * shape.warps - 8) // (p.routers.hidden + 1)))
        shares = p.parts * p.routers.count
        p.deciders, p.busy = shares % blocks, min(blocks, shares + p.routers.count)


def fours(tokens: int) -> int:
    """Fours of tokens that a kernel is compiled for: 1, 2 or 4."""
    return 1 if tokens <= 4 else 2 if tokens <= 8 else 4


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may ask for: a little is there already."""
    return -1024 + MEMORY.get(torch.cuda.get_device_capability(device), USUAL_MEMORY)
