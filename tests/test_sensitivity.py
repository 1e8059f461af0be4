"""What slices of layers are worth to the model, against differences that are measured and gradients that are taken plainly."""

import pytest
import tiny
import torch

from mobiquant.calibrate import passes, sensitivity
from mobiquant.config import Format
from mobiquant.linear import MobiLinear

FORM = Format(group_size=32)


def test_gains_of_layers_sum_to_the_fall_of_the_divergence(tmp_path):
    # the codes that the full recipe starts from
    made, original = tiny.quantize(tmp_path, format=FORM, sweeps=1), tiny.model()
    tokens = tiny.tokens(6, 16)
    gains = sensitivity.gains(passes.Pair.of(made, original), tokens, FORM, torch.device("cpu"), lambda *_: None)
    assert len(gains) == 14 and next(made.parameters()).dtype == next(tiny.quantize(tmp_path).parameters()).dtype
    wanted = tiny.logits(original, tokens).double().log_softmax(-1)
    fall = []
    for depth in range(1, 6):
        made.model.layers[0].mlp.up_proj.precision.set([float("-inf")], [depth])
        made_log = tiny.logits(made, tokens).double().log_softmax(-1)
        fall.append(float((wanted.exp() * (wanted - made_log)).sum(-1).mean()))
    total = torch.stack(list(gains.values())).sum(0)
    for i in range(2):
        assert total[i].item() == pytest.approx(fall[i] - fall[i + 1], rel=0.25)


def test_the_gain_of_a_layer_is_its_gradients_times_its_step(tmp_path):
    made, original, tokens = tiny.quantize(tmp_path, format=FORM), tiny.model(), tiny.tokens(2, 16)
    name = "model.layers.1.self_attn.o_proj"
    gains = sensitivity.gains(passes.Pair.of(made, original), tokens, FORM, torch.device("cpu"), lambda *_: None)[name]
    wanted = original(tokens).logits.log_softmax(-1).detach()
    layers = {key: layer for key, layer in made.named_modules() if isinstance(layer, MobiLinear)}
    slopes = []
    for depth in (2, 3):
        plain = tiny.model()
        for key, layer in layers.items():
            plain.get_submodule(key).weight.data = layer.packed().read(depth)
        (wanted.exp() * (wanted - plain(tokens).logits.log_softmax(-1))).sum(-1).mean().backward()
        slopes.append(plain.get_submodule(name).weight.grad)
    step = layers[name].packed().read(2) - layers[name].packed().read(3)
    assert gains[1].item() == pytest.approx(((slopes[0] + slopes[1]) / 2 * step).sum().item(), rel=1e-3, abs=1e-7)


def test_offsets_compare_gains_of_a_weight_with_a_floor():
    gains = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([1.0, 1.0]), "c": torch.tensor([-1.0, 2.0])}
    form = Format(slices=(2, 1, 1))
    found = sensitivity.offsets(gains, [("a", "b"), ("c",)], {"a": 1, "b": 1, "c": 2}, form)
    # all layers: 3 and 4 over 4 weights
    assert torch.allclose(found["a"], torch.tensor([2 / 0.75, 1.0]).log())
    assert torch.allclose(found["c"], torch.tensor([sensitivity.FLOOR, 1.0]).log())


def test_above_four_bits_nothing_is_taken_from_the_slices_below():
    gains = {"a": torch.tensor([1e-6, 1e-6, 1.0, 1.0]), "b": torch.tensor([1.0, 1.0, 1e-6, 1e-6])}
    found = sensitivity.offsets(gains, [("a",), ("b",)], {"a": 1, "b": 1}, Format(slices=(2, 1, 1, 2, 2)))
    scores = torch.stack(list(found.values())) - 4.0 * torch.arange(4)
    assert scores[:, :2].min() > scores[:, 2:].max() + 8
