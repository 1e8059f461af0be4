"""What a block of the Llama kind does between its linear layers, for one new token of each sequence.

Each is one launch; values are rounded where the modules of transformers round them, so that a token comes out as it does there.
"""

import ctypes
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float32, Int32
from torch import Tensor

from mobiquant.kernels.cuda import compiler

# elements of a head that the kernels are for, and columns of a norm
HEADS, MOST_COLUMNS, MOST_SHARE = (64, 128, 192, 256), 8192, 16
NORM_WARPS, GATE_THREADS, ATTEND_WARPS, CHUNK = 16, 256, 4, 64


def _structure(addresses: Sequence[str], wholes: Sequence[str], floats: Sequence[str]) -> type[ctypes.Structure]:
    kinds = (ctypes.c_uint64, addresses), (ctypes.c_int32, wholes), (ctypes.c_float, floats)
    fields = [(name, kind) for kind, names in kinds for name in names]
    return type("Params", (ctypes.Structure,), {"_fields_": fields})


_Norm = _structure(("hidden", "more", "weight", "out"), ("columns",), ("epsilon",))
_Gate = _structure(("gate", "up", "out"), ("count",), ())
_Attend = _structure(
    ("query", "key", "value", "keys", "values", "out", "cosine", "sine", "query_norm", "key_norm", "position", "partial",
     "arrived"),
    ("key_heads", "positions", "chunks"), ("scale", "epsilon"),
)  # fmt: skip


def _address(tensor: Tensor | None) -> int:
    assert tensor is None or tensor.is_contiguous()
    return 0 if tensor is None else tensor.data_ptr()


def _kernel(name: str, like: Tensor, **more: int) -> compiler.Kernel:
    return compiler.kernel(name, (("BF16", int(like.dtype == torch.bfloat16)), *more.items()), like.device.index or 0)


def sum_norm(
    hidden: Float[Tensor, "T D"], more: Float[Tensor, "T D"] | None, weight: Float[Tensor, " D"], epsilon: float
) -> Float[Tensor, "T D"]:
    """`hidden += more` in place, then `weight * hidden / rms(hidden)`."""
    out = torch.empty_like(hidden)
    p = _Norm(_address(hidden), _address(more), _address(weight), _address(out), hidden.shape[1], epsilon)
    _kernel("sum_norm", hidden).launch(hidden.shape[0], NORM_WARPS * 32, p, NORM_WARPS * 4, overlap=True)
    return out


def gate(gated: Float[Tensor, "T I"], up: Float[Tensor, "T I"]) -> Float[Tensor, "T I"]:
    """`silu(gated) * up`."""
    out = torch.empty_like(gated)
    p = _Gate(_address(gated), _address(up), _address(out), gated.numel())
    _kernel("gate", gated).launch(-(-gated.numel() // GATE_THREADS), GATE_THREADS, p, overlap=True)
    return out


class Attention:
    """Keys and values of one layer [B, key heads, positions, head], and what reads and extends them."""

    def __init__(
        self, sequences: int, heads: int, key_heads: int, positions: int, head: int, scale: float, like: Tensor,
        norms: tuple[Tensor, Tensor, float] | None = None,
    ):  # fmt: skip
        self.heads, self.key_heads, self.head, self.scale, self.norms = heads, key_heads, head, scale, norms
        shape = sequences, key_heads, positions, head
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.chunks, self.share = -(-positions // CHUNK), heads // key_heads
        count = sequences * key_heads
        self.partial = torch.zeros(count * self.chunks * self.share * (head + 2), device=like.device)
        self.arrived = torch.zeros(count, dtype=torch.int32, device=like.device)

    def __call__(
        self, query: Float[Tensor, "B Q"], key: Float[Tensor, "B V"], value: Float[Tensor, "B V"],
        cosine: Float32[Tensor, "P H"], sine: Float32[Tensor, "P H"], position: Int32[Tensor, " B"],
    ) -> Float[Tensor, "B Q"]:  # fmt: skip
        """Attention of the tokens at `position`, whose keys and values are added to the cache.

        Position and cache are read early: the launch before this one must not write them.
        """
        query_norm, key_norm, epsilon = self.norms or (None, None, 0.0)
        out = torch.empty_like(query)
        tensors = query, key, value, self.keys, self.values, out, cosine, sine, query_norm, key_norm
        addresses = map(_address, (*tensors, position, self.partial, self.arrived))
        p = _Attend(*addresses, self.key_heads, self.keys.shape[2], self.chunks, self.scale, epsilon)
        # queries, weights, sums of warps, key and value of the new token
        memory = 4 * (self.share * (self.head * (1 + ATTEND_WARPS) + CHUNK) + self.head)
        blocks = query.shape[0] * self.key_heads * self.chunks
        kernel = _kernel("attend", query, HEAD=self.head, SHARE=self.share)
        kernel.launch(blocks, ATTEND_WARPS * 32, p, memory, overlap=True)
        return out
