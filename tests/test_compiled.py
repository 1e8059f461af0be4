"""Compiled blocks of end-to-end training: they learn what plain ones do, and all of a kind share one code."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from torch._dynamo.exc import TorchRuntimeError
from torch._dynamo.testing import CompileCounterWithBackend

from mobiquant import slices as s
from mobiquant.calibrate import distill, latent, passes
from mobiquant.config import Format
from mobiquant.kernels import operators

FORM = Format(group_size=32)


def cells_of(position, log_scale, zero, cells, group, base):
    """What the kernels of `kernels.grid` work with, in torch: scales and shifts by column, levels, and what is inside."""
    raw, steps = log_scale.exp(), 2.0 ** (s.ZERO_BITS - base)
    shift = (zero * steps).round().clamp(0, 255) / steps + 0.5
    scale, shift = (s.expand(each, group, position.shape[1]) for each in (s.store_scale(raw).float(), shift))
    cell, last = position * cells, cells * 2**base - 1e-3
    return scale, (cell.clamp_min(0).minimum(last).floor() + 0.5) / cells - shift, (cell >= 0) & (cell <= last), raw


@pytest.fixture
def kernels_in_torch(monkeypatch):
    """The operators of the grid's kernels, done in torch on the CPU; `latent` takes them while the fixture lives."""

    def read(position, log_scale, zero, cells, group, base, dtype):
        scale, level, *_ = cells_of(position, log_scale, zero, cells, group, base)
        return (scale * level).to(dtype)

    def back(slope, position, log_scale, zero, cells, group, base):
        scale, level, inside, raw = cells_of(position, log_scale, zero, cells, group, base)

        def sums(each):
            lanes = log_scale.shape[1] * group
            return torch.nn.functional.pad(each, (0, lanes - each.shape[1])).unflatten(1, (-1, group)).sum(-1)

        return torch.where(inside, scale * slope, 0), sums(slope * level) * raw, -sums(slope * scale)

    operators.read_grid.register_kernel("cpu")(read)
    operators.read_grid_backward.register_kernel("cpu")(back)
    return lambda: monkeypatch.setattr(latent, "kernels", SimpleNamespace(usable=lambda x: True))


def test_compiled_blocks_learn_what_plain_ones_do_and_share_their_code(tmp_path, kernels_in_torch, monkeypatch):
    """Code is traced and differentiated ahead of time as on a GPU, and run by torch."""
    made, original = torch.nn.Module.float(tiny.quantize(tmp_path, format=FORM)), tiny.model()
    pair, depth, tokens = passes.Pair.of(made, original), latent.Depth(1), tiny.tokens(3, 16)
    latents = latent.open_latents(made, depth)
    for model in (made, original):
        model.requires_grad_(False)
    for one in latents.values():
        one.requires_grad_(True)
    counted, found = CompileCounterWithBackend("aot_eager"), {}
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, **how: compiler(forward, backend=counted, **how))
    for fused in (False, True):
        if fused:
            kernels_in_torch()
            depth.hold(latents.values(), torch.device("cpu"))
        learner, losses = passes.Passes(pair, depth, 0.5), []
        with passes.steady(made, pair.stack, tokens, fused), passes.steady(original, pair.originals, tokens, fused):
            learner.teach(tokens)
            for at in (1, 3, tuple(1 + place % 2 for place in range(8))):
                depth.value = at
                if fused:
                    depth.fill(FORM)
                losses.append(float(learner.learn(at)))
        found[fused] = losses, [[p.grad.clone() for p in one.parameters()] for one in latents.values()]
        made.zero_grad()
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)
    for one, other in zip(found[True][1], found[False][1], strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()))
    # the float model, the first block, whose input needs no gradient, and all others: whatever the depth
    assert counted.frame_count == 3


def test_blocks_that_cannot_be_compiled_are_run_as_they_are(capsys):
    class Refused:
        student = torch.nn.Linear(1, 1)

        def teach(self, tokens):
            raise TorchRuntimeError("no form for this\nfrom user code")

    Refused.student.weight.grad = torch.ones(1, 1)
    assert not distill._compiles(Refused(), torch.zeros(1, 1, dtype=torch.int64))
    assert "cannot be compiled (no form for this): training goes on without" in capsys.readouterr().err
    assert Refused.student.weight.grad.item() == 0
