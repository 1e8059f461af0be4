"""The shared library of C++ kernels: where it lies, its structures, and its threads. Nothing here knows torch's modules.

The library has a plain C interface and is not linked to torch, so that one build serves every torch. It is part of a wheel;
where it could not be built (no C++ compiler) everything takes the slow path and says so once.
"""

import ctypes
import os
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

VERSION = 2
NAME = "_cpu"
MAX_BITS = 8
LANE = 32
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# plain, avx2, avx512 or neon, for tests and for comparing them
INSTRUCTIONS = "MOBIQUANT_CPU_INSTRUCTIONS"

pointer, integer, real = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


class Weight(ctypes.Structure):
    """`Weight` of `types.h`."""

    _fields_ = (
        ("plane", pointer * MAX_BITS),
        *((name, pointer) for name in ("scale", "zero", "bias")),
        *((name, integer) for name in ("rows", "columns", "group", "base")),
    )


class Router(ctypes.Structure):
    """`Router` of `types.h`."""

    _fields_ = (
        *((name, pointer) for name in ("weight", "scale", "rms", "bias", "out", "out_bias")),
        *((name, integer) for name in ("hidden", "outputs", "columns")),
    )


class Reading(ctypes.Structure):
    """`Reading` of `types.h`."""

    _fields_ = (
        ("widths", integer * MAX_BITS),
        *((name, integer) for name in ("cap", "routed")),
        ("tau", real),
    )


class Block(ctypes.Structure):
    """`Block` of `types.h`."""

    _fields_ = (
        ("linear", Weight * len(LINEARS)),
        ("router", Router * len(LINEARS)),
        *((name, pointer) for name in ("first_norm", "second_norm", "query_norm", "key_norm")),
        ("next", Router),
        ("ahead", integer),
    )


class Decoder(ctypes.Structure):
    """`Decoder` of `types.h`."""

    _fields_ = (
        ("blocks", pointer),
        ("head", Weight),
        *((name, pointer) for name in ("embedding", "final_norm", "cosine", "sine", "keys", "values")),
        *((name, integer) for name in ("count", "width", "heads", "key_heads", "head_size", "inner", "vocabulary")),
        *((name, integer) for name in ("positions", "embedding_type", "first_bits", "best")),
        *((name, real) for name in ("epsilon", "attention_scale")),
    )


class Descent(ctypes.Structure):
    """`Descent` of `types.h`."""

    _fields_ = (
        *((name, pointer) for name in ("gradient", "hessian", "scale", "diagonal", "weights", "tails", "chosen", "moved")),
        ("widths", integer * MAX_BITS),
        *((name, integer) for name in ("depths", "columns", "rows", "base", "search_bits", "start", "stop")),
    )


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """The library, or None where it was not built; raises RuntimeError for a build of other sources."""
    files = [path for suffix in EXTENSION_SUFFIXES if (path := Path(__file__).with_name(NAME + suffix)).is_file()]
    if not files:
        return None
    found = ctypes.CDLL(str(files[0]))
    sizes = (ctypes.c_int * 6)()
    found.mobiquant_sizes(sizes)
    own = [ctypes.sizeof(kind) for kind in (Weight, Router, Reading, Block, Decoder, Descent)]
    if found.mobiquant_version() != VERSION or list(sizes) != own:
        raise RuntimeError(f"'{files[0].name}' was built from other sources than these: pip install mobiquant again")
    found.mobiquant_instructions.restype = ctypes.c_char_p
    found.mobiquant_product.argtypes = (pointer, pointer, integer, pointer, pointer, integer)
    found.mobiquant_read.argtypes = (pointer, integer, integer, pointer, integer)
    found.mobiquant_decode.argtypes = (pointer, pointer, integer, integer, pointer, pointer, integer)
    found.mobiquant_descend.argtypes = (pointer, integer)
    wanted = os.environ.get(INSTRUCTIONS)
    if wanted:
        _use(found, wanted)
    return found


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether there is a library; `torch.compile` does not look into this."""
    return load() is not None


def instructions() -> list[str]:
    """Instruction sets that work on this machine, the best one last; empty without the library."""
    found, names = load(), []
    while found is not None and (name := found.mobiquant_instructions(len(names))) is not None:
        names.append(name.decode())
    return names


def use(name: str) -> None:
    """Use an instruction set from now on; raises ValueError where it does not work here."""
    found = load()
    if found is None:
        raise ValueError("the CPU kernels are not built")
    _use(found, name)


def _use(found: ctypes.CDLL, name: str) -> None:
    if not found.mobiquant_use(name.encode()):
        raise ValueError(f"instructions '{name}' do not work on this machine")


def unfit(group_size: int, columns: int) -> str | None:
    """Why weights of such groups cannot be read; None where they can."""
    if group_size % LANE == 0 or group_size >= columns:
        return None
    return f"groups of {group_size} weights are no multiple of {LANE}"


def weight_of(
    planes: list[Tensor], scale: Tensor, zero: Tensor, bias: Tensor | None, base: int, group_size: int, columns: int
) -> Weight:
    """A stored weight as the library sees it; the tensors must be contiguous and must outlive it."""
    # a group that is longer than a row is one that ends with it
    group_size = group_size if group_size < columns else -(-columns // LANE) * LANE
    places = [part.data_ptr() + bit * part.stride(0) for part in planes for bit in range(part.shape[0])]
    plane = (pointer * MAX_BITS)(*places)
    ends = None if bias is None else bias.data_ptr()
    return Weight(plane, scale.data_ptr(), zero.data_ptr(), ends, scale.shape[0], columns, group_size, base)


def threads() -> int:
    """Threads that a call may use: as many as torch's own operators."""
    return torch.get_num_threads()
