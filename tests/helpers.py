"""What several test files share: noise in dB, slice lists, weights of every kind, small packed weights and layers."""

import ast
import itertools
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from hypothesis import strategies as st

from mobiquant import clip, pack, router
from mobiquant import slices as s
from mobiquant.linear import MobiLinear
from mobiquant.matmul import Packed

SLICES = (
    (2, 2, 2, 2),
    (2, 1, 1, 1, 1, 1, 1),
    (3, 1, 1, 1, 1, 1),
    (4, 4),
    (2, 1, 1, 2, 2),
    (3, 3, 2),
    (2, 2),
    (1, 1),
    (7, 1),
)
KINDS = (
    "normal",
    "heavy",
    "zero",
    "constant",
    "negative constant",
    "huge",
    "tiny",
    "outlier",
    "positive",
    "negative",
    "zero group",
)


def snr_db(reference, value):
    """Signal to noise of `value` in dB; infinite where both are equal."""
    reference, value = reference.double(), value.double()
    noise = (reference - value).square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(max(reference.square().sum().item(), 1e-300) / noise)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def weights(kind, rows, columns, seed=0):
    """[N, K] fp32 weights of one of `KINDS`."""
    w = normal(rows, columns, seed=seed) * 0.05
    if kind == "heavy":
        return w / normal(rows, columns, seed=seed + 1).abs().clamp_min(0.05)
    if kind == "outlier":
        w[0, columns // 2] = 7.0
    if kind == "zero group":
        w[:, :8] = 0
    ready = {
        "zero": torch.zeros_like(w),
        "constant": torch.full_like(w, 0.3),
        "negative constant": torch.full_like(w, -0.3),
        "huge": w / 0.05 * 1e4,
        "tiny": w / 0.05 * 1e-7,
        "positive": w.abs() + 0.01,
        "negative": -w.abs() - 0.01,
    }
    return ready.get(kind, w)


@st.composite
def slice_lists(draw, most=s.MAX_BITS):
    """Slice lists that `check_slices` takes, of at most `most` bits: the named ones and random ones."""
    if draw(st.booleans()):
        return draw(st.sampled_from([x for x in SLICES if sum(x) <= most]))
    total = draw(st.integers(2, most))
    cuts = draw(st.sets(st.integers(1, total - 1), min_size=1))
    edges = [0, *sorted(cuts), total]
    return tuple(stop - start for start, stop in itertools.pairwise(edges))


def min_max_case(kind, rows, columns, seed, slices, group):
    """(weight, scale, zero, slices, group size) with the full range of each group."""
    weight = weights(kind, rows, columns, seed)
    return weight, *clip.min_max(weight, slices, group), slices, group


def quantised(kinds=KINDS):
    """Calls that make a `min_max_case`; the last group may be short, or the only one."""
    sizes = st.integers(1, 5), st.integers(1, 50), st.integers(0, 10**6)
    # a call, since code under typing checks draws random numbers, which hypothesis does not want in a strategy
    return st.builds(partial, st.just(min_max_case), st.sampled_from(kinds), *sizes, slice_lists(), st.sampled_from([3, 8, 16]))


def packed(slices=(2, 1, 1, 2, 2), rows=24, columns=40, group=16, seed=0):
    """A packed weight of random normal values."""
    weight = normal(rows, columns, seed=seed)
    scale, zero = clip.min_max(weight, slices, group)
    code = s.encode(weight, scale, zero, slices, group)
    return Packed(pack.pack(code, slices), scale, zero, slices, group, columns)


def random_router(columns, hidden, outputs, seed=0):
    """A router of random parameters whose scores spread around zero."""
    return router.store(
        normal(hidden, columns, seed=seed + 1) / columns**0.5,
        normal(hidden, seed=seed + 2),
        normal(hidden, seed=seed + 3),
        normal(outputs, hidden, seed=seed + 4) * 2,
        normal(outputs, seed=seed + 5) + 1,
    )


def layer(form, columns=40, rows=24, owns_router=True, bias=None, seed=0):
    """A layer of random weights, bias and router, the router's scores spread around zero."""
    made = MobiLinear(columns, rows, form, columns if owns_router else None, bias)
    weight = normal(rows, columns, seed=seed) / columns**0.5
    scale, zero = clip.min_max(weight, form.slices, form.group_size)
    code = s.encode(weight, scale, zero, form.slices, form.group_size)
    made.set_weight(code, scale, zero, None if bias is None else normal(rows, seed=seed + 9))
    if owns_router:
        made.set_router(random_router(columns, form.router_hidden, form.router_outputs, seed))
    return made


def unchecked(code, **more):
    """What Python says to `code` without checks of annotations, the folder of the tests at hand; `more` of the environment."""
    here = Path(__file__).parent
    path = os.pathsep.join([f"{here.parent / 'src'}", f"{here}", os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, **more}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


def interpreted(code):
    """What Python says to `code` with kernels run by Triton's interpreter on a CPU."""
    return unchecked(code, TRITON_INTERPRET="1")


def check_short(path):
    """A file of fewer than 400 lines, its functions of fewer than 60."""
    source = path.read_text()
    assert len(source.splitlines()) < 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 < 60, f"{path.name}: {node.name}"


@contextmanager
def modules_of(folder, names, monkeypatch):
    """The module `command` of a benchmark, whose others are found by their bare names meanwhile; those of before come back."""
    monkeypatch.syspath_prepend(str(folder))
    before = {name: sys.modules.pop(name, None) for name in names}
    try:
        yield import_module("command")
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
