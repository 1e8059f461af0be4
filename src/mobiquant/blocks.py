"""Finds the parts of a transformers model: its blocks, their linear layers, and which of those read the same input.

The only file that knows model classes, and it knows two: `nn.Linear` and GPT-2's `Conv1D` (a linear layer stored as [K, N]).
Everything else is found by walking: the blocks are the `ModuleList` that holds the most linear weights; layers share an
input when one tensor is handed to both while a block runs. No table of architectures, no substrings of names.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mobiquant.config import InputError


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a plain linear layer that can be quantised."""
    return type(module) in (nn.Linear, Conv1D)


def weight_of(module: nn.Module) -> Float[Tensor, "N K"]:
    """Weight of a linear layer as [N, K], in its own dtype."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight  # type: ignore[return-value]


def linears(module: nn.Module) -> dict[str, nn.Module]:
    """Name -> linear layer, in the order of registration."""
    return {name: child for name, child in module.named_modules() if is_linear(child)}


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the transformer blocks; raises InputError where there is none."""

    def weights(stack: nn.ModuleList) -> int:
        return sum(layer.weight.numel() for layer in linears(stack).values())  # type: ignore[union-attr]

    stacks = [(name, child) for name, child in model.named_modules() if isinstance(child, nn.ModuleList)]
    sized = [(weights(stack), -len(name), name, stack) for name, stack in stacks]
    size, _, name, stack = max(sized, key=lambda entry: entry[:2], default=(0, 0, "", nn.ModuleList()))
    if not size:
        raise InputError(
            f"{type(model).__name__} has no list of blocks with linear layers: only such causal LMs can be quantised"
        )
    return name, stack


def replace(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of the submodule of that dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, new)


def lower(device: torch.device) -> AbstractContextManager[Any]:
    """Blocks run in bf16 on CUDA inside; weights are cast anew each time, since a cast kept would be one of another depth."""
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if device.type == "cuda" else nullcontext()


class _Stop(Exception):
    """Ends a forward pass once a hook has seen what it wants."""


@dataclass
class Calls:
    """How the model calls its blocks: positional and keyword arguments besides the hidden states, for each block."""

    args: list[tuple[Any, ...]] = field(default_factory=list)
    kwargs: list[dict[str, Any]] = field(default_factory=list)

    def run(self, block: nn.Module, index: int, hidden: Float[Tensor, "S L D"]) -> Float[Tensor, "S L D"]:
        """Hidden states of a batch of sequences after `block`, called as the model calls its block `index`: fp32, but made in
        bf16 on CUDA (`lower`)."""
        args = [like(value, hidden) for value in self.args[index]]
        kwargs = {key: like(value, hidden) for key, value in self.kwargs[index].items()}
        with lower(hidden.device):
            out = block(hidden, *args, **kwargs)
        return (out[0] if isinstance(out, tuple) else out).float()


def like(value: Any, hidden: Tensor) -> Any:
    """Move the tensors of an argument to the device of `hidden`, floating ones to its dtype too; tuples included."""
    if isinstance(value, Tensor):
        return value.to(hidden.device, hidden.dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, tuple):
        return tuple(like(item, hidden) for item in value)
    return value


def restore_forward(stack: nn.ModuleList) -> None:
    """Give blocks back the forward pass of their class."""
    for block in stack:
        block.__dict__.pop("forward", None)


@torch.no_grad()
def capture(
    model: nn.Module, tokens: Int[Tensor, "S L"], device: torch.device, batch: int
) -> tuple[Float[Tensor, "S L D"], Calls]:
    """Hidden states before the first block, on the host, and how each block is called.

    The arguments are those of a batch of one sequence of full length, which broadcast over any batch. Blocks are replaced
    meanwhile: the first call runs one block for the form of its result, no other block is run.
    """
    _, blocks = find_blocks(model)
    calls, hidden = Calls(), []
    originals = [block.forward for block in blocks]

    def record(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if "hidden_states" in kwargs:
                args = (kwargs.pop("hidden_states"), *args)
            calls.args.append(args[1:])
            calls.kwargs.append({k: v for k, v in kwargs.items() if not k.startswith("past_key_value") and k != "layer_past"})
            if index == 0:
                forward.is_tuple = isinstance(originals[0](*args, **kwargs), tuple)  # type: ignore[attr-defined]
            return (args[0],) if first.is_tuple else args[0]  # type: ignore[attr-defined]

        return forward

    def keep(*args: Any, **kwargs: Any) -> Any:
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        hidden.append(states.to("cpu", copy=True))
        raise _Stop

    outside = _outside(model, blocks)
    first = record(0)
    try:
        for module in (*outside, blocks[0]):
            module.to(device)
        for index, block in enumerate(blocks):
            block.forward = first if index == 0 else record(index)
        model(tokens[:1].to(device), use_cache=False)
        blocks[0].forward = keep
        for part in tokens.split(batch):
            with suppress(_Stop):
                model(part.to(device), use_cache=False)
    finally:
        restore_forward(blocks)
        for module in (*outside, blocks[0]):
            module.to("cpu")
    return torch.cat(hidden).float(), calls


def _outside(model: nn.Module, blocks: nn.ModuleList) -> list[nn.Module]:
    """The modules besides the blocks that hold parameters or buffers of their own."""
    inside = set(blocks.modules())
    return [m for m in model.modules() if m not in inside and (m._parameters or m._buffers)]


@contextmanager
def watch_inputs(
    block: nn.Module, names: list[str], see: Callable[[str, Tensor], None], last: str | None = None
) -> Iterator[None]:
    """While open, call `see(name, input)` for each named layer that runs; stop the pass after `last` has been seen."""

    def hook(name: str) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            see(name, args[0])
            if name == last:
                raise _Stop

        return before

    handles = [block.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


def shared_inputs(block: nn.Module, run: Callable[[], Any]) -> list[list[str]]:
    """Names of the linear layers of a block that `run` calls, those that read the same tensor together, in running order."""
    seen: list[tuple[Tensor, list[str]]] = []

    def see(name: str, x: Tensor) -> None:
        for known, names in seen:
            if known is x or (known.data_ptr() == x.data_ptr() and known.shape == x.shape):
                names.append(name)
                return
        # the tensor is kept, so that its memory cannot be given to another input
        seen.append((x, [name]))

    with torch.no_grad(), watch_inputs(block, list(linears(block)), see):
        run()
    return [names for _, names in seen]
