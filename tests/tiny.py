"""Tiny random models of each family, a tokenizer of whole words, text for both, and a call that quantises them."""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import mobiquant
from mobiquant.config import Format

VOCABULARY = 200
SPECIAL = ("<unk>", "<pad>", "<eos>", "<user>", "<model>")
TEMPLATE = "{% for m in messages %}<user> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<model> {% endif %}"
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
ROTARY = {
    **COMMON,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.12,
}
GROUPED = {**ROTARY, "num_key_value_heads": 2}
GEMMA = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.12}
OPT = {"hidden_size": 48, "ffn_dim": 96, "word_embed_proj_dim": 48, "init_std": 0.12}
OPT |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
FAMILIES = {
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=16),
    "gemma2": lambda: Gemma2Config(**GROUPED, **GEMMA),
    "phi3": lambda: Phi3Config(**GROUPED),
    "gptneox": lambda: GPTNeoXConfig(**ROTARY),
    "opt": lambda: OPTConfig(**COMMON, **OPT),
    "gpt2": lambda: GPT2Config(**COMMON, **GPT2),
}
LINEARS = {"llama": 7, "mistral": 7, "qwen2": 7, "qwen3": 7, "gemma2": 7, "phi3": 4, "gptneox": 4, "opt": 6, "gpt2": 4}


def model(family="llama", dtype=torch.float32, seed=0, **changes):
    """A random model of two blocks; `changes` are set in its config. Biases are random too."""
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return made


def tokenizer():
    """Whole words `w0`, `w1`, ... and the special tokens, with a chat template."""
    words = [*SPECIAL, *(f"w{i}" for i in range(VOCABULARY - len(SPECIAL)))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", model_max_length=64
    )
    made.chat_template = TEMPLATE
    return made


def text(words=640, seed=0):
    """Words drawn so that some are frequent and most are rare."""
    chance = random.Random(seed)
    count = VOCABULARY - len(SPECIAL)
    return " ".join(f"w{int(count * chance.random() ** 2)}" for _ in range(words))


def text_file(folder, words=640):
    """A text file of that many tokens."""
    path = folder / "text.txt"
    path.write_text(text(words))
    return str(path)


def tokens(rows=2, length=12, seed=1):
    """[rows, length] token ids without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), VOCABULARY, (rows, length), generator=generator)


def quantize(folder, float_model=None, **settings):
    """Quantise a tiny Llama, or the model given, on all of a text file written to `folder`."""
    made = model() if float_model is None else float_model
    settings = {"samples": 4, "sequence_length": 16, "format": Format(group_size=32), "device": "cpu", **settings}
    path = text_file(folder, settings["samples"] * settings["sequence_length"])
    return mobiquant.quantize(made, tokenizer=tokenizer(), calibration=path, **settings)


@torch.no_grad()
def logits(made, ids=None):
    """Logits at the precision of the model."""
    return made(tokens() if ids is None else ids, use_cache=False).logits
