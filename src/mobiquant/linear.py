"""The quantised linear layer: holds planes, scales and perhaps a router, and reads at the precision it is told.

What: `MobiLinear` replaces `nn.Linear` (or GPT-2's `Conv1D`). Its buffers are exactly the stored tensors. Layers that read
the same input share the router of their owner. That router reads the same input, or an earlier one (`Format.routers`): the
first layers of a block then decide for the rest of it and for the first layers of the next, and the knob hands depths on.

Why ahead: a decision takes longer than the weights of a layer do. Made ahead, it costs the layer nothing, and its slices are on
their way before its input is there.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mobiquant import matmul, pack, router
from mobiquant import slices as s
from mobiquant.config import Format
from mobiquant.knob import Precision

if TYPE_CHECKING:
    from mobiquant.kernels.cuda.few import Gate, Group, Norm
    from mobiquant.kernels.cuda.tiles import Tiles

# of the router that decides for a layer, and of the one that decides for the first layers of the next block
ROUTER_PREFIX, NEXT_PREFIX = "router_", "router_next_"


class MobiLinear(nn.Module):
    """Linear layer of slice planes; `forward` maps [..., K] to [..., N] in the dtype of its input.

    Buffers: `planes_e` uint8 [b_e, N, ceil(K / 8)], `scale` fp16 [N, G], `zero` uint8 [N, G], `bias` [N] or None, and
    `router_*` where the layer owns a router (`router.shapes`).
    """

    def __init__(
        self, columns: int, rows: int, form: Format, router_columns: int | None = None, bias: torch.dtype | None = None,
        next_place: int | None = None,
    ):  # fmt: skip
        super().__init__()
        self.in_features, self.out_features, self.format = columns, rows, form
        self.scale: Tensor
        self.zero: Tensor
        self.bias: Tensor | None
        count = s.groups(columns, form.group_size)
        for e, width in enumerate(form.slices):
            self.register_buffer(f"planes_{e}", torch.zeros(pack.plane_shape(rows, columns, width), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(rows, count, dtype=torch.float16))
        self.register_buffer("zero", torch.zeros(rows, count, dtype=torch.uint8))
        self.register_buffer("bias", None if bias is None else torch.zeros(rows, dtype=bias))
        self.router_names: tuple[str, ...] = ()
        for prefix, read in ((ROUTER_PREFIX, router_columns), (NEXT_PREFIX, None if next_place is None else columns)):
            if read is not None:
                entries = router.shapes(read, form.router_hidden, form.router_outputs or 0)
                for name, (shape, dtype) in entries.items():
                    self.register_buffer(prefix + name, torch.zeros(shape, dtype=dtype))
                self.router_names += tuple(prefix + name for name in entries)
        self.precision = Precision(form.widths)
        # tuples hide layers from torch, or their tensors would be listed twice
        self._owner: tuple[MobiLinear, ...] = ()
        self._others: tuple[MobiLinear, ...] = ()
        # of an owner: the layer of its block whose input its router reads, and the owners whose routers read that of this one
        self._first: tuple[MobiLinear, ...] = ()
        self._later: tuple[MobiLinear, ...] = ()
        # places of what is decided ahead, for this owner and by the router for the next block; None where nothing is
        self.place: int | None = None
        self.next_place = next_place
        # on CUDA: the weight as kernels read it, in place of the planes; of an owner, what one launch takes and has made ahead
        self._tiles: Tiles | None = None
        self._group: Group | None = None
        self._ahead: tuple[Tensor, tuple[int, int], dict[int, Tensor]] | None = None

    def attach(
        self, precision: Precision, owner: "MobiLinear", place: int | None = None, first: "MobiLinear | None" = None
    ) -> None:
        """Join a model: its precision, and the layer whose router decides for this one (itself, maybe).

        An owner whose depths are decided ahead has a `place` among them; `first` is the layer whose input its router reads,
        where that is another one of the same block.
        """
        self.precision = precision
        self._owner = () if owner is self else (owner,)
        if owner is not self:
            owner._others = (*(other for other in owner._others if other is not self), self)
        self.place = place
        if first is not None:
            self._first = (first,)
            first._later = (*(other for other in first._later if other is not self), self)

    @property
    def owner(self) -> "MobiLinear":
        """The layer that holds the router of this one."""
        return self._owner[0] if self._owner else self

    @property
    def members(self) -> "tuple[MobiLinear, ...]":
        """The layers whose router this one holds, itself first."""
        return (self, *self._others)

    def lay_out(self) -> None:
        """Turn planes into what the CUDA kernels read; they are turned back when they are asked for."""
        from mobiquant.kernels.cuda import tiles

        if self._tiles is None:
            form, packed = self.format, self.packed()
            with torch.inference_mode(False):
                self._tiles = tiles.prepare(
                    packed.planes, packed.scale, packed.zero, form.slices, form.group_size, self.in_features
                )
            for e in range(len(form.slices)):
                self._buffers[f"planes_{e}"] = packed.planes[e].new_empty(0)

    def release(self) -> None:
        """Turn what the CUDA kernels read back into planes."""
        # routers lie in the group of the layer whose input they read
        for layer in (self.owner, *self.owner._first):
            layer._group = layer._ahead = None
        if self._tiles is not None:
            self._buffers |= {f"planes_{e}": plane for e, plane in enumerate(self._planes())}
            self._tiles = None

    def _planes(self) -> list[Tensor]:
        if self._tiles is None:
            return [getattr(self, f"planes_{e}") for e in range(len(self.format.slices))]
        from mobiquant.kernels.cuda import tiles

        with torch.inference_mode(False):
            return tiles.restore(self._tiles)[0]

    def __getstate__(self) -> dict[str, Any]:
        # copies and pickles hold planes
        self.release()
        return self.__dict__

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._tiles is not None:
            destination.update({f"{prefix}planes_{e}": plane for e, plane in enumerate(self._planes())})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.release()
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MobiLinear":
        self.release()
        # a cast of the model (.half(), .to(bfloat16)) moves these buffers but must not round scales and routers
        stored = {name: b for name, b in self._buffers.items() if b is not None and name != "bias"}
        super()._apply(fn, recurse)
        for name, before in stored.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def packed(self) -> matmul.Packed:
        """The stored weight, for `matmul`."""
        return matmul.Packed(
            self._planes(), self.scale, self.zero, self.format.slices, self.format.group_size, self.in_features
        )

    def get_router(self, ahead: bool = False) -> router.Router:
        """The router of this layer's owner, or its one for the next block, with outputs for the slices that are loaded."""
        owner, prefix = self.owner, NEXT_PREFIX if ahead else ROUTER_PREFIX
        parts = {name: getattr(owner, prefix + name) for name in router.NAMES}
        kept = len(self.format.slices) - 1
        parts["out"], parts["out_bias"] = parts["out"][:kept], parts["out_bias"][:kept]
        return router.Router(**parts)

    def set_router(self, trained: router.Router, ahead: bool = False) -> None:
        """Store a router in a layer that owns one, or its router for the next block."""
        self.release()
        for name in router.NAMES:
            getattr(self, (NEXT_PREFIX if ahead else ROUTER_PREFIX) + name).copy_(getattr(trained, name))

    def routers_ahead(self) -> list[tuple[int, router.Router]]:
        """The routers that read the input of this layer and decide for others, with the places of those."""
        made = [owner.get_router() for owner in self._later]
        if self.next_place is not None:
            made.append(self.get_router(ahead=True))
        return list(zip(self._places_ahead(), made, strict=True))

    def _places_ahead(self) -> list[int]:
        found = [*(owner.place for owner in self._later), self.next_place]
        return [place for place in found if place is not None]

    def set_weight(self, code: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None) -> None:
        """Store master codes uint8 [N, K], scales fp16 [N, G], zero points uint8 [N, G] and a bias [N]."""
        self.release()
        for e, plane in enumerate(pack.pack(code, self.format.slices)):
            getattr(self, f"planes_{e}").copy_(plane)
        self.scale.copy_(scale)
        self.zero.copy_(zero)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    def depths(self, x: Float[Tensor, "T K"], sequences: int | None) -> Int[Tensor, " T"] | int:
        """Depth of each token, or one number where all read the same; `sequences` is None where tokens came flattened.

        Decides for later layers too. Raises ValueError where precision is set for another number of sequences, RuntimeError
        where an earlier layer should have decided and was not called.
        """
        precision = self.precision
        if precision.fixed is not None:
            return precision.fixed
        tau, cap = precision.on(x.device)
        repeat = self._check_sequences(tau.numel(), x.shape[0], sequences)
        if tau.numel() > 1:
            tau, cap = tau.repeat_interleave(repeat), cap.repeat_interleave(repeat)
        if not precision.routed:
            return cap
        place, ahead = self.owner.place, self.routers_ahead()
        own = [self.get_router()] if place is None else []
        scores = router.scores_of_all(x, [*own, *(other for _, other in ahead)])
        made = [router.depths(score, tau, cap) for score in scores]
        for (other, _), depth in zip(ahead, made[len(own) :], strict=True):
            precision.tell(other, depth)
        return made[0] if place is None else precision.told(place, x.shape[0]).to(x.device, torch.int64)

    @staticmethod
    def _check_sequences(entries: int, tokens: int, sequences: int | None) -> int:
        """Tokens of each entry; raises ValueError where precision is set for another number of sequences."""
        # some models (OPT) hand their layers all tokens of a batch in one row; sequences of a batch are equally long
        repeat, over = divmod(tokens, entries)
        if entries > 1 and (over or sequences not in (None, entries)):
            batch = f"{tokens} tokens" if sequences is None else sequences
            raise ValueError(f"precision is set for {entries} sequences and the batch has {batch}")
        return repeat

    def forward(self, x: Float[Tensor, "*batch K"]) -> Float[Tensor, "*batch N"]:
        flat = x.reshape(-1, self.in_features)  # [..., K] -> [T, K]
        sequences = x.shape[0] if x.dim() > 2 else None
        if matmul.on_gpu(flat, self.format.slices, self.format.group_size, self.in_features):
            return self._together(x, flat, sequences).view(*x.shape[:-1], self.out_features)
        depth = self.depths(flat, sequences)
        self.precision.record(depth, flat.shape[0], self.in_features * self.out_features)
        y = matmul.matmul(flat, self.packed(), depth)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _together(self, x: Tensor, flat: Float[Tensor, "T K"], sequences: int | None) -> Float[Tensor, "T N"]:
        """The product on CUDA, made together with those of the other layers that read the same input.

        The first of them to be called makes all; the others find theirs, as long as they are called with the same tensor.
        """
        owner, ahead = self.owner, self.owner._ahead
        # the same tensor, unchanged, at the same precision
        state = self.precision.changes, 0 if x.is_inference() else x._version
        if ahead is None or ahead[0] is not x or ahead[1] != state or id(self) not in ahead[2]:
            call = owner._call if flat.shape[0] <= owner._most() else owner._call_many
            made = call(flat, sequences)
            ahead = x, state, {id(layer): y for layer, y in zip(owner.members, made, strict=True)}
        y = ahead[2].pop(id(self))
        owner._ahead = ahead if ahead[2] else None
        return y

    def _call(
        self, x: Float[Tensor, "T K"], sequences: int | None, before: "Norm | Gate | None" = None, alone: bool = False
    ) -> list[Float[Tensor, "T _"]]:
        """Products of few tokens by all members, and what later layers of the block read; `before` and `alone` as in `Group`.

        Nothing here depends on the precision: a captured graph follows when that is changed.
        """
        tau, cap = self.precision.on(x.device)
        self._check_sequences(tau.numel(), x.shape[0], sequences)
        group = self._launch()
        made = group(x, tau, cap, self.precision.counter(x.device), self._given(x), before, alone)
        told = group.depths[int(self.place is None) :, : x.shape[0]]
        for place, depth in zip(self._places_ahead(), told, strict=False):
            self.precision.tell(place, depth)
        return made

    def _call_many(self, x: Float[Tensor, "T K"], sequences: int | None) -> list[Float[Tensor, "T _"]]:
        """Products of many tokens by all members; what later layers of the block read is decided before."""
        from mobiquant.kernels.cuda import many

        depth = self.depths(x, sequences)
        for layer in self.members:
            layer.precision.record(depth, x.shape[0], layer.in_features * layer.out_features)
            layer.lay_out()
        laid: Any = [layer._tiles for layer in self.members]
        made = many.product(x, laid, depth)
        return [y if own.bias is None else y + own.bias.to(y.dtype) for y, own in zip(made, self.members, strict=True)]

    def are_at_once(self, layers: "Sequence[MobiLinear]") -> bool:
        """Whether `at_once` of this layer makes these, in this order."""
        return self.members == tuple(layers) and self._most() > 0

    def at_once(
        self, x: Float[Tensor, "1 K"], before: "Norm | Gate | None" = None, alone: bool = False
    ) -> list[Float[Tensor, "1 _"]]:
        """Products of one token on CUDA by all members, in their order, in one launch; `before` and `alone` as in `Group`."""
        return self._call(x, None, before, alone)

    def _given(self, x: Float[Tensor, "T K"]) -> Int[Tensor, " T"] | None:
        """What an earlier layer has decided, as kernels read it; any depth where thresholds say that none does."""
        if self.place is None:
            return None
        if not self.precision.routed and not self.precision.is_told(self.place, x.shape[0]):
            return torch.ones(x.shape[0], dtype=torch.int32, device=x.device)
        return self.precision.told(self.place, x.shape[0]).to(x.device, torch.int32)

    def _routers(self) -> list[router.Router]:
        """The routers that read the input of this owner; the first decides for itself where nobody does ahead."""
        own = [self.get_router()] if self.place is None and self.router_names else []
        return [*own, *(other for _, other in self.routers_ahead())]

    def _most(self) -> int:
        """Tokens that one call takes of all members; 0 where they or the routers are more than it holds."""
        if self._group is not None:
            return self._group.most()
        from mobiquant.kernels.cuda import few, tiles

        routers = self._routers()
        if len(self.members) > few.MEMBERS or len(routers) > few.ROUTERS or not all(map(tiles.check_router, routers)):
            return 0
        return self._launch().most()

    def _launch(self) -> "Group":
        """What makes the products of all members in one launch."""
        if self._group is None:
            from mobiquant.kernels.cuda import few, tiles

            for layer in self.members:
                layer.lay_out()
            laid, biases = [tiles.prepare_router(own) for own in self._routers()], [layer.bias for layer in self.members]
            with torch.inference_mode(False):
                members: Any = [layer._tiles for layer in self.members]
                self._group = few.Group(members, biases, laid, self.place is not None)
        return self._group

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"slices={self.format.slices}, group_size={self.format.group_size}"
        )


def mobilinears(module: nn.Module) -> dict[str, MobiLinear]:
    """Quantised layers by name, each once."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, MobiLinear)}
