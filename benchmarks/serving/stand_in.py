"""A checkpoint of random weights in the shapes of a model, for speed alone: its text says nothing.

Codes, scales and routers are random, so it costs what a real one costs. Routers differ from layer to layer and not from token
to token, which gives the table of thresholds without calibration: at each threshold the layers above it read one slice more.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mobiquant import budget, checkpoint, quantizer
from mobiquant.config import Checkpoint, Format, InputError
from mobiquant.linear import mobilinears

PARTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)  # fmt: skip
# blocks, width, inner width, heads, heads of keys: those of Llama-3.2-1B and TinyLlama, and one for tests
SHAPES = {"llama-1b": (16, 2048, 8192, 32, 8), "tinyllama": (22, 2048, 5632, 32, 4), "tiny": (2, 128, 256, 4, 2)}
GAP, ROWS = 4.0, 33


def make(
    name: str, tokenizer: str, folder: Path, floats: Path | None = None, form: Format = Format(), seed: int = 0
) -> None:  # fmt: skip
    """Write a random checkpoint with the tokenizer of a model, and a float model of these shapes to `floats`.

    Raises InputError on shapes that are not known.
    """
    if name not in SHAPES:
        raise InputError(f"model '{name}' has no shapes here: choose from {', '.join(SHAPES)}")
    blocks, width, inner, heads, key_heads = SHAPES[name]
    words = AutoTokenizer.from_pretrained(tokenizer)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks, num_attention_heads=heads,
        num_key_value_heads=key_heads, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    if floats is not None:
        model.save_pretrained(floats)
        words.save_pretrained(floats)
    names = [tuple(f"model.layers.{i}.{part}" for part in parts) for i in range(blocks) for parts in PARTS]
    begins = tuple(range(0, len(names), len(PARTS)))
    stored = Checkpoint(form, tuple(names), begins, calibration={"recipe": "random", "model": name})
    checkpoint.build_layers(model, stored)
    quantizer.make_quantized(model, replace(stored, thresholds=_fill(model, stored)), words, [])
    model.save_pretrained(folder)


@torch.no_grad()
def _fill(model: Any, stored: Checkpoint) -> tuple[dict[str, Any], ...]:
    """Random values for all quantised layers; returns the table of thresholds."""
    levels, sizes, form = [], [], stored.format
    for layer in mobilinears(model).values():
        for name, buffer in layer.named_buffers():
            if name.startswith("planes_"):
                buffer.random_(0, 256)
            elif name == "scale":
                buffer.uniform_(0.5, 1.0).mul_(0.04 / layer.in_features**0.5)
            elif name == "zero":
                buffer.fill_(128)
            elif name.endswith("_weight"):
                buffer.random_(-127, 128)
            elif name.endswith("_weight_scale"):
                buffer.fill_(1e-3)
            elif name.endswith("_out"):
                buffer.zero_()
            elif name.startswith("router_"):
                buffer.normal_()
    layers = mobilinears(model)
    for name, (holder, ahead) in checkpoint.router_holders(layers, stored).items():
        # a slice scores this much lower than the one before
        own = holder.get_router(ahead)
        own.out_bias[1:] = GAP
        own.out_bias[0] = torch.rand(()) * GAP
        levels.append(float(own.out_bias[0]))
        sizes.append(float(sum(one.in_features * one.out_features for one in layers[name].members)))
    return tuple(_region(cap, form, torch.tensor(levels), torch.tensor(sizes)) for cap in budget.region_caps(form))


def _region(cap: int, form: Format, levels: torch.Tensor, sizes: torch.Tensor) -> dict[str, Any]:
    """Rows of a region: at a threshold a slice is open where the level of a layer, less the gaps before it, is above."""
    fall = torch.nn.functional.softplus(torch.tensor(GAP)).item()
    taus = torch.linspace(GAP, -fall * (cap - 1), ROWS).tolist()
    rows = []
    for tau in taus:
        shares = [float((sizes * (levels - fall * e > tau)).sum() / sizes.sum()) for e in range(cap - 1)]
        bits = [float(form.widths[0])]
        for share, width in zip(shares, form.slices[1:cap], strict=True):
            bits.append(bits[-1] + share * width)
        rows.append(bits)
    return {"cap": cap, "tau": taus, "bits": rows}
