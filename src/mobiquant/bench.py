"""How fast a model is, and how much memory it takes: each contender in a process of its own, measured in turns.

What: tokens a second of a prompt (prefill) and of one token after another (decode), and resident memory beyond the imported
libraries. Contenders are the checkpoint at each budget, the float model in transformers, and llama.cpp at its own formats.

How: all processes stay alive and take turns, one measurement each, so that a machine that is slow for a while is slow for all;
what is reported are medians.
"""

import contextlib
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from mobiquant.config import InputError
from mobiquant.progress import Report

# formats of llama.cpp by the number that its own quantiser takes
LLAMA = {"Q2_K": 10, "Q3_K_M": 12, "Q4_0": 2, "Q4_K_M": 15, "Q8_0": 7}
LLAMA_F16 = 1
# tokens before those that are made one after another
SHORT = 32
PEERS = ("llama.cpp",)


@dataclass(frozen=True)
class Contender:
    """One process: `kind` mobiquant (with `bits`), float (with a dtype) or llama (with a format)."""

    name: str
    kind: str
    model: str
    bits: float | None = None
    fixed: bool = False
    max_bits: float | None = None
    dtype: str = ""


@dataclass(frozen=True)
class Sizes:
    """What is measured: tokens of the prompt and tokens made, on how many threads."""

    prompt: int
    new: int
    threads: int

    @classmethod
    def of(cls, prompt: int, new: int, threads: int | None) -> "Sizes":
        """With as many threads as the machine has cores where none are given; raises InputError on what cannot be measured."""
        for name, value, least in (("prompt tokens", prompt, SHORT), ("new tokens", new, 2), ("threads", threads, 1)):
            if value is not None and value < least:
                raise InputError(f"{value} {name} cannot be measured: give {least} or more")
        return cls(prompt, new, threads or psutil.cpu_count(logical=False) or 1)


def run(
    folder: str,
    bits: list[float],
    fixed: bool,
    max_bits: float | None,
    reference: str | None,
    peer: str | None,
    sizes: Sizes,
    repetitions: int,
    console: Any,
) -> list[dict[str, Any]]:
    """What the command does: the rows of a checkpoint, of its float model and of a peer; raises InputError on bad input."""
    from mobiquant import checkpoint
    from mobiquant.config import Checkpoint
    from mobiquant.progress import bars

    if repetitions < 1:
        raise InputError(f"{repetitions} repetitions measure nothing: give --repetitions 1 or more")
    if peer is not None and peer not in PEERS:
        raise InputError(f"peer '{peer}' is unknown: choose {', '.join(PEERS)}")
    if peer is not None and reference is None:
        raise InputError("a peer is made from the float model: give --reference with its .gguf file")
    form = Checkpoint.from_dict(checkpoint.quantization_of(checkpoint.read_config(Path(folder)), Path(folder))).format
    form = form if max_bits is None else form.truncated(max_bits)
    for width in bits:
        form.depth(width) if fixed else form.check_bits(width)
    way = "fixed" if fixed else "routed"
    contenders = [Contender(f"mobiquant, {way}", "mobiquant", folder, width, fixed, max_bits) for width in bits]
    if reference is not None:
        contenders += [Contender(f"torch {name}", "float", reference, dtype=name) for name in ("float32", "bfloat16")]
    with tempfile.TemporaryDirectory() as made, bars(console, lines=True) as report:
        if peer is not None and reference is not None:
            files = llama_files(reference, Path(made), report)
            contenders += [Contender(f"llama.cpp {name}", "llama", str(path)) for name, path in files.items()]
        return bench(contenders, sizes, repetitions, report)


def bench(contenders: list[Contender], sizes: Sizes, repetitions: int, progress: Report) -> list[dict[str, Any]]:
    """One row for each contender, in their order: medians over repetitions that alternate between them. `prefill` and `decode`
    are tokens a second, `low` and `high` the extremes of `decode`, `mb` memory beyond that of the libraries, `libs_mb`.

    Raises InputError with the last words of a process that fails.
    """
    with contextlib.ExitStack() as open_:
        workers = [open_.enter_context(_worker(one, sizes)) for one in contenders]
        found: list[list[dict[str, float]]] = [[] for _ in contenders]
        for turn in range(repetitions + 1):
            for place, ask in enumerate(workers):
                answer = ask("measure")
                # the first turn warms caches up and is not counted
                found[place] += [answer] if turn else []
                progress("measuring", turn * len(workers) + place + 1, (repetitions + 1) * len(workers), contenders[place].name)
        ends = [ask("end") for ask in workers]
    rows = []
    for one, own, end in zip(contenders, found, ends, strict=True):
        rows.append({
            "name": one.name,
            "bits": one.bits,
            "bits_read": end["bits_read"],
            "prefill": statistics.median(turn["prefill"] for turn in own),
            "decode": statistics.median(turn["decode"] for turn in own),
            "low": min(turn["decode"] for turn in own),
            "high": max(turn["decode"] for turn in own),
            "mb": end["memory_mb"],
            "libs_mb": end["libraries_mb"],
        })  # fmt: skip
    return rows


@contextlib.contextmanager
def _worker(contender: Contender, sizes: Sizes) -> Iterator[Callable[[str], dict[str, Any]]]:
    """A process that measures one contender each time it is asked."""
    env = os.environ | {"OMP_NUM_THREADS": str(sizes.threads), "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", "from mobiquant.bench import serve; serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env=env,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None

        def ask(what: str) -> dict[str, Any]:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(what + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                process.wait()
                said.seek(0)
                last = (said.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
                raise InputError(f"{contender.name} could not be measured ({last})")
            return json.loads(line)

        try:
            ask(json.dumps({"contender": asdict(contender), "sizes": asdict(sizes)}))
            yield ask
        finally:
            process.kill()
            process.wait()


def serve() -> None:
    """The other end of `_worker`: one JSON line for each line read."""
    # whatever a library prints on stdout would be taken for an answer
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(values: dict[str, Any]) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    task = json.loads(input())
    contender, sizes = Contender(**task["contender"]), Sizes(**task["sizes"])
    engine = {"mobiquant": _Own, "float": _Float, "llama": _Llama}[contender.kind](contender, sizes)
    answer({})
    while True:
        try:
            asked = input()
        except EOFError:
            return
        if asked == "measure":
            answer({"prefill": engine.prefill(), "decode": engine.decode()})
        else:
            answer(
                {"bits_read": engine.bits_read(), "libraries_mb": engine.libraries, "memory_mb": resident() - engine.libraries}
            )


def resident() -> float:
    """Resident memory of this process in MB (10^6 bytes), after giving back what the allocator holds for nothing."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss / 1e6


class _Torch(ABC):
    """What ours and the float model share."""

    def __init__(self, contender: Contender, sizes: Sizes):
        import torch
        import transformers.models.llama.modeling_llama  # noqa: F401 -- part of the libraries, not of the model

        import mobiquant.decoder
        import mobiquant.kernels.cpu.product  # noqa: F401
        from mobiquant.console import quiet

        quiet()
        torch.set_num_threads(sizes.threads)
        self.torch, self.contender, self.sizes = torch, contender, sizes
        self.libraries = resident()
        self.model: Any = self.load()
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(10, self.model.config.vocab_size - 10, (1, sizes.prompt), generator=generator)

    @abstractmethod
    def load(self) -> Any:
        """The model."""

    def bits_read(self) -> float | None:
        """Average bits of each weight that the tokens so far have read."""
        return None

    def prefill(self) -> float:
        """Tokens a second."""
        with self.torch.inference_mode():
            started = time.perf_counter()
            self.model(self.tokens, use_cache=True, logits_to_keep=1)
            return self.sizes.prompt / (time.perf_counter() - started)

    def decode(self) -> float:
        """Tokens a second, one after another, from a short prompt."""
        from mobiquant.generate import natively

        torch, short = self.torch, self.tokens[:, :SHORT]
        with torch.inference_mode():
            steps = natively(self.model, short, self.sizes.new + 1, False) if self.contender.kind == "mobiquant" else None
            if steps is not None:
                next(steps)
                started = time.perf_counter()
                count = sum(1 for _ in steps)
                # a model may end its text early
                return count / (time.perf_counter() - started) if count else float("nan")
            out = self.model(short, use_cache=True, logits_to_keep=1)
            started = time.perf_counter()
            for _ in range(self.sizes.new):
                token = out.logits[:, -1:].argmax(-1)
                out = self.model(token, past_key_values=out.past_key_values, use_cache=True)
            return self.sizes.new / (time.perf_counter() - started)


class _Own(_Torch):
    def load(self) -> Any:
        import mobiquant

        one = self.contender
        model = mobiquant.load(one.model, max_bits=one.max_bits)
        model.generation_config.eos_token_id = None
        mobiquant.set_precision(model, one.bits, routed=not one.fixed)
        mobiquant.bits_read(model, reset=True)
        return model

    def bits_read(self) -> float:
        import mobiquant

        return mobiquant.bits_read(self.model)


class _Float(_Torch):
    def load(self) -> Any:
        from mobiquant import integration

        return integration.load_float(self.contender.model, getattr(self.torch, self.contender.dtype))


class _Llama:
    def __init__(self, contender: Contender, sizes: Sizes):
        from llama_cpp import Llama  # pyright: ignore[reportMissingImports] -- a peer, installed by hand

        self.sizes = sizes
        self.libraries = resident()
        self.model = Llama(
            contender.model, n_ctx=sizes.prompt + sizes.new + SHORT, n_threads=sizes.threads, n_threads_batch=sizes.threads,
            n_batch=sizes.prompt, verbose=False,
        )  # fmt: skip
        vocabulary = self.model.n_vocab()
        self.tokens = [10 + (7919 * k) % (vocabulary - 20) for k in range(sizes.prompt)]

    def bits_read(self) -> None:
        """Not comparable: its formats mix widths."""

    def prefill(self) -> float:
        """Tokens a second."""
        self.model.reset()
        started = time.perf_counter()
        self.model.eval(self.tokens)
        return self.sizes.prompt / (time.perf_counter() - started)

    def decode(self) -> float:
        """Tokens a second, one after another, from a short prompt."""
        self.model.reset()
        self.model.eval(self.tokens[:SHORT])
        started = time.perf_counter()
        for token in self.tokens[: self.sizes.new]:
            self.model.eval([token])
        return self.sizes.new / (time.perf_counter() - started)


def llama_files(model: str, folder: Path, progress: Report) -> dict[str, Path]:
    """GGUF files of a model in every format of `LLAMA`, made by llama.cpp's own quantiser.

    Raises InputError where llama-cpp-python is not installed or the model is no .gguf file.
    """
    from mobiquant import integration

    if find_spec("llama_cpp") is None:
        raise InputError("the peer llama.cpp is not installed: pip install llama-cpp-python, or leave out --peer")
    path = integration.demo_file() if model == integration.DEMO_MODEL else Path(model)
    if path.suffix != ".gguf" or not path.is_file():
        raise InputError(f"llama.cpp needs the float model as a .gguf file, and '{model}' is none: give --reference FILE.gguf")
    made = {"F16": folder / "F16.gguf", **{name: folder / f"{name}.gguf" for name in LLAMA}}
    for done, (name, target) in enumerate(made.items()):
        source = path if name == "F16" else made["F16"]
        code = (
            "import ctypes, sys, llama_cpp as l; p = l.llama_model_quantize_default_params(); p.ftype = int(sys.argv[3]);"
            "p.allow_requantize = True; names = [a.encode() for a in sys.argv[1:3]];"
            "sys.exit(l.llama_model_quantize(*names, ctypes.byref(p)))"
        )
        number = str(LLAMA.get(name, LLAMA_F16))
        made_it = subprocess.run([sys.executable, "-c", code, str(source), str(target), number], capture_output=True)
        if made_it.returncode:
            raise InputError(f"llama.cpp could not make {name} of '{path.name}' (exit code {made_it.returncode})")
        progress("making GGUF files", done + 1, len(made), name)
    return {name: made[name] for name in LLAMA}
