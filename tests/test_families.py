"""Every family of models is quantised, saved, loaded and run at several budgets."""

import math

import pytest
import tiny
import torch
from helpers import snr_db

import mobiquant
from mobiquant import InputError, data
from mobiquant.budget import checkpoint_of
from mobiquant.config import Format
from mobiquant.linear import MobiLinear

BUDGETS = (2.5, 3.5, 6)
# measured 21 to 28 dB: 64 calibration tokens for layers of 48 inputs fit noise
LEAST_DB = 18


def quantised_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, MobiLinear)}


def at(model, bits, ids=None):
    with mobiquant.precision(model, bits, routed=False):
        return tiny.logits(model, ids)


@pytest.fixture(scope="module", params=list(tiny.FAMILIES))
def case(request, tmp_path_factory):
    """Family, logits of the float model, the quantised model in memory, and the same loaded from its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny.model(request.param)
    reference = tiny.logits(model)
    made = tiny.quantize(folder, model)
    made.save_pretrained(folder / "made")
    return request.param, reference, made, mobiquant.load(folder / "made")


def test_all_linear_layers_of_the_blocks_are_quantised_and_the_head_is_not(case):
    family, _, made, loaded = case
    names = quantised_names(loaded)
    assert len(names) == 2 * tiny.LINEARS[family]
    assert names == quantised_names(made) == {name for group in checkpoint_of(loaded).inputs for name in group}
    head = {name for name, module in loaded.named_modules() if module is loaded.get_output_embeddings()}
    assert set(checkpoint_of(loaded).skipped) == head and not head & names


def test_a_loaded_model_gives_the_logits_of_the_one_in_memory(case):
    _, _, made, loaded = case
    assert torch.equal(tiny.logits(loaded), tiny.logits(made))


def test_noise_falls_with_the_width_and_is_small_at_full_width(case):
    _, reference, _, loaded = case
    noise = [snr_db(reference, at(loaded, bits)) for bits in (2, 3, 4, 6, 8)]
    assert noise == sorted(noise)
    assert noise[-1] > LEAST_DB


def test_generation_reads_about_what_is_asked_for(case):
    _, _, _, loaded = case
    ids = tiny.tokens(4, 20)
    for bits in BUDGETS:
        mobiquant.set_precision(loaded, bits)
        mobiquant.bits_read(loaded, reset=True)
        out = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert out.shape == (4, 24)
        assert mobiquant.bits_read(loaded, reset=True) == pytest.approx(bits, abs=0.4)


def test_cached_passes_give_the_logits_of_whole_passes(case):
    _, _, _, loaded = case
    ids = tiny.tokens(1, 12)
    with mobiquant.precision(loaded, 4.7), torch.no_grad():
        whole = loaded(ids, use_cache=False).logits[:, -1]
        start = loaded(ids[:, :-1], use_cache=True)
        step = loaded(ids[:, -1:], past_key_values=start.past_key_values, use_cache=True).logits[:, -1]
    assert snr_db(whole, step) > 60


def test_queries_keys_and_values_of_llama_share_one_input_and_one_router(tmp_path):
    made = tiny.quantize(tmp_path)
    root = "model.layers.1."
    attention = tuple(root + f"self_attn.{letter}_proj" for letter in "qkv")
    assert attention in checkpoint_of(made).inputs
    assert (root + "mlp.gate_proj", root + "mlp.up_proj") in checkpoint_of(made).inputs
    owners = {made.get_submodule(name).owner for name in attention}
    assert owners == {made.get_submodule(attention[0])}


@pytest.mark.parametrize(
    "form",
    [
        Format(group_size=32, routers="per-linear"),
        Format(group_size=32, routers="per-input"),
        Format(slices=(2, 2, 2, 2), group_size=16),
        Format(group_size=256),
        Format(group_size=40, slices=(4, 4)),
        Format(group_size=64, slices=(2, 2), router_hidden=3),
    ],
    ids=["routers of layers", "routers of inputs", "slices of the paper", "group beyond K", "short last group", "four bits"],
)
def test_formats_survive_saving_and_serve_their_budgets(tmp_path, form):
    model = tiny.model()
    reference = tiny.logits(model)
    made = tiny.quantize(tmp_path, model, format=form)
    made.save_pretrained(tmp_path / "made")
    loaded = mobiquant.load(tmp_path / "made")
    assert checkpoint_of(loaded).format == form
    assert torch.equal(tiny.logits(loaded), tiny.logits(made))
    noise = [snr_db(reference, at(loaded, bits)) for bits in form.widths]
    assert noise == sorted(noise)
    layer = loaded.model.layers[0].mlp.down_proj
    assert layer.scale.shape == (48, math.ceil(80 / form.group_size))
    own = [m.owner is m for m in loaded.modules() if isinstance(m, MobiLinear)]
    assert sum(own) == (14 if form.routers == "per-linear" else 8)
    middle, spread = (form.widths[0] + form.widths[-1]) / 2, form.widths[-1] - form.widths[0]
    with mobiquant.precision(loaded, middle):
        mobiquant.bits_read(loaded, reset=True)
        text = (tmp_path / "text.txt").read_text()
        tiny.logits(loaded, data.windows(text, tiny.tokenizer(), 16, "text"))
        assert mobiquant.bits_read(loaded) == pytest.approx(middle, abs=0.05 * spread)


def test_formats_of_other_slices_load_in_part(tmp_path):
    made = tiny.quantize(tmp_path, format=Format(slices=(2, 2, 2, 2), group_size=32))
    made.save_pretrained(tmp_path / "made")
    small = mobiquant.load(tmp_path / "made", max_bits=6.5)
    assert checkpoint_of(small).format.widths == (2, 4, 6)
    assert torch.equal(tiny.logits(small), at(made, 6))
    with pytest.raises(InputError, match="fewer than two slices"):
        mobiquant.load(tmp_path / "made", max_bits=3)
