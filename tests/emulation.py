"""The GPU kernels run on a CPU: their sources compiled by the C++ compiler against `native/simt.h`, lanes in step."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import pytest

from mobiquant import matmul
from mobiquant.kernels.cuda import compiler, few, many

HERE = Path(__file__).parent / "native"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
FOLDER = Path(tempfile.gettempdir()) / f"mobiquant-emulated-{os.getuid()}"
SOURCES = (HERE / "simt.h", HERE / "emulate.cpp", *sorted(compiler.HERE.glob("*.cu")), *sorted(compiler.HERE.glob("*.h")))

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
# where the kernels run in tests: emulated, or on a GPU
DEVICES = [pytest.param("cpu", marks=needs_compiler), pytest.param("cuda", marks=pytest.mark.gpu)]


class Emulated(compiler.Kernel):
    """Stands in for `compiler.Kernel`; `seed` draws the order of threads, `late` is what tensors become once launches began."""

    seed, late = 0, {}

    def __init__(self, name, definitions):
        options = [f"-D{key}={value}" for key, value in definitions]
        text = "\0".join([name, *options, *(path.read_text() for path in SOURCES)])
        library = FOLDER / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.so"
        if not library.exists():
            FOLDER.mkdir(exist_ok=True)
            new = library.with_suffix(f".{os.getpid()}")
            words = [
                COMPILER,
                "-O1",
                "-std=c++17",
                "-shared",
                "-fPIC",
                "-w",
                "-U_FORTIFY_SOURCE",
                f"-I{HERE}",
                f"-I{compiler.HERE}",
                f"-DKERNEL={name}",
                *options,
            ]
            built = subprocess.run([*words, str(HERE / "emulate.cpp"), "-o", str(new)], capture_output=True, text=True)
            assert built.returncode == 0, built.stderr[-3000:]
            new.replace(library)
        loaded = ctypes.CDLL(str(library))
        self.run, self.change_late = loaded.run, loaded.change_late
        self.run.argtypes = (ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_ulong, ctypes.c_uint, ctypes.c_uint)
        self.change_late.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_ulong)

    def launch(self, blocks, threads, parameters, memory=0, overlap=False, cluster=1):
        for to, values in Emulated.late.items():
            self.change_late(to.data_ptr(), values.data_ptr(), values.nbytes)
        if blocks:
            self.run(ctypes.addressof(parameters), blocks, threads, memory, cluster, Emulated.seed)


@lru_cache
def kernel(name, definitions, _device):
    """As `compiler.kernel`."""
    return Emulated(name, definitions)


def emulate(monkeypatch, seed=0):
    """Run the kernels on the CPU: four blocks of four warps whose threads take turns in an order that `seed` draws."""
    monkeypatch.setattr(compiler, "kernel", kernel)
    monkeypatch.setattr(compiler, "processors", lambda _: 4)
    monkeypatch.setattr(few, "shared_memory", lambda _: 227 << 10)
    monkeypatch.setattr(many, "has_warpgroups", lambda _: True)
    monkeypatch.setattr(few, "SHAPES", dict.fromkeys(few.SHAPES, few.Shape(4, 1)))
    for name in ("FIXED", "NARROW"):
        monkeypatch.setattr(few, name, {count: one._replace(warps=4) for count, one in getattr(few, name).items()})
    monkeypatch.setattr(Emulated, "seed", seed % 2**31)
    allowed = lambda x: x.dtype in few.DTYPES and not matmul.is_exact()  # noqa: E731
    monkeypatch.setattr(matmul, "gpu", allowed)
    monkeypatch.setattr(matmul, "on_gpu", lambda x, *_: allowed(x))
