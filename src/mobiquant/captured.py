"""One token at a time through a whole model on CUDA, replayed as one graph: what `generate` uses on a GPU.

What: a `Decoder` holds a cache of keys and values of a fixed length and runs a block by five launches: attention
(`kernels/cuda/block`), and for each input the products of the layers that read it (`kernels/cuda/few`), which make that input
by the norm or the gate before it and score it for routers. The prompt goes through the model itself, whose cache is copied.

Choice: a step of transformers is a thousand launches of small operators, which take longer than reading the weights. Captured
once as a CUDA graph, a step is one launch; position, token, thresholds and caps lie in device memory, so the same graph serves
every token and every precision, also one that is set between two tokens.

For blocks of the Llama kind, as on a CPU (`decoder`); `reason` says why a model is not of it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mobiquant import budget, matmul
from mobiquant.decoder import ROUND, kind_reason, path_of
from mobiquant.kernels.cuda import block as between
from mobiquant.kernels.cuda.few import DTYPES, Gate, Norm
from mobiquant.linear import MobiLinear, mobilinears

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WARM_UP = 2


def reason(model: Any, positions: int) -> str | None:
    """Why a model cannot be decoded by graphs for so many positions; None where it can."""
    config, weight = model.config, model.get_input_embeddings().weight
    if other := kind_reason(config, positions):
        return other
    head, share = _head(config), config.num_attention_heads // config.num_key_value_heads
    if head not in between.HEADS or share > between.MOST_SHARE or config.hidden_size > between.MOST_COLUMNS:
        return f"its heads have {head} elements, {share} for one key, in {config.hidden_size} columns"
    if {parameter.dtype for parameter in model.parameters()} != {weight.dtype} or weight.dtype not in DTYPES:
        return "its parameters are not all fp16 or all bf16"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "it lies on several devices"
    if len(budget.state(model).get()[0]) > 1:
        return "precision is set for several sequences"
    return _layers_reason(model, weight)


def _layers_reason(model: Any, like: Tensor) -> str | None:
    for block in model.base_model.layers:
        for name in LINEARS:
            layer = block.get_submodule(path_of(name))
            if not isinstance(layer, MobiLinear):
                return f"a layer '{name}' is not quantised"
            form, token = layer.format, like.new_empty(1, layer.in_features)
            if not matmul.on_gpu(token, form.slices, form.group_size, layer.in_features):
                return "its layers do not take the CUDA kernels"
    return None


def _head(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def of(model: Any, positions: int) -> "Decoder":
    """A decoder for at least so many positions: the one of the last call where the model has not changed since."""
    held = model.__dict__.get("_mobiquant_captured")
    if held is None or held.positions < positions or held.seen != _addresses(model):
        # the old cache is freed before there is a new one
        model.__dict__["_mobiquant_captured"] = held = None
        held = Decoder(model, -(-positions // ROUND) * ROUND)
        model.__dict__["_mobiquant_captured"] = held
    return held


def _addresses(model: nn.Module) -> list[int]:
    """Where all that a graph reads lies: elsewhere after a move, a cast, another load, or precision for another batch."""
    device = next(model.parameters()).device
    tensors = list(model.parameters())
    if mobilinears(model):
        tensors += [*budget.state(model).on(device), budget.state(model).counter(device)]
    return [tensor.data_ptr() for tensor in tensors] + [id(layer._tiles) for layer in mobilinears(model).values()]


def in_one_launch(layers: Sequence[Any]) -> bool:
    """Whether layers are quantised ones, all that one launch makes of its input."""
    return isinstance(layers[0], MobiLinear) and layers[0].are_at_once(layers)


class Decoder:
    """Steps of a model; `reason` must have found nothing. Reads the precision of the model anew at every step.

    A model that is not quantised is decoded too, which is what to compare with.
    """

    def __init__(self, model: Any, positions: int):
        self.model, self.positions = model, positions
        self.precision = budget.state(model) if mobilinears(model) else None
        config, inner = model.config, model.base_model
        embedding = model.get_input_embeddings().weight
        self.device, self.epsilon = embedding.device, config.rms_norm_eps
        cosine, sine = inner.rotary_emb(torch.zeros(1, device=self.device), torch.arange(positions, device=self.device)[None])
        half = _head(config) // 2
        self.cosine, self.sine = (table[0, :, :half].float().contiguous() for table in (cosine, sine))
        self.attention = [self._attention(block, embedding) for block in inner.layers]
        self.token = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.position = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits, self.filled = torch.empty(0), 0
        self._warm_up()
        self.seen = _addresses(model)

    def _attention(self, block: Any, like: Tensor) -> between.Attention:
        config, attention, norms = self.model.config, block.self_attn, None
        if hasattr(attention, "q_norm"):
            norms = attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon
        shape = config.num_attention_heads, config.num_key_value_heads, self.positions, _head(config)
        return between.Attention(1, *shape, attention.scaling, like, norms)

    @torch.inference_mode()
    def prefill(self, tokens: Int[Tensor, "1 L"]) -> Float[Tensor, " V"]:
        """Run a prompt through the model and take over its cache; returns the logits of the next token in fp32."""
        out = self.model(tokens.to(self.device), use_cache=True, logits_to_keep=1)
        length = tokens.shape[1]
        for own, layer in zip(self.attention, out.past_key_values.layers, strict=True):
            own.keys[:, :, :length] = layer.keys
            own.values[:, :, :length] = layer.values
        self.position.fill_(length)
        self.filled = length
        return out.logits[0, -1].float()

    @torch.inference_mode()
    def step(self, token: int) -> Float[Tensor, " V"]:
        """Read one token at the next position; returns the logits of the one after it, a buffer that the next step reuses.

        Raises IndexError where the positions asked for at the start are used up or there is no such token.
        """
        if not (0 <= token < self.model.config.vocab_size and self.filled < self.positions):
            raise IndexError(f"token {token} at position {self.filled} of {self.positions} cannot be read")
        self.token.fill_(token)
        if self.graph is None:
            self.logits = self._run()
        else:
            self.graph.replay()
        self.filled += 1
        return self.logits

    def _run(self) -> Float[Tensor, " V"]:
        """All launches of a step."""
        inner = self.model.base_model
        hidden, more = nn.functional.embedding(self.token, self.model.get_input_embeddings().weight), None
        for block, attention in zip(inner.layers, self.attention, strict=True):
            own, mlp = block.self_attn, block.mlp
            hidden, made = self._normed(hidden, more, block.input_layernorm.weight, (own.q_proj, own.k_proj, own.v_proj))
            attended = attention(*made, self.cosine, self.sine, self.position)
            more = own.o_proj.at_once(attended, alone=True)[0] if in_one_launch((own.o_proj,)) else own.o_proj(attended)
            hidden, made = self._normed(hidden, more, block.post_attention_layernorm.weight, (mlp.gate_proj, mlp.up_proj))
            more = self._gated(*made, mlp.down_proj)
        x = between.sum_norm(hidden, more, inner.norm.weight, self.epsilon)
        self.position += 1
        return self.model.get_output_embeddings()(x)[0].float()

    def _normed(
        self,
        hidden: Float[Tensor, "1 D"],
        more: Float[Tensor, "1 D"] | None,
        weight: Float[Tensor, " D"],
        layers: Sequence[Any],
    ) -> tuple[Float[Tensor, "1 D"], list[Float[Tensor, "1 _"]]]:
        """`hidden` and `more` added, and what layers make of the norm of that."""
        if not in_one_launch(layers):
            x = between.sum_norm(hidden, more, weight, self.epsilon)
            return hidden, [layer(x) for layer in layers]
        total = hidden if more is None else torch.empty_like(hidden)
        return total, layers[0].at_once(hidden, Norm(more, weight, total, self.epsilon))

    def _gated(self, gated: Float[Tensor, "1 I"], up: Float[Tensor, "1 I"], layer: Any) -> Float[Tensor, "1 D"]:
        """What a layer makes of `silu(gated) * up`."""
        return layer.at_once(gated, Gate(up))[0] if in_one_launch((layer,)) else layer(between.gate(gated, up))

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Compile what a step takes and capture it; counters and position are as before afterwards."""
        counter = None if self.precision is None else self.precision.counter(self.device)
        kept = None if counter is None else counter.clone()
        if self.device.type == "cuda":
            beside = torch.cuda.Stream(self.device)
            beside.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(beside):
                for _ in range(WARM_UP):
                    self._run()
            torch.cuda.current_stream(self.device).wait_stream(beside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._run()
        else:
            self._run()
        if counter is not None:
            counter.copy_(kept)
        self.position.zero_()
