"""What is measured: the linear layers of a block by shared input, and how many blocks, for models that people run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Input:
    """Layers that read one input: their name, rows of each, and columns."""

    name: str
    rows: tuple[int, ...]
    columns: int


@dataclass(frozen=True)
class Model:
    """The linear layers of a model; `config` are the settings of a Llama that has them."""

    name: str
    blocks: int
    inputs: tuple[Input, ...]
    config: dict[str, int | float]

    @property
    def weights(self) -> int:
        """Weights of all linear layers in the blocks."""
        return self.blocks * sum(sum(one.rows) * one.columns for one in self.inputs)


def llama(name: str, blocks: int, width: int, inner: int, heads: int, key_heads: int, vocabulary: int, base: float) -> Model:
    """A model of the Llama kind."""
    head = width // heads
    config = {
        "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks, "num_attention_heads": heads,
        "num_key_value_heads": key_heads, "vocab_size": vocabulary, "rope_theta": base, "head_dim": head,
    }  # fmt: skip
    inputs = (
        Input("query, key, value", (width, key_heads * head, key_heads * head), width),
        Input("output", (width,), width),
        Input("gate, up", (inner, inner), width),
        Input("down", (width,), inner),
    )
    return Model(name, blocks, inputs, config)


MODELS = {
    model.name: model
    for model in (
        llama("llama-2-7b", 32, 4096, 11008, 32, 32, 32000, 1e4),
        llama("llama-3-8b", 32, 4096, 14336, 32, 8, 128256, 5e5),
        llama("tiny", 2, 192, 320, 3, 1, 64, 1e4),
    )
}
