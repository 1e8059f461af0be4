"""Quantised layers in vLLM: what is loaded where, and the product as one operator.

What: vLLM fuses q, k and v (gate and up) into one layer and splits layers over processes. Planes, scales and zero points
follow the weight: rows of fused layers lie one after another, and a part of the columns is a part of the bytes. Routers are
kept whole, one for each layer that owns one. Where the columns that it reads are split, its first matrix is split too and the
sums of all processes are added before the threshold, or processes would disagree about the depth of a token. Routers that read
the input of a block's first layers need none of that: every process has all of it, decides for itself and writes the depths
down for the layers to come.

The product is an operator that is opaque to `torch.compile`; it finds its layer by name and the precision in device tensors.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config  # pyright: ignore[reportMissingImports] -- an extra
from vllm.distributed import (  # pyright: ignore[reportMissingImports]
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import (  # pyright: ignore[reportMissingImports]
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import (  # pyright: ignore[reportMissingImports]
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.parameter import (  # pyright: ignore[reportMissingImports]
    BasevLLMParameter,
    GroupQuantScaleParameter,
    ModelWeightParameter,
)
from vllm.utils.torch_utils import direct_register_custom_op  # pyright: ignore[reportMissingImports]

from mobiquant import matmul, router
from mobiquant import slices as s
from mobiquant.config import QUANT_METHOD, Checkpoint, InputError
from mobiquant.serving.state import Budget, State
from mobiquant.serving.worker import install

# fused layers by the parts that a checkpoint stores
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# what `--additional-config` may say; the last ones are for `http`
SETTINGS = ("bits", "routed", "max_bits", "exact", "follow", "goal", "target", "floor", "ceiling")
LAYERS: dict[str, Any] = {}
STATE: dict[str, State] = {}


class MobiquantConfig(QuantizationConfig):
    """The quantisation method `mobiquant`, chosen by the `quantization_config` of a folder."""

    def __init__(self, whole: Checkpoint):
        super().__init__()
        self.whole = whole
        self.quantised = {name for names in whole.inputs for name in names}
        self.read_by_routers = whole.read_by_routers()
        self.firsts = whole.firsts
        # where vLLM has put a stored layer: its prefix and its inputs in all processes
        self.places: dict[str, tuple[str, int]] = {}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What `--additional-config` says; known once vLLM builds the model, which is after this object is made."""
        given = dict((get_current_vllm_config().additional_config or {}).get(QUANT_METHOD, {}))
        unknown = [name for name in given if name not in SETTINGS]
        if unknown:
            raise InputError(f"setting '{unknown[0]}' of mobiquant is unknown: choose from {', '.join(SETTINGS)}")
        return given

    @cached_property
    def stored(self) -> Checkpoint:
        """The checkpoint as far as it is loaded."""
        if "max_bits" not in self.settings:
            return self.whole
        return replace(self.whole, format=self.whole.format.truncated(float(self.settings["max_bits"])))

    @property
    def dropped(self) -> range:
        """Slices that are not loaded, from 0."""
        return range(len(self.stored.format.slices), len(self.whole.format.slices))

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MobiquantConfig":
        return cls(Checkpoint.from_dict(config))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if not isinstance(layer, LinearBase):
            return None
        head, _, last = prefix.rpartition(".")
        names = [f"{head}.{part}" if head else part for part in PARTS.get(last, (last,))]
        present = [name in self.quantised for name in names]
        if not any(present):
            return UnquantizedLinearMethod()
        if not all(present):
            raise InputError(f"layer '{prefix}' is quantised in part: quantise the model again")
        return MobiquantMethod(self, prefix, names)


class RouterParameter(BasevLLMParameter):
    """A part of the routers of a layer [routers, ...]; `split` is the dimension that goes with the columns, or None."""

    def __init__(self, *, split: int | None, **kwargs: Any):
        self._split = split
        super().__init__(**kwargs)

    def _put(self, index: int, loaded: Tensor) -> None:
        own = self.data[index]
        # slices that are not loaded have no scores
        self.data[index].copy_(loaded[tuple(slice(size) for size in own.shape)])

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        self._put(0, loaded_weight)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        if self._split is not None:
            size = self.data.shape[self._split + 1]
            loaded_weight = loaded_weight.narrow(self._split, self.tp_rank * size, size)
        self._put(0, loaded_weight)

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        self._put(min(self._shard_id_as_int(kwargs["shard_id"]), self.data.shape[0] - 1), loaded_weight)

    load_qkv_weight = load_merged_column_weight


class Dropped(BasevLLMParameter):
    """A slice that is deeper than `max_bits`: read past and not kept."""

    def _assert_and_load(self, loaded_weight: Tensor) -> None:
        pass

    load_column_parallel_weight = load_row_parallel_weight = _assert_and_load

    def load_merged_column_weight(self, loaded_weight: Tensor, **kwargs: Any) -> None:
        pass

    load_qkv_weight = load_merged_column_weight


@register_weight_loader_v2_supported_method
class MobiquantMethod(LinearMethodBase):
    """Loads a layer of slice planes and multiplies by it at the precision of each token."""

    def __init__(self, config: MobiquantConfig, prefix: str, names: list[str]):
        self.config, self.prefix, self.names = config, prefix, names

    def create_weights(
        self, layer: torch.nn.Module, input_size_per_partition: int, output_partition_sizes: list[int], input_size: int,
        output_size: int, params_dtype: torch.dtype, **extra: Any,
    ) -> None:  # fmt: skip
        form, columns, rows = self.config.stored.format, input_size_per_partition, sum(output_partition_sizes)
        split = columns != input_size
        if split and (columns % form.group_size or columns % 8):
            raise InputError(
                f"layer '{self.prefix}' has {input_size} inputs, which {input_size // columns} processes cannot share in "
                f"groups of {form.group_size}: take fewer with --tensor-parallel-size, or quantise with smaller groups"
            )
        loader = extra["weight_loader"]
        self.config.places |= dict.fromkeys(self.names, (self.prefix, input_size))
        for e, width in enumerate(form.slices):
            planes = torch.zeros(width, rows, -(-columns // 8), dtype=torch.uint8)
            layer.register_parameter(
                f"planes_{e}", ModelWeightParameter(data=planes, input_dim=2, output_dim=1, weight_loader=loader)
            )
        for e in self.config.dropped:
            layer.register_parameter(f"planes_{e}", Dropped(data=torch.empty(0, dtype=torch.uint8), weight_loader=loader))
        groups = s.groups(columns, form.group_size)
        for name, dtype in (("scale", torch.float16), ("zero", torch.uint8)):
            held = torch.zeros(rows, groups, dtype=dtype)
            layer.register_parameter(name, GroupQuantScaleParameter(data=held, input_dim=1, output_dim=0, weight_loader=loader))
        owner = self.names[0]
        first = self.config.read_by_routers[owner]
        if first not in self.config.places:
            raise InputError(f"vLLM builds '{self.prefix}' before '{first}', which its router reads: quantise per-input")
        layer.mobiquant_first, read = self.config.places[first]  # type: ignore[assignment]
        if owner not in self.config.firsts[1:]:
            itself, count = layer.mobiquant_first == self.prefix, len(self.names) if form.routers == "per-linear" else 1
            self._create_routers(layer, "router_", count, columns if itself else read, itself, loader)
        if owner in self.config.firsts[:-1]:
            self._create_routers(layer, "router_next_", 1, columns, True, loader)
        layer.mobiquant_rows, layer.mobiquant_split = output_partition_sizes, split  # type: ignore[assignment]
        layer.mobiquant_columns = input_size, columns  # type: ignore[assignment]

    def _create_routers(
        self, layer: torch.nn.Module, prefix: str, count: int, columns: int, itself: bool, loader: Any
    ) -> None:  # fmt: skip
        """Room for routers that read so many columns, those of the layer `itself` maybe."""
        form = self.config.stored.format
        for name, (shape, dtype) in router.shapes(columns, form.router_hidden, len(form.slices) - 1).items():
            held = torch.zeros(count, *shape, dtype=dtype)
            along = 1 if name == "weight" and itself and isinstance(layer, RowParallelLinear) else None
            layer.register_parameter(prefix + name, RouterParameter(data=held, split=along, weight_loader=loader))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        for e in self.config.dropped:
            delattr(layer, f"planes_{e}")
        LAYERS[self.prefix] = layer
        layer.mobiquant = self.config  # type: ignore[assignment]
        if QUANT_METHOD not in STATE:
            given, widths = self.config.settings, self.config.stored.format.widths
            wanted = Budget(float(given.get("bits", widths[-1])), bool(given.get("routed", "bits" in given)))
            tokens = get_current_vllm_config().scheduler_config.max_num_batched_tokens
            STATE[QUANT_METHOD] = State(self.config.stored, tokens, layer.scale.device, wanted)
            install(STATE[QUANT_METHOD])
        layer.mobiquant_later = []  # type: ignore[assignment]
        if layer.mobiquant_first != self.prefix:
            # one buffer as long as the server runs, which a captured graph may read
            layer.mobiquant_depth = STATE[QUANT_METHOD].cap.clone()  # type: ignore[assignment]
            first = LAYERS[layer.mobiquant_first]  # type: ignore[index]
            carried = self.names[0] in self.config.firsts
            first.mobiquant_later.append((layer, first if carried else layer, "router_next_" if carried else "router_"))
        STATE[QUANT_METHOD].weights += sum(layer.mobiquant_rows) * layer.mobiquant_columns[1]  # type: ignore[arg-type]

    def apply(self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = torch.ops.vllm.mobiquant_linear(x.reshape(-1, x.shape[-1]), self.prefix, sum(layer.mobiquant_rows))
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias


def _router(layer: Any, index: int, prefix: str = "router_") -> router.Router:
    return router.Router(*(getattr(layer, prefix + name).data[index] for name in router.NAMES))


def _scores(layer: Any, index: int, x: Tensor) -> Tensor:
    """Scores of tokens by the router of a part, which reads the input of the layer itself; sums of the columns of all
    processes where these are split."""
    own = _router(layer, index)
    if not layer.mobiquant_split or get_tensor_model_parallel_world_size() == 1:
        return router.scores(x, own)
    x = x.float()
    sums = torch.cat([x @ own.weight.float().T, x.square().sum(1, keepdim=True)], 1)
    sums = tensor_model_parallel_all_reduce(sums)
    rms = (sums[:, -1:] / layer.mobiquant_columns[0]).sqrt().clamp_min(router.RMS_FLOOR)
    return router.outputs(sums[:, :-1] / rms, rms.log(), own)


def _linear(x: Tensor, name: str, rows: int) -> Tensor:
    """The product of a layer by its name, [T, K] -> [T, rows], each token at its precision."""
    layer = LAYERS[name]
    with matmul.exact() if layer.mobiquant.settings.get("exact") else nullcontext():
        return _product(layer, x, rows)


def _product(layer: Any, x: Tensor, rows: int) -> Tensor:
    state = STATE[QUANT_METHOD]
    form, tokens = layer.mobiquant.stored.format, x.shape[0]
    planes = [getattr(layer, f"planes_{e}").data for e in range(len(form.slices))]
    weight = matmul.Packed(planes, layer.scale.data, layer.zero.data, form.slices, form.group_size, x.shape[1])

    def decided(score: Tensor) -> Tensor:
        return router.depths(score, state.tau[:tokens], state.cap[:tokens])

    def depths(index: int) -> Tensor | int:
        if state.fixed is not None:
            return state.fixed
        ahead = hasattr(layer, "mobiquant_depth")
        return layer.mobiquant_depth[:tokens] if ahead else decided(_scores(layer, index, x))

    later = layer.mobiquant_later if state.fixed is None else []
    scores = router.scores_of_all(x, [_router(holder, 0, prefix) for _, holder, prefix in later])
    for (other, _, _), score in zip(later, scores, strict=True):
        other.mobiquant_depth[:tokens] = decided(score)
    parts = layer.router_weight.shape[0] if hasattr(layer, "router_weight") else 1
    if parts == 1 or state.fixed is not None:
        depth = depths(0)
        state.record(depth, tokens, rows * x.shape[1])
        return matmul.matmul(x, weight, depth)
    made, start = [], 0
    for index, count in enumerate(layer.mobiquant_rows):
        depth, own = depths(index), slice(start, start + count)
        part = matmul.Packed([p[:, own] for p in planes], weight.scale[own], weight.zero[own], *list(vars(weight).values())[3:])
        state.record(depth, tokens, count * x.shape[1])
        made.append(matmul.matmul(x, part, depth))
        start += count
    return torch.cat(made, 1)


def _fake(x: Tensor, name: str, rows: int) -> Tensor:
    return x.new_empty(x.shape[0], rows)


direct_register_custom_op("mobiquant_linear", _linear, fake_impl=_fake)
