"""End-to-end training of all layers against the float model: KL of the next-token distribution, at all depths together.

What: `sum_e KL(float || student read at depth e)^p / p` over the depths of the step (`passes`), of which few bits are drawn
more often: all share one code and pull at it together. One more term reads layers at two neighbouring depths side by side,
drawn anew in each step, since that is what routers will make of the codes.

Where the trainable state (weights, gradients, two moments) does not fit, only scales and zero points are trained, with blocks
recomputed in the backward pass; the log and a notice say so.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from mobiquant.calibrate.latent import Depth, LatentLinear, load_tensors, project, tensors
from mobiquant.calibrate.nested import Draws, generator_for, optimizer_for, repeatable, set_rate
from mobiquant.calibrate.passes import CapturedPasses, Pair, Passes, steady
from mobiquant.calibrate.work import Work
from mobiquant.config import Format, Training
from mobiquant.progress import Report, by_width

NAME = "distillation"
LOG_EVERY = 50
# fp32 weight, gradient and two moments, and what reading it makes on the way
BYTES_PER_WEIGHT = 24
# where losses are kept by width, that of mixed depths
MIXED, MIXES = 0, "mixed"


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device, after what earlier stages left behind is given back."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    # captured passes refer to themselves, and torch keeps what is freed
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def fits(weights: int, device: torch.device) -> bool:
    """Whether all weights can be trained at once with a quarter of the free memory left for activations."""
    return weights * BYTES_PER_WEIGHT < 0.75 * free_memory(device)


def mixture(generator: torch.Generator, places: int, depths: int) -> tuple[int, ...]:
    """A depth for each place: two neighbours, the deeper one with a share between a tenth and nine tenths."""
    low = int(torch.randint(1, depths, (), generator=generator))
    share = 0.1 + 0.8 * torch.rand((), generator=generator)
    return tuple((low + (torch.rand(places, generator=generator) < share)).tolist())


def recompute_blocks(stack: nn.ModuleList) -> None:
    """Keep no activations inside blocks: the backward pass makes them again. `blocks.restore_forward` undoes it."""
    for block in stack:
        forward = block.forward
        block.forward = lambda *args, _forward=forward, **kwargs: recompute(_forward, *args, use_reentrant=False, **kwargs)


def distill(
    pair: Pair,
    latents: dict[str, LatentLinear],
    depth: Depth,
    windows: Int[Tensor, "S L"],
    form: Format,
    training: Training,
    seed: int,
    work: Work,
    weights: bool,
    progress: Report,
) -> list[dict[str, Any]]:
    """Train the latents of the student, both models on one device; returns the losses, now and then. Goes on from `work`."""
    device, draws, steps = windows.device, Draws.of(form.widths), training.distill_steps
    for latent in latents.values():
        latent.position.requires_grad_(weights)
    optimizer = optimizer_for(latents, training, weights)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    first, log = _resume(work, latents, optimizer)
    sums: dict[int, list[float]] = {}
    recent: dict[int, float] = {}
    count = max(1, min(training.passes_per_step - training.mixed, len(form.widths)))
    progress("training end to end", first, steps, "compiling blocks" if device.type == "cuda" and weights else "")
    with repeatable(device), _passes(pair, depth, windows[: training.distill_batch], form, training, weights) as passes:
        for step in range(first, steps):
            generator = generator_for(seed, NAME, 0, step)
            picked = draws.pick(generator, count)
            batch = torch.randperm(windows.shape[0], generator=generator)[: training.distill_batch]
            passes.teach(windows[batch.to(device)])
            mixtures = [mixture(generator, depth.places, len(form.widths))] if training.mixed else []
            losses = torch.stack([passes.learn(one) for one in (*picked, *mixtures)]).tolist()
            torch.nn.utils.clip_grad_norm_(parameters, training.clip_norm * len(losses))
            set_rate(optimizer, step, steps)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            project(latents)
            names = [*(form.widths[one - 1] for one in picked), *(MIXED for _ in mixtures)]
            for name, loss in zip(names, losses, strict=True):
                sums.setdefault(name, []).append(loss)
                recent[name] = loss if name not in recent else 0.9 * recent[name] + 0.1 * loss
            if (step + 1) % LOG_EVERY == 0 or step + 1 == steps:
                means = {MIXES if w == MIXED else str(w): round(sum(v) / len(v), 5) for w, v in sorted(sums.items())}
                log.append({"step": step + 1, "kl": means, "weights": weights})
                sums.clear()
                keep = work.save if step + 1 == steps else work.keep
                keep(NAME, lambda: {**tensors(latents), **_moments(optimizer)}, {"step": step + 1, "log": log})
            shown = {width: loss for width, loss in recent.items() if width != MIXED}
            progress("training end to end", step + 1, steps, f"KL {by_width(shown)}")
    return log


@contextmanager
def _passes(
    pair: Pair, depth: Depth, tokens: Int[Tensor, "S L"], form: Format, training: Training, weights: bool
) -> Iterator[Passes]:
    """Passes over batches like `tokens`; on CUDA captured, of compiled blocks, unless blocks are recomputed."""
    if not tokens.is_cuda or not weights:
        yield Passes(pair, depth, training.loss_power)
        return
    for fused in (True, False):
        with steady(pair.student, pair.stack, tokens, fused), steady(pair.teacher, pair.originals, tokens, fused):
            passes = CapturedPasses(pair, depth, training.loss_power, tokens, form)
            if not fused or _compiles(passes, tokens):
                yield passes
                return


def _compiles(passes: Passes, tokens: Int[Tensor, "S L"]) -> bool:
    """Whether compiled blocks run, which the first pass shows; a notice says why not. Gradients are zero before and after."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    try:
        passes.teach(tokens)
        passes.learn(1)
    except (TorchDynamoException, InductorError) as error:
        reason = str(error).strip().partition("\n")[0]
        print(f"mobiquant: blocks cannot be compiled ({reason}): training goes on without, slower", file=sys.stderr)
        return False
    finally:
        for parameter in passes.student.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
    return True


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of AdamW as named tensors."""
    state = optimizer.state_dict()["state"]
    return {f"adam.{i}.{key}": value.detach().cpu() for i, entry in state.items() for key, value in entry.items()}


def _resume(work: Work, latents: dict[str, LatentLinear], optimizer: torch.optim.Optimizer) -> tuple[int, list[dict[str, Any]]]:
    """Steps done and the log so far; latents and moments are set to what was kept."""
    kept = work.load(NAME)
    if kept is None:
        return 0, []
    values, note = kept
    load_tensors(latents, values)
    state = optimizer.state_dict()
    for key, value in values.items():
        if key.startswith("adam."):
            _, index, name = key.split(".")
            state["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(state)
    return note["step"], note["log"]


def notice(what: str, need: float, device: torch.device, instead: str) -> None:
    """Say that there is no memory (bytes) for something, and what is done instead."""
    print(
        f"mobiquant: {what} needs {need / 1e9:.1f} GB and {free_memory(device) / 1e9:.1f} GB are free: {instead}",
        file=sys.stderr,
    )
