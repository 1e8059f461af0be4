"""The quantisers of others, each as a function from a float model to a plain one that holds the dequantised weights.

All get the same calibration tokens. What comes back is an ordinary transformers model, so that every method is measured by the
same code; `check_grid` then looks whether every group of every linear layer in the blocks holds at most `2^bits` values, so
that a layer which a package left out is a failure and not a good figure.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import methods
import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mobiquant import blocks
from mobiquant.config import InputError
from mobiquant.evaluate import round_to_nearest

INSTALL = "pip install 'mobiquant[peers]'"
BATCH = 8


@dataclass(frozen=True)
class Given:
    """What a peer gets: a float model on the host, which it may change, and what to make of it."""

    model: PreTrainedModel
    tokenizer: Any
    tokens: Int[Tensor, "S L"]
    bits: int
    group_size: int
    device: torch.device


def check_installed(method: str) -> None:
    """Raise InputError, with how to get it, where the package of a peer is missing."""
    package = methods.PEERS[method].package
    if package and find_spec(package) is None:
        raise InputError(f"{package} is not installed: {INSTALL}")


def rtn(given: Given) -> PreTrainedModel:
    """Round to nearest."""
    model: Any = given.model.to(given.device)  # type: ignore[arg-type]
    round_to_nearest(model, given.bits, given.group_size)
    return model


def gptq(given: Given) -> PreTrainedModel:
    """GPTQ of llm-compressor."""
    from llmcompressor.modifiers.gptq import GPTQModifier  # pyright: ignore[reportMissingImports] -- an extra

    groups = _groups(given, "imatrix_mse")
    return _oneshot(
        given, [GPTQModifier(config_groups=groups, ignore=["lm_head"], actorder="static", dampening_frac=0.01, block_size=128)]
    )


def awq(given: Given, observer: str = "memoryless_minmax") -> PreTrainedModel:
    """AWQ of llm-compressor; `observer` names how it finds the range of a group."""
    from llmcompressor.modifiers.quantization import QuantizationModifier  # pyright: ignore[reportMissingImports]
    from llmcompressor.modifiers.transform.awq import AWQModifier  # pyright: ignore[reportMissingImports]

    groups = _groups(given, observer)
    smoothing = AWQModifier(duo_scaling="both", n_grid=20)
    with _without_pinning():
        return _oneshot(given, [smoothing, QuantizationModifier(config_groups=groups, ignore=["lm_head"])])


def awqsearch(given: Given) -> PreTrainedModel:
    """AWQ with ranges searched."""
    return awq(given, "memoryless_mse")


def _groups(given: Given, observer: str) -> dict[str, Any]:
    """Asymmetric integer codes with a scale for each group, in the words of compressed-tensors."""
    from compressed_tensors.quantization import (  # pyright: ignore[reportMissingImports]
        QuantizationArgs,
        QuantizationScheme,
    )

    weights = QuantizationArgs(
        num_bits=given.bits, type="int", symmetric=False, strategy="group", group_size=given.group_size, dynamic=False,
        observer=observer,
    )  # fmt: skip
    return {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}


@contextmanager
def _without_pinning() -> Iterator[None]:
    """AWQ of llm-compressor pins host memory even where there is no accelerator to copy to, and fails at it."""
    from llmcompressor.pipelines.cache import IntermediatesCache  # pyright: ignore[reportMissingImports]

    if torch.accelerator.is_available():
        yield
    else:
        with mock.patch.object(IntermediatesCache, "pin_memory", lambda *_: None):
            yield


def _oneshot(given: Given, recipe: list[Any]) -> PreTrainedModel:
    """Run modifiers over the calibration tokens and copy what they made into the float model.

    The package reads its own layers only from a folder: the model goes through a temporary one.
    """
    from compressed_tensors.quantization import forward_quantize  # pyright: ignore[reportMissingImports]
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]
    from torch.utils.data import DataLoader

    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in given.tokens]
    with TemporaryDirectory() as folder:
        given.model.save_pretrained(folder)
        given.tokenizer.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=given.model.dtype)
        oneshot(model=model, recipe=recipe, dataset=DataLoader(rows, batch_size=min(BATCH, len(rows))))  # type: ignore[arg-type]
    plain = dict(given.model.named_modules())
    with torch.no_grad():
        for name, module in model.named_modules():
            scheme = getattr(module, "quantization_scheme", None)
            for leaf, parameter in plain[name].named_parameters(recurse=False) if name in plain else ():
                value = getattr(module, leaf)
                if scheme is not None and leaf == "weight":
                    value = forward_quantize(module, value, "weight", scheme.weights)
                parameter.copy_(value.to(parameter.device))
    return given.model.to(given.device)  # type: ignore[arg-type]


def hqq(given: Given) -> PreTrainedModel:
    """HQQ, layer by layer; it needs no calibration."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear  # pyright: ignore[reportMissingImports]

    _, stack = blocks.find_blocks(given.model)
    settings = BaseQuantizeConfig(nbits=given.bits, group_size=given.group_size, axis=0)
    with torch.no_grad():
        for name, layer in blocks.linears(stack).items():
            if not isinstance(layer, nn.Linear):
                raise InputError(f"HQQ knows no {type(layer).__name__} such as '{name}'")
            layer.to(given.device)
            made = HQQLinear(layer, settings, compute_dtype=layer.weight.dtype, device=str(given.device), del_orig=False)
            layer.weight.copy_(made.dequantize())
    return given.model.to(given.device)  # type: ignore[arg-type]


def autoround(given: Given, iterations: int = 200, extended: bool = False) -> PreTrainedModel:
    """AutoRound; `extended` takes symmetric codes and the algorithm that its makers recommend for them at 2 bits."""
    from auto_round import AutoRound, SignRoundConfig  # pyright: ignore[reportMissingImports] -- an extra

    how = SignRoundConfig(
        iters=iterations, bits=given.bits, group_size=given.group_size, sym=extended, enable_alg_ext=extended,
        enable_minmax_tuning=True, enable_quanted_input=True,
    )  # fmt: skip
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in given.tokens.split(BATCH)]
    on_cuda = given.device.type == "cuda"
    with TemporaryDirectory() as folder:
        # it looks a loaded model up by its name, on the hub where that is no folder; a .gguf file has none
        given.model.config.save_pretrained(folder)
        given.model.name_or_path = given.model.config._name_or_path = folder
        made = AutoRound(
            given.model,
            tokenizer=given.tokenizer,
            alg_configs=how,
            dataset=batches,
            nsamples=given.tokens.shape[0],
            seqlen=given.tokens.shape[1],
            batch_size=BATCH,
            device_map=str(given.device),
            # kept whole in memory: the weights are read from it afterwards
            low_cpu_mem_usage=False,
            enable_torch_compile=None if on_cuda else False,
        )
        model, _ = made.quantize()
    # it leaves the whole process asking for deterministic algorithms
    torch.use_deterministic_algorithms(False)
    return model.to(given.device)


def autoround1000(given: Given) -> PreTrainedModel:
    """AutoRound with the iterations of its recipe `best`."""
    return autoround(given, 1000)


def autoround1000sym(given: Given) -> PreTrainedModel:
    """AutoRound as recommended for 2 bits."""
    return autoround(given, 1000, extended=True)


METHODS: dict[str, Callable[[Given], PreTrainedModel]] = {
    function.__name__: function for function in (rtn, gptq, awq, awqsearch, hqq, autoround, autoround1000, autoround1000sym)
}


def check_grid(method: str, model: nn.Module, bits: int, group_size: int) -> None:
    """Raise InputError where a group of a linear layer in the blocks has more than `2^bits` values."""
    root, stack = blocks.find_blocks(model)
    for name, layer in blocks.linears(stack).items():
        weight = blocks.weight_of(layer).detach()
        # axis 0 of HQQ: a group is a column of the weight folded to as many rows
        groups = [weight.reshape(group_size, -1).T] if method == "hqq" else weight.split(group_size, dim=1)
        values = max(int((group.sort(1).values.diff(dim=1) != 0).sum(1).max()) for group in groups) + 1
        if values > 2**bits:
            raise InputError(f"layer '{root}.{name}' was left with {values} values in a group, more than {bits} bits hold")


def stored_bits(method: str, model: nn.Module, bits: int, group_size: int) -> float:
    """Bits stored for each quantised weight, scales and zero points included."""
    _, stack = blocks.find_blocks(model)
    shapes = [blocks.weight_of(layer).shape for layer in blocks.linears(stack).values()]
    groups = sum(n * -(-k // group_size) for n, k in shapes)
    return bits + methods.PEERS[method].overhead(bits) * groups / sum(n * k for n, k in shapes)
