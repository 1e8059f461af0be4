"""Native decoding against the model itself: logits, what was read, tokens, and who may be decoded so."""

import json

import pytest
import small
import tiny
import torch
from helpers import snr_db

import mobiquant
from mobiquant import decoder, matmul
from mobiquant.config import Format
from mobiquant.generate import generate, natively
from mobiquant.kernels.cpu import library

pytestmark = [
    pytest.mark.backend,
    pytest.mark.skipif(library.load() is None, reason="the CPU kernels are not built: no C++ compiler"),
]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# int8 activations in two blocks and the head at 8 bits; a step that goes wrong is far below
LEAST_DB = 25
BUDGETS = ((2, False), (4, False), (8, False), (2.75, True), (5, True))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    # a window of attention longer than any text here
    changes = {"sliding_window": 64} if request.param == "mistral" else {}
    made, routers = tiny.model(request.param, **changes), "per-input" if request.param == "qwen2" else "per-block"
    return tiny.quantize(tmp_path_factory.mktemp(request.param), made, format=Format(group_size=32, routers=routers))


@torch.inference_mode()
def test_steps_give_the_logits_of_the_model(model, instructions):
    ids = tiny.tokens(1, 20)
    for bits, routed in BUDGETS:
        mobiquant.set_precision(model, bits, routed=routed)
        steps = decoder.Decoder(model, 32)
        made = [steps.prefill(ids[:, :8])] + [steps.step(int(token)).clone() for token in ids[0, 8:]]
        with matmul.exact():
            wanted = model(ids).logits[0, 7:]
        least = LEAST_DB if not routed else 15
        assert snr_db(wanted, torch.stack(made)) > least, (bits, routed)


@torch.inference_mode()
def test_the_best_rows_of_the_head_are_read_in_full(model, instructions):
    ids = tiny.tokens(1, 9)
    mobiquant.set_precision(model, 4, routed=False)
    found = []
    for best in (tiny.VOCABULARY, 8):
        steps = decoder.Decoder(model, 32, best)
        steps.prefill(ids[:, :8])
        found.append(steps.step(int(ids[0, 8])).clone())
    whole, quick = found
    top = whole.topk(8).indices
    assert torch.equal(whole[top], quick[top]) and not torch.equal(whole, quick)
    assert 8 <= (whole == quick).sum() <= 32 + 8 and snr_db(whole, quick) > 15


@torch.inference_mode()
def test_steps_count_what_they_read(model):
    ids = tiny.tokens(1, 24)
    for bits, routed in BUDGETS:
        mobiquant.set_precision(model, bits, routed=routed)
        steps = decoder.Decoder(model, 32)
        steps.prefill(ids[:, :4])
        mobiquant.bits_read(model, reset=True)
        for token in ids[0, 4:]:
            steps.step(int(token))
        read = mobiquant.bits_read(model, reset=True)
        with matmul.exact():
            model(ids)
        # a score near its threshold may fall on either side of it
        assert read == pytest.approx(mobiquant.bits_read(model, reset=True), abs=0.0 if not routed else 0.35)


@torch.inference_mode()
def test_precision_may_change_between_two_steps(model):
    ids, steps = tiny.tokens(1, 9), decoder.Decoder(model, 32)
    found = []
    for bits in (8, 2, 8):
        mobiquant.set_precision(model, 8, routed=False)
        steps.prefill(ids[:, :8])
        mobiquant.set_precision(model, bits, routed=False)
        found.append(steps.step(int(ids[0, 8])).clone())
    assert torch.equal(found[0], found[2]) and snr_db(found[0], found[1]) < 40


@torch.inference_mode()
def test_threads_change_no_bit_of_a_step(model):
    ids, found, before = tiny.tokens(1, 8), [], torch.get_num_threads()
    mobiquant.set_precision(model, 3, routed=True)
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        steps = decoder.Decoder(model, 32)
        steps.prefill(ids)
        found.append(torch.stack([steps.step(t).clone() for t in (7, 8, 9)]))
    torch.set_num_threads(before)
    # the prompt goes through torch's own operators, which may add in another order
    assert all(snr_db(found[0], other) > 90 for other in found[1:])


def test_positions_end_and_tokens_exist(model):
    steps = decoder.Decoder(model, 9)
    with torch.inference_mode():
        steps.prefill(tiny.tokens(1, 8))
    for token in (-1, tiny.VOCABULARY):
        with pytest.raises(IndexError, match=f"token {token} at position 8 of 9"):
            steps.step(token)
    steps.step(3)
    with pytest.raises(IndexError, match="position 9 of 9"):
        steps.step(3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.quantize(tmp_path_factory.mktemp("one"), format=Format(group_size=32))


@torch.inference_mode()
def test_greedy_tokens_are_those_of_the_highest_logits(llama):
    mobiquant.set_precision(llama, 8, routed=False)
    ids = tiny.tokens(1, 6)
    llama.generation_config.eos_token_id = None
    made = list(natively(llama, ids, 10, False))
    steps = decoder.Decoder(llama, 64)
    logits = steps.prefill(ids)
    for token in made:
        assert token == int(logits.argmax())
        logits = steps.step(token)
    llama.generation_config.eos_token_id = made[4]
    assert list(natively(llama, ids, 10, False)) == made[: made.index(made[4]) + 1]


def test_generate_streams_the_tokens_of_native_decoding(llama):
    mobiquant.set_precision(llama, 4, routed=False)
    llama.generation_config.eos_token_id, pieces, tokenizer = None, [], tiny.tokenizer()
    text = generate(llama, tokenizer, "w5 w9 w11", max_new_tokens=7, stream=pieces.append)
    with torch.inference_mode():
        made = list(natively(llama, tokenizer("w5 w9 w11", return_tensors="pt")["input_ids"], 7, False))
    assert text == "".join(pieces) and text.split() == tokenizer.decode(made, skip_special_tokens=True).split()


@torch.inference_mode()
def test_sampling_follows_temperature_and_the_number_of_candidates(llama):
    ids, config = tiny.tokens(1, 6), llama.generation_config
    config.eos_token_id = None
    greedy = list(natively(llama, ids, 10, False))
    config.top_k = 1
    assert list(natively(llama, ids, 10, True)) == greedy
    config.top_k, config.temperature = 0, 1e-4
    assert list(natively(llama, ids, 10, True)) == greedy
    config.temperature, found = 3.0, []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(list(natively(llama, ids, 10, True)))
    assert found[0] == found[1] != found[2]
    config.temperature = config.top_k = None


def test_who_is_left_to_transformers(llama, tmp_path):
    assert decoder.reason(llama, 64) is None
    with matmul.exact():
        assert decoder.reason(llama, 64) == "exact products are asked for"
    llama.generation_config.repetition_penalty = 1.3
    assert natively(llama, tiny.tokens(1, 4), 3, False) is None
    llama.generation_config.repetition_penalty = 1.0
    assert natively(llama, tiny.tokens(2, 4), 3, False) is None
    other = tiny.quantize(tmp_path, tiny.model("phi3"), format=Format(group_size=32))
    assert "'phi3' have no native decoder" in str(decoder.reason(other, 64))
    loaded = mobiquant.load(small.quantised(), dtype=torch.float32)
    assert "groups of 16 weights are no multiple of 32" in str(decoder.reason(loaded, 64))
    short = tiny.quantize(tmp_path, tiny.model("mistral"), format=Format(group_size=32))
    assert "reaches back 8 tokens" in str(decoder.reason(short, 64)) and decoder.reason(short, 8) is None


@torch.inference_mode()
def test_a_decoder_is_kept_until_the_model_changes(llama):
    held = decoder.of(llama, 20)
    assert decoder.of(llama, 200) is held and decoder.of(llama, 300) is not held
    held, layer = decoder.of(llama, 20), llama.model.layers[0].mlp.up_proj
    layer.scale = layer.scale.clone()
    assert decoder.of(llama, 20) is not held


def test_bench_measures_a_checkpoint_and_its_float_model(tmp_path, capsys):
    from typer.testing import CliRunner

    from mobiquant.cli import app

    tiny.model(max_position_embeddings=128).save_pretrained(tmp_path / "float")
    tiny.tokenizer().save_pretrained(tmp_path / "float")
    made = tiny.quantize(tmp_path, tiny.model(max_position_embeddings=128), format=Format(group_size=32))
    made.save_pretrained(tmp_path / "made")
    few = ["--prompt-tokens", "40", "--new-tokens", "3", "--threads", "1", "--repetitions", "1"]
    command = ["bench", str(tmp_path / "made"), "--bits", "2.5", "--reference", str(tmp_path / "float"), *few]
    rows = json.loads(CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False).stdout)["rows"]
    assert [row["name"] for row in rows] == ["mobiquant, routed", "torch float32", "torch bfloat16"]
    assert all(row[key] > 0 for row in rows for key in ("prefill", "decode", "libs_mb"))
    assert rows[0]["bits_read"] == pytest.approx(2.5, abs=0.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bits", "9"], "9.0 bits cannot be read"),
        (["--peer", "gpt"], "peer 'gpt' is unknown"),
        (["--peer", "llama.cpp"], "give --reference"),
        (["--repetitions", "0"], "--repetitions 1 or more"),
        (["--threads", "0"], "0 threads cannot be measured"),
        (["--bits", "5", "--fixed"], "no prefix of the slices has 5 bits"),
    ],
)
def test_bench_refuses_what_it_cannot_measure(arguments, words):
    from typer.testing import CliRunner

    from mobiquant.cli import app

    with pytest.raises(mobiquant.InputError, match=words):
        CliRunner().invoke(app, ["bench", str(small.quantised()), *arguments], catch_exceptions=False)
