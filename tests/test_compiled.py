"""Compiled blocks of end-to-end training: they learn what plain ones do, and all of a kind share one code."""

from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import tiny
import torch
from helpers import snr_db, unchecked
from torch._dynamo.exc import TorchRuntimeError
from torch._dynamo.testing import CompileCounterWithBackend

from mobiquant import slices as s
from mobiquant.calibrate import distill, latent, passes
from mobiquant.config import Format, Training
from mobiquant.kernels import operators

FORM = Format(group_size=32)


def cells_of(position, log_scale, zero, cells, group, base):
    """What the kernels of `kernels.grid` work with, in torch: scales and shifts by column, levels, and what is inside."""
    raw, steps = log_scale.exp(), 2.0 ** (s.ZERO_BITS - base)
    shift = (zero * steps).round().clamp(0, 255) / steps + 0.5
    scale, shift = (s.expand(each, group, position.shape[1]) for each in (s.store_scale(raw).float(), shift))
    cell, last = position * cells, cells * 2**base - 1e-3
    return scale, (cell.clamp_min(0).minimum(last).floor() + 0.5) / cells - shift, (cell >= 0) & (cell <= last), raw


def read_in_torch(position, log_scale, zero, cells, group, base, dtype):
    scale, level, *_ = cells_of(position, log_scale, zero, cells, group, base)
    return (scale * level).to(dtype)


def back_in_torch(slope, position, log_scale, zero, cells, group, base):
    scale, level, inside, raw = cells_of(position, log_scale, zero, cells, group, base)

    def sums(each):
        lanes = log_scale.shape[1] * group
        return torch.nn.functional.pad(each, (0, lanes - each.shape[1])).unflatten(1, (-1, group)).sum(-1)

    return torch.where(inside, scale * slope, 0), sums(slope * level) * raw, -sums(slope * scale)


def compare(backend):
    """Losses and gradients of plain and of compiled blocks on a CPU, whose kernels are done in torch; compiled codes."""
    operators.read_grid.register_kernel("cpu")(read_in_torch)
    operators.read_grid_backward.register_kernel("cpu")(back_in_torch)
    with TemporaryDirectory() as folder:
        made, original = torch.nn.Module.float(tiny.quantize(Path(folder), format=FORM)), tiny.model()
    pair, depth, tokens = passes.Pair.of(made, original), latent.Depth(1), tiny.tokens(3, 16)
    latents = latent.open_latents(made, depth)
    for model in (made, original):
        model.requires_grad_(False)
    for one in latents.values():
        one.requires_grad_(True)
    counted, found, compiler = CompileCounterWithBackend(backend), {}, torch.compile
    torch.compile = lambda forward, **how: compiler(forward, backend=counted, **how)
    for fused in (False, True):
        if fused:
            latent.kernels = SimpleNamespace(usable=lambda x: True)
            depth.hold(latents.values(), torch.device("cpu"))
        learner, losses = passes.Passes(pair, depth, 0.5), []
        with passes.steady(made, pair.stack, tokens, fused), passes.steady(original, pair.originals, tokens, fused):
            learner.teach(tokens)
            for at in (1, 3, tuple(1 + place % 2 for place in range(8))):
                depth.value = at
                if fused:
                    depth.fill(FORM)
                losses.append(float(learner.learn(at)))
        found[fused] = losses, [p.grad.clone() for one in latents.values() for p in one.parameters()]
        made.zero_grad()
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)
    for one, other in zip(found[True][1], found[False][1], strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()))
    # the float model, the first block, whose input needs no gradient, and all others: whatever the depth
    assert counted.frame_count == 3


def test_compiled_blocks_learn_what_plain_ones_do_and_share_their_code():
    """Traced and differentiated ahead of time as on a GPU, and run by torch."""
    ran = unchecked("import test_compiled as t; t.compare('aot_eager')")
    assert ran.returncode == 0, ran.stderr[-2000:]


def compare_captured(fused):
    """Losses and gradients of plain passes and of captured ones on a GPU, whose blocks are compiled or not."""
    device = torch.device("cuda")
    with TemporaryDirectory() as folder:
        made, original = torch.nn.Module.float(tiny.quantize(Path(folder), format=FORM)).to(device), tiny.model().to(device)
    pair, depth, tokens = passes.Pair.of(made, original), latent.Depth(1), tiny.tokens(4, 16).to(device)
    latents = latent.open_latents(made, depth)
    found = {}
    for captured in (False, True):
        for one in latents.values():
            one.to(device)
            for parameter in one.parameters():
                parameter.grad = torch.zeros_like(parameter)
        compiled, first = fused and captured, tokens[:2]
        with passes.steady(made, pair.stack, first, compiled), passes.steady(original, pair.originals, first, compiled):
            learner = passes.CapturedPasses(pair, depth, 0.5, first, FORM) if captured else passes.Passes(pair, depth, 0.5)
            losses = []
            # the second batch and the second turn of a depth are replayed
            for batch in (first, tokens[2:]):
                learner.teach(batch)
                losses += [learner.learn(d).item() for d in (1, 3, 1, tuple(1 + place % 2 for place in range(8)))]
        found[captured] = losses, {name: one.position.grad.clone() for name, one in latents.items()}
    # compiled code keeps in fp32 what torch rounds to bf16 on the way
    assert found[False][0] == pytest.approx(found[True][0], rel=3e-2 if fused else 1e-3)
    for name, gradient in found[False][1].items():
        other = found[True][1][name]
        if fused:
            assert snr_db(gradient, other) > 20, name
        else:
            assert torch.allclose(gradient, other, rtol=1e-2, atol=1e-3 * gradient.abs().max())


def run_twice():
    """Two short runs of the recipe on a GPU, which must end with the same bytes."""
    short = Training(6, 2, distill_steps=8, distill_batch=2, position_rate=2e-2, scale_rate=2e-3, routing_steps=4)
    settings = {"format": FORM, "recipe": "full", "training": short, "device": "cuda"}
    with TemporaryDirectory() as folder:
        one, two = (tiny.quantize(Path(folder), **settings).state_dict() for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.values(), two.values(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_captured_passes_learn_what_plain_ones_do(fused):
    ran = unchecked(f"import test_compiled as t; t.compare_captured({fused})")
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.mark.gpu
def test_two_runs_on_a_gpu_end_with_the_same_bytes():
    ran = unchecked("import test_compiled as t; t.run_twice()")
    assert ran.returncode == 0 and "cannot be compiled" not in ran.stderr, ran.stderr[-2000:]


def test_blocks_that_cannot_be_compiled_are_run_as_they_are(capsys):
    class Refused(passes.Passes):
        def __init__(self):
            self.student = torch.nn.Linear(1, 1)

        def teach(self, tokens):
            raise TorchRuntimeError("no form for this\nfrom user code")

    refused = Refused()
    refused.student.weight.grad = torch.ones(1, 1)
    assert not distill._compiles(refused, torch.zeros(1, 1, dtype=torch.int64))
    assert "cannot be compiled (no form for this): training goes on without" in capsys.readouterr().err
    assert refused.student.weight.grad.item() == 0
