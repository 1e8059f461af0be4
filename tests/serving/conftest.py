"""A tiny checkpoint, and what transformers says at each budget."""

import json

import pytest
import tiny
import torch
from served import BUDGETS, COUNT, PROMPTS, SHAPE

import mobiquant
from mobiquant import matmul
from mobiquant.config import Format


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("served")
    made = tiny.quantize(home, tiny.model(**SHAPE), format=Format(group_size=32))
    made.generation_config.eos_token_id = None
    made.save_pretrained(home / "checkpoint")
    tiny.tokenizer().save_pretrained(home / "checkpoint")
    return home / "checkpoint"


@pytest.fixture(scope="session")
def wanted(folder):
    """Greedy tokens of transformers by prompt and budget."""
    model, found = mobiquant.load(folder, dtype=torch.float32), {}
    for budget in BUDGETS:
        mobiquant.set_precision(model, budget["bits"], routed=budget.get("routed", True))
        for prompt in PROMPTS:
            with matmul.exact(), torch.inference_mode():
                ids = torch.tensor([prompt])
                made = model.generate(ids, max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False, pad_token_id=1)
            found[tuple(prompt), json.dumps(budget)] = made[0, len(prompt) :].tolist()
    return found
