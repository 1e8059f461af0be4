"""Builds the C++ kernels for a CPU into the package; everything else is in pyproject.toml.

The library is plain C behind ctypes, so one build serves every Python and every torch. Without a compiler the build goes on
and the package works by torch operators.
"""

import os
import platform
import subprocess
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

HOME = "src/mobiquant/kernels/cpu"
FLAGS = ["-std=c++20", "-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
# what gcc says of its own headers and of vectors wider than the machine's
FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
# files for an instruction set each, by machine; the rest runs anywhere
X86 = {
    "avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx2", "-mfma", "-mf16c"],
}
ARM = {"neon.cpp": ["-march=armv8.2-a+dotprod"]}
MACHINES = {"x86_64": X86, "AMD64": X86, "aarch64": ARM, "arm64": ARM}
SETS = MACHINES.get(platform.machine(), {})


def files(machine: str) -> list[str]:
    """The sources for a machine."""
    return ["library.cpp", "pool.cpp", "plain.cpp", *MACHINES.get(machine, {})]


class Build(build_ext):
    """Compiles each file with the flags of its instruction set."""

    def build_extension(self, ext: Extension) -> None:
        compile_all = self.compiler.compile

        def compile_each(sources: list[str], **how: object) -> list[str]:
            flags = list(how.pop("extra_postargs", None) or [])
            objects = []
            for source in sources:
                objects += compile_all([source], extra_postargs=flags + SETS.get(source.rpartition("/")[2], []), **how)
            return objects

        self.compiler.compile = compile_each
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_all

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None of Python's: the library is no module."""
        return []


class Sanitized(Command):
    """Builds `tests/native/check.cpp` and the kernels with AddressSanitizer and UBSan: `setup.py sanitize --to FOLDER`.

    With `--machine aarch64`, and in CXX a compiler for it, for another machine or an emulator of one.
    """

    user_options: ClassVar = [("to=", None, "folder for the program"), ("machine=", None, "what it is to run on")]

    def initialize_options(self) -> None:
        self.to, self.machine = "build/native", platform.machine()

    def finalize_options(self) -> None:
        """Nothing depends on other options."""

    def run(self) -> None:
        compiler = os.environ.get("CXX", "g++")
        checks = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        Path(self.to).mkdir(parents=True, exist_ok=True)
        objects, running, sets = [], [], MACHINES.get(self.machine, {})
        for source in [*(f"{HOME}/{name}" for name in files(self.machine)), "tests/native/check.cpp"]:
            name = Path(source).name
            objects.append(f"{self.to}/{name}.o")
            command = [compiler, *FLAGS, *checks, *sets.get(name, []), "-c", source, "-o", objects[-1]]
            running.append(subprocess.Popen(command))
        if any(process.wait() for process in running):
            raise SystemExit("the C++ kernels could not be compiled")
        subprocess.run([compiler, *checks, *objects, "-o", f"{self.to}/check", "-pthread"], check=True)


HEADERS = ["types", "pool", "fields", "activations", "product", "read", "decoder", "descent"]
HEADERS += [f"lanes_{name}" for name in ("plain", "avx2", "avx512", "neon")]
setup(
    cmdclass={"build_ext": Build, "sanitize": Sanitized},
    ext_modules=[
        Extension(
            "mobiquant.kernels.cpu._cpu",
            [f"{HOME}/{name}" for name in files(platform.machine())],
            depends=[f"{HOME}/{name}.h" for name in HEADERS],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
            py_limited_api=True,
        )
    ],
)
