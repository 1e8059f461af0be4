"""One token at a time through a whole model in one native call: what `generate` uses on a CPU.

What: a `Decoder` holds the structures that the library reads (`kernels/cpu`): pointers to the slice planes, scales and routers
of the model as they lie there, norms in fp32, tables of rotary positions and a cache of keys and values in fp32. The prompt
goes through the model itself, whose cache is copied; every token after it is one call.

Choice: Python and torch take about 30 ms for the thousand small operators of a token, which is many times what reading the
weights takes. A native step is there for blocks of the Llama kind, whose parts are the same in several families; `reason`
says why a model is not of that kind, and it is then decoded by transformers.

The head, a matrix [vocabulary, width], is stored at 8 bits in groups of 64 (as other CPU runtimes do), the only part that is
rounded further than in the checkpoint. Its slices are used as those of a layer are: all rows are read at 4 bits, and the 256
and more with the highest logits at 8. The logits of the others keep the noise of 4 bits.
"""

import ctypes
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mobiquant import budget, clip, matmul, pack
from mobiquant import slices as s
from mobiquant.kernels.cpu import library
from mobiquant.linear import MobiLinear
from mobiquant.router import Router

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# rotary positions that do not depend on the length of the text
ROTARY = ("default", "linear", "llama3", "yarn")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_SLICES, HEAD_GROUP, HEAD_ROWS = (4, 4), 64, 4096
# rows of the head that are read at its full depth: more than any rule of sampling looks at
BEST = 256
# positions are asked for in steps, so that a slightly longer text needs no new decoder
ROUND = 256
EMBEDDINGS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def path_of(name: str) -> str:
    """Where a linear layer lies in a block."""
    return ("self_attn." if name in ATTENTION else "mlp.") + name


def kind_reason(config: Any, positions: int) -> str | None:
    """Why a model is not of the kind that is decoded natively, on whatever device; None where it is."""
    if config.model_type not in FAMILIES:
        return f"models of the family '{config.model_type}' have no native decoder"
    if config.hidden_act != "silu":
        return f"the activation '{config.hidden_act}' is not silu"
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") not in ROTARY:
        return "its rotary positions depend on the length of the text"
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and window < positions:
        return f"its attention reaches back {window} tokens only"
    return None


def reason(model: Any, positions: int) -> str | None:
    """Why a model cannot be decoded natively for so many positions; None where it can."""
    config = model.config
    if matmul.is_exact():
        return "exact products are asked for"
    if library.load() is None:
        return "the CPU kernels are not built"
    if next(model.parameters()).device.type != "cpu":
        return "the model is not on a CPU"
    if other := kind_reason(config, positions):
        return other
    if model.get_input_embeddings().weight.dtype not in EMBEDDINGS:
        return "its embedding has a dtype that the library does not read"
    precision = budget.state(model)
    if len(precision.get()[0]) > 1:
        return "precision is set for several sequences"
    return _layers_reason(model)


def _layers_reason(model: Any) -> str | None:
    for block in model.base_model.layers:
        for name in library.LINEARS:
            layer = block.get_submodule(path_of(name))
            if not isinstance(layer, MobiLinear):
                return f"a layer '{name}' is not quantised"
            if unfit := library.unfit(layer.format.group_size, layer.in_features):
                return unfit
    return None


def of(model: Any, positions: int) -> "Decoder":
    """A decoder for at least so many positions: the one of the last call where the model has not changed since."""
    held = model.__dict__.get("_mobiquant_decoder")
    if held is None or held.positions < positions or held.seen != _addresses(model):
        held = Decoder(model, -(-positions // ROUND) * ROUND)
        model.__dict__["_mobiquant_decoder"] = held
    return held


def _addresses(model: nn.Module) -> list[int]:
    """Where all tensors of a model lie: others after a move, a cast or another load."""
    return [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]


class Decoder:
    """Native steps of a model; `reason` must have found nothing. Reads the precision of the model anew at every step."""

    def __init__(self, model: Any, positions: int, best: int = BEST):
        self.model, self.precision = model, budget.state(model)
        self._held: list[Any] = []
        config, stack = model.config, model.base_model.layers
        self.size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.blocks = (library.Block * len(stack))(*[self._block(block) for block in stack])
        made = library.Decoder()
        made.blocks = ctypes.addressof(self.blocks)
        embedding = model.get_input_embeddings().weight.detach()
        made.embedding, made.embedding_type = self._pointer(embedding), EMBEDDINGS[embedding.dtype]
        made.head = self._head(model.get_output_embeddings())
        made.final_norm = self._floats(model.base_model.norm.weight)
        cosine, sine = model.base_model.rotary_emb(torch.zeros(1, dtype=torch.float32), torch.arange(positions)[None])
        made.cosine, made.sine = (self._floats(table[0, :, : self.size // 2]) for table in (cosine, sine))
        shape = len(stack), config.num_key_value_heads, positions, self.size
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)
        made.keys, made.values = self._pointer(self.keys), self._pointer(self.values)
        made.count, made.width, made.inner = len(stack), config.hidden_size, config.intermediate_size
        made.heads, made.key_heads, made.head_size = config.num_attention_heads, config.num_key_value_heads, self.size
        made.vocabulary, made.positions, made.epsilon = made.head.rows, positions, config.rms_norm_eps
        made.first_bits, made.best = HEAD_SLICES[0], best
        made.attention_scale = stack[0].get_submodule("self_attn").scaling
        self.made, self.logits, self.filled = made, torch.empty(made.vocabulary), 0
        self.positions, self.seen = positions, _addresses(model)

    def prefill(self, tokens: Int[Tensor, "1 L"]) -> Float[Tensor, " V"]:
        """Run a prompt through the model and take over its cache; returns the logits of the next token in fp32."""
        out = self.model(tokens, use_cache=True, logits_to_keep=1)
        length = tokens.shape[1]
        for number, layer in enumerate(out.past_key_values.layers):
            self.keys[number, :, :length] = layer.keys[0]
            self.values[number, :, :length] = layer.values[0]
        self.filled = length
        return out.logits[0, -1].float()

    def step(self, token: int) -> Float[Tensor, " V"]:
        """Read one token at the next position; returns the logits of the one after it, a buffer that the next step reuses.

        Raises IndexError where the positions asked for at the start are used up or there is no such token.
        """
        if not (0 <= token < self.made.vocabulary and self.filled < self.positions):
            raise IndexError(f"token {token} at position {self.filled} of {self.positions} cannot be read")
        depths = len(self.precision.widths)
        counts = (ctypes.c_double * depths)()
        done = library.load().mobiquant_decode(  # type: ignore[union-attr]
            ctypes.byref(self.made), ctypes.byref(self._reading()), token, self.filled, self.logits.data_ptr(), counts,
            library.threads(),
        )  # fmt: skip
        if not done:
            raise MemoryError("no memory for one more token")
        self.filled += 1
        for depth, count in enumerate(counts):
            self.precision.record(depth + 1, 1, int(count))
        return self.logits

    def _reading(self) -> library.Reading:
        tau, cap = self.precision.get()
        widths = (ctypes.c_int32 * library.MAX_BITS)(*self.precision.widths)
        return library.Reading(widths, int(cap[0]), int(self.precision.routed), tau[0])

    def _pointer(self, tensor: Tensor) -> int:
        """Address of a tensor that is kept as long as this object."""
        self._held.append(tensor := tensor.detach().contiguous())
        return tensor.data_ptr()

    def _floats(self, tensor: Tensor) -> int:
        return self._pointer(tensor.float())

    def _block(self, block: nn.Module) -> library.Block:
        made, before = library.Block(), None
        for place, name in enumerate(library.LINEARS):
            layer: Any = block.get_submodule(path_of(name))
            planes = [plane.contiguous() for plane in layer.packed().planes]
            bias = None if layer.bias is None else layer.bias.float()
            parts = (*planes, layer.scale.contiguous(), layer.zero.contiguous())
            self._held += [*parts, bias]
            shape = layer.format.slices[0], layer.format.group_size, layer.in_features
            made.linear[place] = library.weight_of(planes, *parts[-2:], bias, *shape)
            if layer.owner is not before:
                made.ahead = made.ahead or layer.format.routers == "per-block"
                if layer.owner.place is None or place:
                    made.router[place] = self._router(layer.get_router())
                if layer.next_place is not None:
                    made.next = self._router(layer.get_router(ahead=True))
            before = layer.owner
        made.first_norm, made.second_norm = (
            self._floats(block.get_submodule(name).weight) for name in ("input_layernorm", "post_attention_layernorm")
        )
        attention = block.get_submodule("self_attn")
        for name, where in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
            if hasattr(attention, name):
                setattr(made, where, self._floats(getattr(attention, name).weight))
        return made

    def _router(self, found: Router) -> library.Router:
        made = library.Router(
            *(
                self._pointer(part)
                for part in (found.weight, found.weight_scale, found.rms, found.bias, found.out, found.out_bias)
            )
        )
        made.hidden, made.outputs, made.columns = found.weight.shape[0], found.out.shape[0], found.weight.shape[1]
        return made

    def _head(self, head: nn.Linear) -> library.Weight:
        """The output matrix at 8 bits: the library's own planes, rounded to the nearest."""
        rows, columns = head.weight.shape
        parts: list[list[Tensor]] = []
        for start in range(0, rows, HEAD_ROWS):
            weight = head.weight[start : start + HEAD_ROWS].detach().float()
            scale, zero = clip.min_max(weight, HEAD_SLICES, HEAD_GROUP)
            code = s.encode(weight, scale, zero, HEAD_SLICES, HEAD_GROUP)
            parts.append([*pack.pack(code, HEAD_SLICES), scale, zero])
        planes = [torch.cat([part[e] for part in parts], 1) for e in range(len(HEAD_SLICES))]
        scale, zero = (torch.cat([part[e] for part in parts]) for e in (-2, -1))
        bias = None if head.bias is None else head.bias.detach().float()
        self._held += [*planes, scale, zero, bias]
        return library.weight_of(planes, scale, zero, bias, HEAD_SLICES[0], HEAD_GROUP, columns)
