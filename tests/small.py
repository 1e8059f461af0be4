"""A two-layer random Llama with a byte tokenizer, the checkpoint made of it, and the command called as a user calls it."""

import contextlib
import functools
import io
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mobiquant import cli

GROUP = 16
TEXT = "The quick brown fox jumps over the lazy dog; pack my box with five dozen jugs. " * 12
CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
_HOME = tempfile.TemporaryDirectory(prefix="mobiquant-tests-")


def tokenizer():
    """One token a byte, with an end of text, a padding token and a chat template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>", chat_template=CHAT)


def model(seed=0):
    """Weights so large that what a few bits lose shows in the predictions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=257,
    )
    return LlamaForCausalLM(config).eval()


def save(made, folder):
    """Write a model with its tokenizer; returns the folder."""
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def plain():
    """Folder of the float model; not to be changed."""
    return save(model(), Path(_HOME.name) / "plain")


@functools.cache
def text():
    """A .txt file of 900 tokens; not to be changed."""
    path = Path(_HOME.name) / "text.txt"
    path.write_text(TEXT)
    return path


@functools.cache
def quantised():
    """Folder of the checkpoint that the command makes of `plain`; not to be changed."""
    folder = Path(_HOME.name) / "quantised"
    ran = quantize("-o", folder)
    assert ran.code == 0, ran.err
    return folder


class Ran(NamedTuple):
    """What a call of the command left behind."""

    code: int
    out: str
    err: str


def run(*arguments):
    """Call the command in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = mock.patch.object(sys, "argv", ["mobiquant", *map(str, arguments)])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
    return Ran(code, out.getvalue(), err.getvalue())


def quantize(*arguments, source=None):
    """`mobiquant quantize` with settings that take a second; later ones win."""
    few = ("--calibration", text(), "--samples", 2, "--sequence-length", 32, "--group-size", GROUP, "--device", "cpu")
    return run("quantize", source or plain(), *few, *arguments)
