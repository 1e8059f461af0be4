"""Kernels in CUDA C++, compiled when first needed by NVRTC for the GPU at hand and kept in a folder of the user.

NVRTC and its bindings come with the CUDA builds of torch: nobody needs nvcc. What a kernel is specialised for is given as
definitions; compiling takes some seconds, loading a kept one milliseconds.
"""

import ctypes
import hashlib
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
# shared memory that a kernel may take without asking
LEAST_MEMORY = 48 << 10
# compute capability of the GPUs with products of four warps
HOPPER = (9, 0)
FOLDER = "MOBIQUANT_CACHE"
HEADERS = ("types.h", "device.h", "pieces.h", "launch.h", "ring.h", "stage.h", "score.h", "warpgroup.h", "runs.h", "bring.h")


def cache_folder() -> Path:
    """Where compiled kernels are kept: $MOBIQUANT_CACHE, or mobiquant in the user's cache folder."""
    given = os.environ.get(FOLDER)
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mobiquant"


def _checked(answer: tuple[Any, ...], what: str) -> Any:
    """The value of an answer of the bindings; raises RuntimeError on an error code."""
    code, *values = answer
    if int(code):
        raise RuntimeError(f"{what} failed: {code.name}")
    return values[0] if len(values) == 1 else values


def compile_source(source: str, name: str, options: list[str]) -> bytes:
    """Machine code (CUBIN) of a source; raises RuntimeError with the compiler's words. Needs no GPU."""
    from cuda.bindings import nvrtc  # pyright: ignore[reportMissingImports] -- comes with CUDA builds of torch

    headers = [(HERE / header).read_bytes() for header in HEADERS]
    names = [header.encode() for header in HEADERS]
    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), len(headers), headers, names), "NVRTC")
    words = [option.encode() for option in options]
    (code,) = nvrtc.nvrtcCompileProgram(program, len(words), words)
    if int(code):
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program), "NVRTC")
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"{name} was not compiled: {log.decode(errors='replace').strip()[:2000]}")
    made = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program), "NVRTC")
    _checked(nvrtc.nvrtcGetCUBIN(program, made), "NVRTC")
    nvrtc.nvrtcDestroyProgram(program)
    return made


def options_for(definitions: Mapping[str, int | str], capability: tuple[int, int]) -> list[str]:
    """The command line of the compiler."""
    defined = [f"-D{key}={value}" for key, value in definitions.items()]
    # with what only this architecture has
    own = "a" if capability == HOPPER else ""
    return [f"-arch=sm_{capability[0]}{capability[1]}{own}", "-std=c++17", "-default-device", *defined]


def _kept(source: str, name: str, options: list[str]) -> bytes:
    """`compile_source` through the folder of kept kernels; a folder that cannot be written is done without."""
    version = torch.version.cuda or ""
    headers = [(HERE / header).read_text() for header in HEADERS]
    digest = hashlib.sha256("\0".join((source, *headers, version, *options)).encode()).hexdigest()[:24]
    path = cache_folder() / f"{Path(name).stem}-{digest}.cubin"
    try:
        return path.read_bytes()
    except OSError:
        made = compile_source(source, name, options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        new.write_bytes(made)
        new.replace(path)
    except OSError:
        pass
    return made


def _overlapping(driver: Any) -> Any:
    """The attribute of a launch that may begin before the one before it has ended."""
    made = driver.CUlaunchAttribute()
    made.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    made.value.programmaticStreamSerializationAllowed = 1
    return made


def _clustered(driver: Any, blocks: int) -> Any:
    """The attribute of a launch whose blocks run in clusters of so many."""
    made = driver.CUlaunchAttribute()
    made.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    made.value.clusterDim.x, made.value.clusterDim.y, made.value.clusterDim.z = blocks, 1, 1
    return made


def processors(device: torch.device) -> int:
    """Of a GPU; `few.cu` has as many blocks, which wait for each other and must run at the same time."""
    return torch.cuda.get_device_properties(device).multi_processor_count


class Kernel:
    """One compiled kernel on one device, taking one structure by value."""

    def __init__(self, name: str, definitions: Mapping[str, int | str], device: int):
        from cuda.bindings import driver  # pyright: ignore[reportMissingImports]

        self.driver, self.device = driver, device
        # Hopper lets a launch begin while the one before it ends
        self.attributes = [_overlapping(driver)] if torch.cuda.get_device_capability(device) >= (9, 0) else []
        source = (HERE / f"{name}.cu").read_text()
        options = options_for(definitions, torch.cuda.get_device_capability(device))
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # the context of the device is the current one from here on
            self.module = _checked(driver.cuModuleLoadData(_kept(source, f"{name}.cu", options)), "loading a kernel")
            self.memory = LEAST_MEMORY
            self.function = _checked(driver.cuModuleGetFunction(self.module, name.encode()), "loading a kernel")
            # one split of the first-level cache for all: launches that differ in it do not overlap
            split = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
            _checked(driver.cuFuncSetAttribute(self.function, split, 100), "asking for shared memory")

    def launch(
        self, blocks: int, threads: int, parameters: ctypes.Structure, memory: int = 0, overlap: bool = False, cluster: int = 1
    ) -> None:  # fmt: skip
        """Run on the current stream of the device, with `memory` bytes of shared memory; `parameters` are copied at once.

        With `overlap` it may begin before the launch before it has ended: the kernel waits for that itself. Blocks come in
        clusters of `cluster`, of which their number is a multiple.
        """
        if not blocks:
            return
        if memory > self.memory:
            limit = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(self.driver.cuFuncSetAttribute(self.function, limit, memory), "asking for shared memory")
            self.memory = memory
        held = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        stream = torch.cuda.current_stream(self.device).cuda_stream
        config = self.driver.CUlaunchConfig()
        config.gridDimX, config.blockDimX, config.sharedMemBytes, config.hStream = blocks, threads, memory, stream
        config.gridDimY = config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        attributes = (self.attributes if overlap else []) + ([_clustered(self.driver, cluster)] if cluster > 1 else [])
        if attributes:
            config.attrs, config.numAttrs = attributes, len(attributes)
        with torch.cuda.device(self.device):
            answer = self.driver.cuLaunchKernelEx(config, self.function, ctypes.addressof(held), 0)
        _checked(answer, "launching a kernel")


@lru_cache(maxsize=256)
def kernel(name: str, definitions: tuple[tuple[str, int | str], ...], device: int) -> Kernel:
    """A kernel by name and definitions, compiled once."""
    return Kernel(name, dict(definitions), device)
