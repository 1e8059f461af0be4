"""A quantised linear layer in training: float weights that are read through their own codes.

What: `weight`, `scale` and `zero` are parameters; a forward pass encodes and reads them at one depth. Flooring passes its
gradient straight through inside the range and none outside, stored precisions of scale and zero point are rounded in the
forward pass too, so what is trained is what will be stored.

The start are codes, not weights: a latent weight is the centre of the finest cell of its code, which encodes to that code.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from mobiquant import blocks
from mobiquant import slices as s
from mobiquant.config import Format
from mobiquant.linear import MobiLinear

TENSORS = ("weight", "scale", "zero")


def read(
    weight: Float[Tensor, "N K"], scale: Float[Tensor, "N G"], zero: Float[Tensor, "N G"], form: Format, depths: range
) -> Iterator[Float[Tensor, "N K"]]:
    """Differentiable weights at each depth of `depths` (1 is the base alone); `zero` in base steps."""
    columns = weight.shape[1]
    scale, shift = s.expand(scale, form.group_size, columns), s.expand(zero + 0.5, form.group_size, columns)
    u = weight / scale + shift
    for depth in depths:
        width = form.widths[depth - 1]
        cells = 2.0 ** (width - form.slices[0])
        inside = (u * cells).clamp(0, 2**width - 1e-3)
        centre = (inside + (inside.floor() + 0.5 - inside).detach()) / cells
        yield scale * (centre - shift)


class Depth:
    """The depth at which all layers of one model read: one object, shared."""

    def __init__(self, value: int):
        self.value = value


class LatentLinear(nn.Module):
    """`MobiLinear` in training; `forward` maps [..., K] to [..., N] at the shared depth."""

    def __init__(self, layer: MobiLinear, depth: Depth):
        super().__init__()
        form = layer.format
        self.format, self.depth = form, depth
        self.weight = nn.Parameter(layer.packed().read(len(form.slices)))
        self.scale = nn.Parameter(layer.scale.float())
        self.zero = nn.Parameter(s.load_zero(layer.zero, form.slices))
        self.bias: Tensor | None
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())

    def grid(self) -> tuple[Float[Tensor, "N G"], Float[Tensor, "N G"]]:
        """Scale and zero point as they will be stored, in fp32, with the gradient of the identity."""
        scale = self.scale + (s.store_scale(self.scale.detach()).float() - self.scale).detach()
        stored = s.load_zero(s.store_zero(self.zero.detach(), self.format.slices), self.format.slices)
        return scale, self.zero + (stored - self.zero).detach()

    def forward(self, x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        scale, zero = self.grid()
        depth = self.depth.value
        weight = next(read(self.weight, scale, zero, self.format, range(depth, depth + 1)))
        return linear(x, weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @torch.no_grad()
    def store(self, layer: MobiLinear) -> None:
        """Write what was trained into the layer that it came from."""
        form = self.format
        scale, zero = s.store_scale(self.scale), s.store_zero(self.zero, form.slices)
        layer.set_weight(s.encode(self.weight, scale, zero, form.slices, form.group_size), scale, zero, None)


def open_latents(module: nn.Module, depth: Depth) -> dict[str, LatentLinear]:
    """Put a trainable layer in the place of every quantised one; returns them by name."""
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, MobiLinear)}
    latents = {name: LatentLinear(layer, depth) for name, layer in found.items()}
    for name, latent in latents.items():
        blocks.replace(module, name, latent)
    return latents


def tensors(latents: dict[str, LatentLinear]) -> dict[str, Tensor]:
    """The trained tensors by name, on the host."""
    return {f"{name}.{key}": getattr(latent, key).detach().cpu() for name, latent in latents.items() for key in TENSORS}


@torch.no_grad()
def load_tensors(latents: dict[str, LatentLinear], values: dict[str, Tensor]) -> None:
    """Set the trained tensors to those of `tensors`."""
    for name, latent in latents.items():
        for key in TENSORS:
            getattr(latent, key).copy_(values[f"{name}.{key}"])
