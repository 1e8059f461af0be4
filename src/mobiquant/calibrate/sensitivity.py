"""How much the model gains by each slice of each layer: divergence from the float model, in nats a token.

What: with `L_e` the divergence of a model whose layers all read depth e, its fall `L_e - L_(e+1)` is shared out between the
layers by the gradients along the way from `W_e = read(q, e)` to `W_(e+1)` (integrated gradients, arXiv 1703.01365), taken at
both ends:

    gain_e = <(dL/dW at depth e + dL/dW at depth e + 1) / 2, W_e - W_(e+1)>

On SmolLM2 the gains of all layers sum to the measured fall within 15 % at 2 to 3 bits and within 3 % above, so two points are
enough. One backward pass for each depth gives all layers at once; noise shows as gains below zero.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mobiquant import budget
from mobiquant.calibrate.passes import Pair, divergence
from mobiquant.config import Format
from mobiquant.knob import Precision
from mobiquant.linear import MobiLinear, mobilinears
from mobiquant.progress import Report

# a gain this many times smaller than the average of all layers counts as that: below it is noise
FLOOR = 0.5
# how much lower slices of the next region of budgets score than those of the one before: further than training moves scores
APART = 24.0
# tokens are taken from so many windows
WINDOWS = 16
# tokens in one pass on CUDA, where reading the weights costs more than the products
PASS = 8192


@contextmanager
def _watched(layers: dict[str, MobiLinear], depth: int, gains: dict[str, Tensor]) -> Iterator[None]:
    """While open, backward passes at a depth add half of `<dL/dW, W_e - W_(e+1)>` of both neighbours to `gains` [E - 1]."""

    def watch(name: str, layer: MobiLinear, x: Tensor, y: Tensor) -> None:
        def learned(gradient: Tensor) -> None:
            slope = gradient.flatten(0, -2).T @ x.flatten(0, -2)  # [N, K]
            weight = layer.packed()
            here = weight.read(depth)
            if depth < len(weight.slices):
                gains[name][depth - 1] += (slope * (here - weight.read(depth + 1))).sum() / 2
            if depth > 1:
                gains[name][depth - 2] += (slope * (weight.read(depth - 1) - here)).sum() / 2

        if y.requires_grad:
            y.register_hook(learned)

    def hook(name: str):
        return lambda layer, args, y: watch(name, layer, args[0].detach(), y)

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gains(
    pair: Pair, tokens: Int[Tensor, "S L"], form: Format, device: torch.device, progress: Report
) -> dict[str, Float[Tensor, " R"]]:
    """Gain of each residual slice of each quantised layer, by name, on up to `WINDOWS` windows; models return to the host."""
    layers = mobilinears(pair.student)
    found = {name: torch.zeros(len(form.slices) - 1, device=device) for name in layers}
    precision, dtype = Precision(form.widths), next(pair.student.parameters()).dtype
    for layer in layers.values():
        layer.precision = precision
    for model in (pair.student, pair.teacher):
        # transformers refuses to cast a model that is marked as quantised; layers keep what they have stored
        nn.Module.float(model).to(device).requires_grad_(False)
    windows = tokens[torch.linspace(0, len(tokens) - 1, min(WINDOWS, len(tokens))).long()]
    done = 0
    for part in windows.split(max(1, PASS // windows.shape[1]) if device.type == "cuda" else 1):
        ids, share = part.to(device), len(part) / len(windows)
        with torch.no_grad():
            wanted = pair.teacher(ids, use_cache=False).logits.flatten(0, 1)
        for depth in range(1, len(form.slices) + 1):
            precision.set([float("-inf")], [depth])
            embedded = pair.student.get_input_embeddings()(ids).requires_grad_()  # type: ignore[operator]
            with torch.enable_grad(), _watched(layers, depth, found):
                made = pair.student(inputs_embeds=embedded, use_cache=False).logits.flatten(0, 1)
                (divergence(made, wanted).mean() * share).backward()
        done += len(part)
        progress("measuring layers", done, len(windows))
    for model in (pair.student, pair.teacher):
        nn.Module.to(model, dtype).to("cpu")
    return {name: gain.cpu() for name, gain in found.items()}


def offsets(
    gains: dict[str, Float[Tensor, " R"]], inputs: Sequence[Sequence[str]], sizes: dict[str, int], form: Format
) -> dict[str, Float[Tensor, " R"]]:
    """Log of the gain of a weight relative to that of all layers, of each slice, by the first of the layers of one input.

    Slices of a region of budgets (`budget.regions`) are kept apart from those before: above 4 bits each slice gains much less
    than the one before, and routers that may weigh one against the other lose to fixed depths.
    """
    every = torch.stack(list(gains.values())).sum(0) / sum(sizes.values())
    depths = torch.arange(2, len(form.slices) + 1)
    below = -APART * sum((depths > cap).float() for cap in budget.region_caps(form))
    found: dict[str, Tensor] = {}
    for names in inputs:
        own = torch.stack([gains[name] for name in names]).sum(0) / sum(sizes[name] for name in names)
        found[names[0]] = (own / every.clamp_min(1e-30)).clamp_min(FLOOR).log() + below
    return found
