"""A quantised linear layer in training: the places of its weights on the grid, read through their own codes.

What: `position` u (`slices.position`, in base steps), the logarithm of the scale and the zero point are parameters; a forward
pass floors u to the cell of one depth and reads `s (centre - z)`. Flooring passes its gradient straight through; stored
precisions of scale and zero point are rounded in the forward pass too, so what is trained is what will be stored.

Why places, not weights: a step of the optimizer is then a share of a cell in every layer, whatever its scale, and a scale
moves the whole grid with its codes, instead of moving weights to other cells.

The start are codes: a position is the centre of the finest cell of its code. `project` keeps positions on the grid.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from mobiquant import blocks, kernels, matmul, pack
from mobiquant import slices as s
from mobiquant.config import Format
from mobiquant.kernels import operators
from mobiquant.linear import MobiLinear, mobilinears

TENSORS = ("position", "log_scale", "zero")


def _cells(form: Format, depth: int) -> float:
    return 2.0 ** (form.widths[depth - 1] - form.slices[0])


def centre(position: Float[Tensor, "N K"], form: Format, depth: int) -> Float[Tensor, "N K"]:
    """Centre of the cell of each position at a depth, in base steps; gradients pass inside the grid and stop outside."""
    cells = _cells(form, depth)
    inside = (position * cells).clamp(0, 2 ** form.widths[depth - 1] - 1e-3)
    return (inside + (inside.floor() + 0.5 - inside).detach()) / cells


def read(
    weight: Float[Tensor, "N K"], scale: Float[Tensor, "N G"], zero: Float[Tensor, "N G"], form: Format, depths: range
) -> Iterator[Float[Tensor, "N K"]]:
    """Differentiable weights at each depth of `depths` (1 is the base alone); `zero` in base steps."""
    columns = weight.shape[1]
    scale, shift = s.expand(scale, form.group_size, columns), s.expand(zero + 0.5, form.group_size, columns)
    position = weight / scale + shift
    for depth in depths:
        yield scale * (centre(position, form, depth) - shift)


class Depth:
    """The depths at which the layers of one model read, one object for all of them.

    `value` is one depth for every layer, or one for each place: layers that read the same input share a place. `held` fp32
    [places] says the same as cells in a base step, on a device where kernels read it: so a captured pass serves every depth,
    and a compiled block every place.
    """

    def __init__(self, value: int | Sequence[int]):
        self.value = value
        self.places = 0
        self.held: Float[Tensor, " P"] | None = None

    def at(self, place: int) -> int:
        """The depth of the layers at a place."""
        return self.value if isinstance(self.value, int) else self.value[place]

    def hold(self, latents: Iterable["LatentLinear"], device: torch.device) -> None:
        """Keep the cells of all places in one tensor from now on, of which each layer has its own; `fill` sets them."""
        self.held = torch.ones(self.places, device=device)
        for latent in latents:
            latent.cells = self.held[latent.place]

    def fill(self, form: Format) -> None:
        """Put what `value` says into the tensor that is held."""
        assert self.held is not None
        self.held.copy_(torch.tensor([_cells(form, self.at(place)) for place in range(self.places)]))


@lru_cache(maxsize=64)
def _tensor(value: float, device: torch.device) -> Float[Tensor, ""]:
    return torch.tensor(value, device=device)


class LatentLinear(nn.Module):
    """`MobiLinear` in training; `forward` maps [..., K] to [..., N] at the depth of its place."""

    def __init__(self, layer: MobiLinear, depth: Depth, place: int = 0):
        super().__init__()
        form, packed = layer.format, layer.packed()
        self.format, self.depth, self.place = form, depth, place
        step = 2.0 ** (form.slices[0] - sum(form.slices))
        self.position = nn.Parameter((pack.unpack(packed.planes, layer.in_features).float() + 0.5) * step)
        self.log_scale = nn.Parameter(layer.scale.float().log())
        self.zero = nn.Parameter(s.load_zero(layer.zero, form.slices))
        self.bias: Tensor | None
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float())
        # cells in a base step at the depth of its place, where that is held
        self.cells: Float[Tensor, ""] | None = None

    def grid(self) -> tuple[Float[Tensor, "N G"], Float[Tensor, "N G"]]:
        """Scale and zero point as they will be stored, in fp32, with the gradient of the identity."""
        scale = self.log_scale.exp()
        scale = scale + (s.store_scale(scale.detach()).float() - scale).detach()
        stored = s.load_zero(s.store_zero(self.zero.detach(), self.format.slices), self.format.slices)
        return scale, self.zero + (stored - self.zero).detach()

    def weight(self, dtype: torch.dtype) -> Float[Tensor, "N K"]:
        """The weight at the depth of its place, differentiable."""
        form = self.format
        if kernels.usable(self.position):
            cells = self.cells
            if cells is None:
                cells = _tensor(_cells(form, self.depth.at(self.place)), self.position.device)
            return operators.read_grid(self.position, self.log_scale, self.zero, cells, form.group_size, form.slices[0], dtype)
        scale, zero = self.grid()
        columns = self.position.shape[1]
        level = centre(self.position, form, self.depth.at(self.place)) - s.expand(zero + 0.5, form.group_size, columns)
        return (s.expand(scale, form.group_size, columns) * level).to(dtype)

    def forward(self, x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        return linear(x, self.weight(matmul.product_dtype(x)), None if self.bias is None else self.bias.to(x.dtype))

    @torch.no_grad()
    def store(self, layer: MobiLinear) -> None:
        """Write what was trained into the layer that it came from."""
        form = self.format
        total = sum(form.slices)
        code = (self.position * 2 ** (total - form.slices[0])).floor().clamp(0, 2**total - 1).to(torch.uint8)
        layer.set_weight(code, s.store_scale(self.log_scale.exp()), s.store_zero(self.zero, form.slices), None)


def open_latents(module: nn.Module, depth: Depth) -> dict[str, LatentLinear]:
    """Put a trainable layer in the place of every quantised one; returns them by name."""
    layers, places = mobilinears(module), {}
    for layer in layers.values():
        places.setdefault(id(layer.owner), len(places))
    latents = {name: LatentLinear(layer, depth, places[id(layer.owner)]) for name, layer in layers.items()}
    depth.places = len(places)
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


@torch.no_grad()
def project(latents: dict[str, LatentLinear]) -> None:
    """Put positions that left the grid back to its ends, and zero points into what can be stored."""
    for latent in latents.values():
        slices = latent.format.slices
        # the centre of the last finest cell: gradients pass there
        latent.position.clamp_(0, 2 ** slices[0] * (1 - 0.5 ** (sum(slices) + 1)))
        latent.zero.clamp_(0, (2**s.ZERO_BITS - 1) * 2.0 ** (slices[0] - s.ZERO_BITS))
