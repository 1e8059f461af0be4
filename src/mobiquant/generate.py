"""Text from a model, token by token as it is made.

A model of a known family is decoded natively, on a CPU by `decoder` and on CUDA by `captured`, with the same rules of sampling;
every other model, and every rule that is not listed here, goes through `generate` of transformers.

`draft` is the same model at fewer bits, to guess tokens that the model then checks several at a time (speculative decoding,
arXiv 2211.17192, here with one set of weights). Text is that of the model alone; whether it comes sooner depends on what a pass
over several tokens costs beside one over a single token (`docs/method.md`).
"""

import copy
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from mobiquant import budget, captured, decoder, matmul
from mobiquant.config import InputError

# settings of a generation that native decoding follows; one of the others that is set to something leaves it to transformers
PLAIN = {"do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens", "use_cache", "transformers_version"}
PLAIN |= {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "_from_model_config",
    "cache_implementation",
    "return_dict_in_generate",
}


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    chat: bool = False,
    max_new_tokens: int = 64,
    seed: int | None = None,
    draft_bits: float | None = None,
    stream: Callable[[str], None] = lambda _: None,
) -> str:
    """Continue a prompt, or answer it with `chat=True`; greedy without a seed, sampled with one. Returns the new text.

    With `draft_bits` tokens are guessed at that fixed width and checked at the precision of the model. `stream` gets pieces of
    the text as they are made. Raises InputError for an empty prompt, a model without a chat template, or a width that no prefix
    has.
    """
    from transformers import TextStreamer

    if not prompt.strip():
        raise InputError("the prompt is empty: give some text with --prompt")
    if max_new_tokens < 1:
        raise InputError(f"{max_new_tokens} new tokens cannot be made: give --max-new-tokens of 1 or more")
    guess = None if draft_bits is None else draft(model, draft_bits)
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError("the tokenizer of this model has no chat template: leave out --chat")
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in inputs.items() if name in ("input_ids", "attention_mask")}
    pieces: list[str] = []

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            pieces.append(text)
            stream(text)

    sampling: dict[str, Any] = {"do_sample": seed is not None}
    if seed is None:
        # a stored temperature would only cause warnings here
        sampling |= {"temperature": None, "top_p": None, "top_k": None}
    else:
        torch.manual_seed(seed)
    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        steps = None if guess else natively(model, inputs["input_ids"], max_new_tokens, seed is not None)
        if steps is None:
            how = sampling | ({"assistant_model": guess} if guess else {})
            model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, pad_token_id=pad, **how)  # type: ignore
        else:
            streamer.put(inputs["input_ids"])
            for token in steps:
                streamer.put(torch.tensor([token]))
            streamer.end()
    return "".join(pieces)


def draft(model: Any, bits: float = 2) -> Any:
    """The model as it is at a fixed width, whatever it is set to: an `assistant_model` for `generate` of transformers.

    All weights are shared. Raises InputError where no prefix has that width.
    """
    budget.checkpoint_of(model).format.depth(bits)
    forward, made = model.forward, copy.copy(model)

    @wraps(forward)
    def lower(*args: Any, **kwargs: Any) -> Any:
        with budget.precision(model, bits, routed=False):
            return forward(*args, **kwargs)

    made.forward = lower
    # transformers writes into that of an assistant
    made.generation_config = copy.deepcopy(model.generation_config)
    return made


def natively(model: Any, tokens: Tensor, count: int, sample: bool) -> Iterator[int] | None:
    """At most `count` tokens after `tokens` [1, L] by native decoding, greedy or sampled; None where this model has none."""
    length = tokens.shape[1] + count
    config = model.generation_config
    others = {name for name, value in config.to_diff_dict().items() if value and name not in PLAIN}
    way = captured if matmul.gpu(model.get_input_embeddings().weight) else decoder
    if others or tokens.shape[0] != 1 or way.reason(model, length) is not None:
        return None
    return _steps(model, way.of(model, length), tokens, count, _warpers(config) if sample else None)


def _steps(model: Any, made: decoder.Decoder | captured.Decoder, tokens: Tensor, count: int, warpers: Any) -> Iterator[int]:
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    logits, seen = made.prefill(tokens), tokens
    for number in range(count):
        if warpers is None:
            token = int(logits.argmax())
        else:
            token = int(torch.multinomial(warpers(seen, logits[None]).softmax(-1), 1))
            seen = torch.cat([seen, seen.new_tensor([[token]])], 1)
        yield token
        if token in ends or number + 1 == count:
            return
        logits = made.step(token)


def _warpers(config: Any) -> Any:
    """What transformers does to logits before it samples."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    found = LogitsProcessorList()
    if config.temperature not in (None, 1.0):
        found.append(TemperatureLogitsWarper(config.temperature))
    # 50 is what transformers takes where nothing is said
    if (top_k := 50 if config.top_k is None else config.top_k) > 0:
        found.append(TopKLogitsWarper(top_k))
    if config.top_p not in (None, 1.0):
        found.append(TopPLogitsWarper(config.top_p))
    return found
