"""Text from a model, token by token as it is made."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mobiquant.config import InputError


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    *,
    chat: bool = False,
    max_new_tokens: int = 64,
    seed: int | None = None,
    stream: Callable[[str], None] = lambda _: None,
) -> str:
    """Continue a prompt, or answer it with `chat=True`; greedy without a seed, sampled with one. Returns the new text.

    `stream` gets pieces of the text as they are made. Raises InputError for an empty prompt or a model without a chat template.
    """
    from transformers import TextStreamer

    if not prompt.strip():
        raise InputError("the prompt is empty: give some text with --prompt")
    if max_new_tokens < 1:
        raise InputError(f"{max_new_tokens} new tokens cannot be made: give --max-new-tokens of 1 or more")
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
        model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, pad_token_id=pad, **sampling)  # type: ignore
    return "".join(pieces)
