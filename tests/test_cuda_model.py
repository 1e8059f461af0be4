"""Whole models whose layers are read by the CUDA kernels, these emulated on a CPU or run on a GPU."""

import copy

import pytest
import tiny
import torch
from emulation import DEVICES, emulate
from helpers import snr_db

import mobiquant
from mobiquant import captured, matmul
from mobiquant.config import Format
from mobiquant.generate import generate
from mobiquant.kernels.cuda import few, many
from mobiquant.linear import mobilinears

DTYPE = torch.float16


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu":
        emulate(monkeypatch)
    return request.param


@pytest.fixture
def model(request, tmp_path, device):
    routers = getattr(request, "param", "per-block")
    made = tiny.quantize(tmp_path, format=Format(group_size=32, routers=routers))
    return torch.nn.Module.to(torch.nn.Module.to(made, DTYPE), device)


@pytest.fixture(autouse=True)
def kernels_count():
    """Kernels are what these tests are about: the session's fixture keeps to exact products."""
    before, matmul._only_exact = matmul._only_exact, False
    yield
    matmul._only_exact = before


def logits(model, ids):
    with torch.inference_mode():
        return model(ids.to(next(model.parameters()).device), use_cache=False).logits.float().cpu()


@pytest.mark.parametrize("model", ["per-block", "per-input", "per-linear"], indirect=True)
@pytest.mark.parametrize("length", [3, 20])
def test_a_model_says_what_it_says_without_kernels(model, length):
    ids = tiny.tokens(1, length)
    for bits in (2, 3.5, 8):
        mobiquant.set_precision(model, bits)
        with matmul.exact():
            wanted = logits(model, ids)
            expected = mobiquant.bits_read(model, reset=True)
        made = logits(model, ids)
        assert snr_db(wanted, made) > 25
        assert mobiquant.bits_read(model, reset=True) == pytest.approx(expected, abs=0.25)


@pytest.mark.parametrize("model", ["per-block", "per-input", "per-linear"], indirect=True)
def test_layers_of_one_input_take_one_launch(model, monkeypatch):
    # the first product of a format is preceded by others that try it
    logits(model, tiny.tokens(1, 2))
    calls, original = [], few.Group.__call__
    monkeypatch.setattr(
        few.Group, "__call__", lambda self, x, *rest: calls.append(len(self.members)) or original(self, x, *rest)
    )
    mobiquant.set_precision(model, 3)
    logits(model, tiny.tokens(1, 2))
    layers = mobilinears(model).values()
    assert sum(calls) == len(layers) and len(calls) == len({id(layer.owner) for layer in layers})
    assert all(layer._ahead is None for layer in layers)


@pytest.mark.parametrize("model", ["per-block", "per-input", "per-linear"], indirect=True)
def test_prompts_of_one_input_take_one_launch_too(model, monkeypatch):
    calls, original = [], many.product
    monkeypatch.setattr(many, "product", lambda x, weights, depth: calls.append(len(weights)) or original(x, weights, depth))
    layers = mobilinears(model).values()
    for bits in (3.5, 8):
        mobiquant.set_precision(model, bits)
        mobiquant.bits_read(model, reset=True)
        logits(model, tiny.tokens(1, 20))
        assert sum(calls) == len(layers) and len(calls) == len({id(layer.owner) for layer in layers})
        # each layer is counted, once
        assert mobiquant.bits_read(model, reset=True) == pytest.approx(bits, abs=0.6)
        calls.clear()
    assert all(layer._ahead is None for layer in layers)


def test_what_was_made_ahead_is_not_used_for_another_input_or_precision(model):
    block = model.model.layers[0].self_attn
    x = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(0)).to(DTYPE).to(next(model.parameters()).device)
    columns = block.q_proj.in_features
    x = x[..., :columns].contiguous() if columns <= 64 else torch.nn.functional.pad(x, (0, columns - 64))

    def both(first, second, bits):
        mobiquant.set_precision(model, bits[0], routed=False)
        block.q_proj(first)
        mobiquant.set_precision(model, bits[1], routed=False)
        made = block.k_proj(second)
        with matmul.exact():
            assert snr_db(block.k_proj(second).float(), made.float()) > 40

    both(x, x, (2, 8))
    both(x, -x, (3, 3))
    block.q_proj(x)
    x.mul_(-2)
    both(x, x, (3, 3))


def test_planes_come_back_for_saving_copying_and_moving(model, tmp_path):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    logits(model, tiny.tokens(1, 2))
    layer = next(iter(mobilinears(model).values()))
    assert layer._tiles is not None and layer.planes_0.numel() == 0
    for state in (model.state_dict(), copy.deepcopy(model).state_dict()):
        assert state.keys() == before.keys() and all(torch.equal(state[name], value) for name, value in before.items())
    logits(model, tiny.tokens(1, 2))
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(mobiquant.load(tmp_path / "out").state_dict()["model.layers.0.mlp.up_proj.planes_0"],
                       before["model.layers.0.mlp.up_proj.planes_0"].cpu())  # fmt: skip
    logits(model, tiny.tokens(1, 2))
    model.load_state_dict(before)
    assert layer._tiles is None
    mobiquant.set_precision(model, 4)
    made = logits(model, tiny.tokens(1, 2))
    assert torch.equal(made, logits(model, tiny.tokens(1, 2)))


def test_sequences_of_a_batch_have_precisions_of_their_own(model):
    ids = tiny.tokens(3, 4)
    mobiquant.set_precision(model, [2, 3.5, 8])
    made = logits(model, ids)
    mobiquant.bits_read(model, reset=True)
    for row, bits in enumerate((2, 3.5, 8)):
        mobiquant.set_precision(model, bits)
        assert snr_db(logits(model, ids[row : row + 1])[0], made[row]) > 25
    mobiquant.set_precision(model, [2, 3])
    with pytest.raises(ValueError, match="precision is set for 2 sequences and the batch has 3"):
        logits(model, ids)


def test_a_fixed_width_with_biases_and_without_routers_of_its_own(tmp_path, device):
    made = tiny.quantize(tmp_path, tiny.model("qwen2"), format=Format(group_size=32))
    made = torch.nn.Module.to(torch.nn.Module.to(made, DTYPE), device)
    mobiquant.set_precision(made, 4, routed=False)
    with matmul.exact():
        wanted = logits(made, tiny.tokens(2, 5))
    assert snr_db(wanted, logits(made, tiny.tokens(2, 5))) > 30
    assert mobiquant.bits_read(made) == 4


@pytest.fixture
def decoded(request, tmp_path, device):
    """A model with heads of 64 elements, which captured decoding is for; with norms of heads unless said otherwise."""
    family = getattr(request, "param", "qwen3")
    changes = {"hidden_size": 192, "head_dim": 64, "num_attention_heads": 3, "num_key_value_heads": 1}
    made = tiny.quantize(tmp_path, tiny.model(family, **changes), format=Format(group_size=64))
    return torch.nn.Module.to(torch.nn.Module.to(made, DTYPE), device)


@pytest.mark.parametrize("decoded", ["llama", "qwen2", "qwen3"], indirect=True)
def test_captured_steps_say_what_the_model_says(decoded):
    ids = tiny.tokens(1, 80).clamp(max=199)
    for bits in (2, 3.5):
        mobiquant.set_precision(decoded, bits)
        made = captured.of(decoded, 90)
        mobiquant.bits_read(decoded, reset=True)
        steps = [made.prefill(ids[:, :60])] + [made.step(int(token)).clone() for token in ids[0, 60:]]
        assert mobiquant.bits_read(decoded) == pytest.approx(bits, abs=0.6)
        wanted = logits(decoded, ids)[0, 59:]
        assert snr_db(wanted, torch.stack(steps).cpu()) > 25
    assert captured.of(decoded, 70) is made
    with pytest.raises(IndexError, match="token 200 at position 80"):
        made.step(200)


def test_a_step_does_without_one_launch_where_it_holds_fewer_layers(decoded, monkeypatch):
    monkeypatch.setattr(few, "MEMBERS", 2)
    ids = tiny.tokens(1, 12).clamp(max=199)
    mobiquant.set_precision(decoded, 3.5)
    made = captured.of(decoded, 20)
    made.prefill(ids[:, :11])
    block = decoded.model.layers[1]
    assert not captured.in_one_launch((block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj))
    assert captured.in_one_launch((block.mlp.gate_proj, block.mlp.up_proj))
    assert snr_db(logits(decoded, ids)[0, 11], made.step(int(ids[0, 11])).cpu()) > 25


def test_precision_set_between_two_steps_is_that_of_the_next(decoded):
    ids = tiny.tokens(1, 12)
    mobiquant.set_precision(decoded, 2, routed=False)
    made = captured.of(decoded, 20)
    made.prefill(ids[:, :10])
    mobiquant.set_precision(decoded, 8, routed=False)
    mobiquant.bits_read(decoded, reset=True)
    deep = made.step(int(ids[0, 10])).clone()
    assert mobiquant.bits_read(decoded, reset=True) == 8
    mobiquant.set_precision(decoded, 2, routed=False)
    made.prefill(ids[:, :10])
    mobiquant.bits_read(decoded, reset=True)
    shallow = made.step(int(ids[0, 10])).clone()
    assert mobiquant.bits_read(decoded) == 2 and snr_db(deep.cpu(), shallow.cpu()) < 20
    assert captured.of(decoded, 20) is made


def test_generate_takes_captured_steps(decoded, monkeypatch):
    taken, original = [], captured.Decoder.step
    monkeypatch.setattr(captured.Decoder, "step", lambda self, token: taken.append(token) or original(self, token))
    decoded.generation_config.eos_token_id = None
    mobiquant.set_precision(decoded, 8, routed=False)
    text = generate(decoded, tiny.tokenizer(), "w1 w2 w3", max_new_tokens=6)
    monkeypatch.setattr(captured, "reason", lambda *_: "not now")
    assert len(taken) == 5 and text == generate(decoded, tiny.tokenizer(), "w1 w2 w3", max_new_tokens=6)


def test_captured_decoding_says_why_it_cannot(tmp_path, device):
    made = tiny.quantize(tmp_path, format=Format(group_size=32))
    assert "not all fp16" in captured.reason(torch.nn.Module.to(made, device), 8) or "elements" in captured.reason(made, 8)
    other = tiny.quantize(tmp_path, tiny.model("gpt2"), format=Format(group_size=32))
    assert "'gpt2'" in captured.reason(other, 8)
