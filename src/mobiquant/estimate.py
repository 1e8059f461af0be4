"""What a checkpoint holds, and what making one would take, without touching any weight.

Models are built without data (torch's meta device), so sizes are exact. Which layers share an input is seen by running one
block with random weights. Memory and time are estimates: the terms that dominate, times what one core product takes here.
"""

import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mobiquant import blocks, calibrate, checkpoint, integration
from mobiquant.calibrate import distill, full, nested, routing, thresholds
from mobiquant.config import Calibration, Checkpoint, Format, InputError, Training
from mobiquant.kernels.cpu import library

GB = 1e9


def _skeleton(config: Any) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _sizes(model: nn.Module, form: Format, dtype: torch.dtype) -> dict[str, Any]:
    """Stored bits per weight and the size of the checkpoint at each depth, from a skeleton with quantised layers."""
    full = checkpoint.stored_bits(model, form)
    weights = full["weights"]
    tensors = {id(p): p for p in model.parameters()}.values()
    rest = sum(p.numel() for p in tensors) * dtype.itemsize / GB
    per_depth = {}
    for depth, width in enumerate(form.widths, 1):
        bits = checkpoint.stored_bits(model, form, depth)
        per_depth[f"{width} bits"] = round((bits["planes"] + bits["scales"] + bits["routers"]) / 8 / GB + rest, 4)
    parts = {name: round(full[name] / weights, 4) for name in ("planes", "scales", "routers")}
    return {
        "quantised_weights": int(weights),
        "stored_bits_per_weight": {**parts, "total": round(sum(parts.values()), 4)},
        "size_gb": per_depth,
        "unquantised_gb": round(rest, 4),
    }


def describe(folder: Path) -> dict[str, Any]:
    """Facts of a mobiquant folder for `info`; raises InputError where it is none."""
    if not folder.is_dir():
        raise InputError(f"folder '{folder}' does not exist: give a folder made by mobiquant quantize")
    values = checkpoint.read_config(folder)
    stored = Checkpoint.from_dict(checkpoint.quantization_of(values, folder))
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    model = _skeleton(config)
    checkpoint.build_layers(model, stored)
    form, made = stored.format, stored.calibration
    return {
        "architecture": (values.get("architectures") or ["unknown"])[0],
        "made_from": made.get("model", "unknown"),
        "slices": ",".join(map(str, form.slices)),
        "reads_at_bits": ",".join(map(str, form.widths)),
        "group_size": form.group_size,
        "routers": f"{form.routers}, {form.router_hidden} hidden units",
        "quantised_layers": sum(len(names) for names in stored.inputs),
        **_sizes(model, form, config.dtype or torch.float32),
        "left_as_they_were": stored.skipped,
        "recipe": made.get("recipe", "unknown"),
        "calibration": {name: made[name] for name in ("text", "samples", "sequence_length", "tokens", "seed") if name in made},
        "versions": stored.versions,
    }


def estimate(
    model: str, form: Format, settings: Calibration, device: torch.device, training: Training | None = None
) -> dict[str, Any]:
    """What `quantize` would make and take, for `--dry-run`; `settings` are resolved, `training` is that of the full recipe."""
    config, is_gguf = integration.load_config(model)
    dtype = torch.bfloat16 if is_gguf else config.dtype or torch.float32
    skeleton = _skeleton(config)
    parameters = sum(p.numel() for p in {id(p): p for p in skeleton.parameters()}.values())
    root, stack = blocks.find_blocks(skeleton)
    skipped = calibrate.left_out(skeleton, root)
    groups = _groups(config)
    inputs = [tuple(f"{root}.{i}.{name}" for name in names) for i in range(len(stack)) for names in groups]
    layers = [(name, *blocks.weight_of(layer).shape) for name, layer in blocks.linears(stack).items()]
    work = _work(skeleton, stack, groups, form, settings, device)
    if training is not None:
        _add_training(work, skeleton, len(stack), form, settings, training, device)
    checkpoint.build_layers(skeleton, Checkpoint(form, tuple(inputs), tuple(range(0, len(inputs), len(groups) or 1))))
    sizes = _sizes(skeleton, form, dtype)
    loading = parameters * ((4 + dtype.itemsize) if is_gguf else dtype.itemsize)
    standing = parameters * dtype.itemsize + max(sizes["size_gb"].values()) * GB + work["streams"]
    host = _used() + (max(loading, standing) if device.type != "cpu" else max(loading, standing + work["block"]))
    shapes: dict[str, int] = {}
    for _, rows, columns in layers:
        shapes[f"{rows}x{columns}"] = shapes.get(f"{rows}x{columns}", 0) + 1
    return {
        "layers": {shape: f"{count} layers" for shape, count in shapes.items()},
        **sizes,
        "left_as_they_were": skipped,
        "tokens": (settings.samples or 0) * (settings.sequence_length or 0),
        "memory_gb": round(host / GB, 2),
        "device_memory_gb": round(work["block"] / GB, 2) if device.type != "cpu" else 0.0,
        "minutes": round(_seconds(work, device) / 60, 1),
    }


def _groups(config: Any) -> list[list[str]]:
    """Layers of the first block by shared input, seen on one block with random weights."""
    small = type(config).from_dict(config.to_dict())
    small.num_hidden_layers = 1
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    one = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    hidden, calls = blocks.capture(one, tokens, torch.device("cpu"), 1)
    _, stack = blocks.find_blocks(one)
    return blocks.shared_inputs(stack[0], lambda: calls.run(stack[0], 0, hidden))


def _work(
    skeleton: nn.Module, stack: nn.ModuleList, groups: list[list[str]], form: Format, settings: Calibration,
    device: torch.device,
) -> dict[str, float]:  # fmt: skip
    """Bytes of streams and of one block in work; products in FLOP, those of training apart; columns over all sweeps, weights
    and rows of all blocks."""
    tokens = (settings.samples or 0) * (settings.sequence_length or 0)
    streams = len({"fast": calibrate.fast, "paper": calibrate.paper, "full": nested}[settings.recipe].readings(form))
    width = skeleton.get_input_embeddings().weight.shape[1]  # type: ignore[operator, union-attr]
    block = blocks.linears(stack[0])
    flop = largest = columns = 0.0
    passes = 8.0 * settings.epochs if settings.recipe == "paper" else streams * 2.4
    for names in groups:
        shapes = [blocks.weight_of(block[name]).shape for name in names]
        rows, k = sum(shape[0] for shape in shapes), shapes[0][1]
        flop += tokens * (2 * rows * k * passes + 2 * k * k * (2 * streams - 1))
        # targets of the descent, and its gradients
        flop += 2 * rows * k * k * (streams + len(form.slices) * (settings.sweeps or 0))
        columns += k
        # codes, gradients and reads of all depths in fp32, moments and their sums
        largest = max(largest, 4.0 * len(form.slices) * (4 * rows * k + 3 * k * k) + 8.0 * k * k * streams)
    weights = sum(blocks.weight_of(layer).numel() for layer in block.values())
    batch = settings.batch * (settings.sequence_length or 0)
    measured = thresholds.measured_shape(settings.samples or 0, settings.sequence_length or 0, device)
    measured = (len(thresholds.SHARES) + 1) * (len(form.slices) - 1) * math.prod(measured)
    return {
        "streams": 4.0 * width * (tokens * (streams + 1) + measured),
        "block": 3 * 4.0 * weights + largest + 4.0 * batch * 8 * width,
        "flop": len(stack) * (flop + measured * 2 * weights),
        "trained": 0.0,
        "columns": len(stack) * columns * (settings.sweeps or 0),
        "weights": len(stack) * weights,
        "rows": len(stack) * sum(blocks.weight_of(layer).shape[0] for layer in block.values()),
    }


def _add_training(
    work: dict[str, float], skeleton: nn.Module, count: int, form: Format, settings: Calibration, training: Training,
    device: torch.device,
) -> None:  # fmt: skip
    """Add what the full recipe takes: three products forward and backward for each depth, one for the float model.

    Routers end to end make one pass with the products of all depths.
    """
    parameters = sum(p.numel() for p in {id(p): p for p in skeleton.parameters()}.values())
    length, depths = settings.sequence_length or 0, min(training.passes_per_step, len(form.slices) + training.mixed)
    steps = full.block_steps(training, int(work["weights"]), device)
    tokens = training.distill_batch * length
    work["trained"] = 6 * steps * training.block_batch * length * work["weights"]
    work["trained"] += 2 * training.distill_steps * tokens * parameters * (3 * depths + 1)
    work["trained"] += 2 * training.routing_steps * tokens * (3 * len(form.slices) * work["weights"] + parameters)
    vocabulary, width = skeleton.get_input_embeddings().weight.shape  # type: ignore[operator, union-attr]
    if training.distill_steps:
        # both models, gradients, moments; what a pass keeps of logits and blocks: compiled ones fitted to 10.8 GB measured for
        # SmolLM2 on an H200, others to 25 GB
        by_logit, by_state = (8.0, 30.0) if device.type == "cuda" else (28.0, 72.0)
        kept = tokens * (by_logit * vocabulary + by_state * count * width)
        work["block"] = max(work["block"], work["weights"] * distill.BYTES_PER_WEIGHT + 8.0 * parameters + kept)
    if training.routing_steps:
        # a batch goes through in parts where memory is short
        least = routing.memory(int(work["weights"]), int(work["rows"]), vocabulary, len(form.slices), length)
        work["block"] = max(work["block"], least + 8.0 * parameters)


def _seconds(work: dict[str, float], device: torch.device) -> float:
    """Products at rates measured now, plus what goes by the weight, and in a descent by the column."""
    rate = _rate(1024, torch.float32, device)
    if device.type != "cpu":
        # measured on an H200: a block of 64 columns is one launch; training reaches a fifth of the rate of a large product
        trained = work["trained"] / (0.2 * _rate(4096, torch.bfloat16, device)) if work["trained"] else 0.0
        return work["flop"] / rate + trained + work["columns"] * 1.5e-5 + work["weights"] * 1e-8 + 15
    # measured: fifteen small operations a column; element-wise work of clip and routers by the weight; attention is not counted
    columns = 0.0 if library.available() else work["columns"] * 2.5e-4
    return 1.25 * (work["flop"] + work["trained"]) / rate + columns + work["weights"] * 5e-7 + 15


def _rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second in the product of two square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        (a @ b).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _used() -> float:
    """Bytes of memory this process holds already."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1.0 if sys.platform == "darwin" else 1024.0)
