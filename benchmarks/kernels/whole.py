"""A whole model with random weights, one stream of tokens: the step that `generate` takes, beside the same step in bf16."""

import gc
from dataclasses import dataclass

import torch
from clock import median
from layers import GROUP, OPEN, SLICES
from shapes import Model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from mobiquant import budget, captured, checkpoint
from mobiquant.config import Checkpoint, Format
from mobiquant.linear import mobilinears

DTYPE = torch.bfloat16


@dataclass
class Speed:
    """Tokens a second of one stream and bytes of weights on the device."""

    name: str
    tokens_per_second: float
    resident: int
    linears: int


def random_model(model: Model, device: torch.device) -> LlamaForCausalLM:
    """A Llama of the shapes of a model, random on the device."""
    config = LlamaConfig(**model.config, max_position_embeddings=4096, tie_word_embeddings=False)  # type: ignore[arg-type]
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=DTYPE).eval().requires_grad_(False)


def quantise_at_random(model: LlamaForCausalLM, slices: tuple[int, ...], routers: str) -> None:
    """Random quantised layers, routed as in a checkpoint, in the place of the linear ones."""
    names = [
        tuple(f"model.layers.{i}.{part}" for part in parts)
        for i in range(len(model.model.layers))
        for parts in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",),
        )
    ]  # fmt: skip
    form = Format(slices=slices, group_size=GROUP, routers=routers)  # type: ignore[arg-type]
    checkpoint.build_layers(model, Checkpoint(form, tuple(names), tuple(range(0, len(names), 4))))
    for layer in mobilinears(model).values():
        for name, buffer in layer.named_buffers():
            if name.startswith("planes_"):
                buffer.random_(0, 256)
            elif name == "zero":
                buffer.random_(60, 200)
            elif name.endswith("scale"):
                buffer.uniform_(0.001, 0.002)
            elif name.endswith("_weight"):
                buffer.random_(-127, 128)
            elif name != "bias":
                buffer.normal_()


def resident(model: nn.Module, linears: bool) -> int:
    """Bytes of parameters and buffers, of the blocks' linear layers alone or of everything."""
    inside = [m for m in model.modules() if isinstance(m, nn.Linear) or m in mobilinears(model).values()]
    chosen = [m for m in inside if m is not model.get_output_embeddings()] if linears else [model]  # type: ignore[operator]
    total = sum(t.numel() * t.element_size() for m in chosen for t in (*m.parameters(), *m.buffers()))
    for layer in mobilinears(model).values():
        laid = layer._tiles
        total += 0 if laid is None else sum(piece.numel() for piece in laid.pieces)
    return total


def measure(model: Model, device: torch.device, prompt: int, bits: tuple[int, ...], max_bits: int, routers: str) -> list[Speed]:
    """Speeds of the bf16 model and of the quantised one at fixed widths, loaded with the slices of `max_bits`."""
    found, made = [], random_model(model, device)
    tokens = torch.randint(0, int(model.config["vocab_size"]), (1, prompt), device=device)
    found.append(_speed("bf16", made, tokens))
    kept = Format(slices=SLICES, group_size=GROUP).truncated(max_bits).slices
    quantise_at_random(made, kept, routers)
    gc.collect()
    widths = Format(slices=kept, group_size=GROUP).widths
    for width in bits:
        # a threshold below all scores: routers decide, and every token comes out at the cap
        for name, tau in ((f"{width} bits", float("-inf")), (f"{width} bits, with routers", OPEN)):
            budget.state(made).set([tau], [widths.index(width) + 1])
            found.append(_speed(name, made, tokens))
    return found


def _speed(name: str, model: LlamaForCausalLM, tokens: torch.Tensor) -> Speed:
    decoder = captured.of(model, tokens.shape[1] + 64)
    decoder.prefill(tokens)
    taken = median(lambda: decoder.step(1), tokens.device, 31)
    return Speed(name, 1e6 / taken, resident(model, False), resident(model, True))
