"""Text with tokens guessed at fewer bits: that of the model alone."""

import pytest
import tiny
import torch

import mobiquant
from mobiquant import InputError, matmul
from mobiquant.config import Format
from mobiquant.generate import generate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model, routers that differ from token to token among them."""
    return tiny.quantize(tmp_path_factory.mktemp("draft"), tiny.model(), format=Format(group_size=32))


@pytest.fixture(autouse=True)
def in_full_precision():
    # a pass over several tokens may round otherwise than one over a single one
    with matmul.exact():
        yield


@pytest.mark.parametrize(("bits", "routed"), [(3, False), (4, False), (8, False), (3.0, True), (2.5, True)])
def test_what_is_drafted_and_checked_is_what_the_model_says(model, bits, routed):
    mobiquant.set_precision(model, bits, routed=routed)
    before, tokens = mobiquant.budget.state(model).get(), torch.tensor([[5, 6, 7, 8]])
    how = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(tokens, **how)
    assert torch.equal(model.generate(tokens, assistant_model=mobiquant.draft(model, 2), **how), alone)
    assert mobiquant.budget.state(model).get() == before


def test_a_draft_reads_its_own_width_and_leaves_the_model_as_it_is(model):
    mobiquant.set_precision(model, 8, routed=False)
    tokens = torch.tensor([[5, 6, 7, 8]])
    drafting = mobiquant.draft(model, 3)
    with torch.inference_mode():
        high, low = model(tokens).logits, drafting(tokens).logits
        assert torch.equal(model(tokens).logits, high)
        with mobiquant.precision(model, 3, routed=False):
            assert torch.equal(model(tokens).logits, low)
    assert not torch.equal(high, low)
    assert drafting.lm_head.weight is model.lm_head.weight and drafting.generation_config is not model.generation_config


def test_text_is_the_same_with_a_draft(model):
    tokenizer = tiny.tokenizer()
    mobiquant.set_precision(model, 4, routed=False)
    prompt = tokenizer.decode([5, 6, 7, 8])
    pieces = []
    made = generate(model, tokenizer, prompt, max_new_tokens=12, draft_bits=2, stream=pieces.append)
    assert made == generate(model, tokenizer, prompt, max_new_tokens=12) and "".join(pieces) == made
    with pytest.raises(InputError, match=r"2\.5"):
        generate(model, tokenizer, prompt, draft_bits=2.5)
