"""Calibration: thresholds that read what is asked for, routers that learn, both recipes, and refusal of bad models."""

import itertools
import json
from dataclasses import replace

import pytest
import tiny
import torch
from helpers import normal
from safetensors.torch import load_file, save_file

import mobiquant
from mobiquant import InputError, budget, clip, compensate, data, integration, router
from mobiquant import slices as s
from mobiquant.budget import checkpoint_of
from mobiquant.calibrate import fast, routers
from mobiquant.calibrate.streams import FLOAT, Stage, Streams, fixed
from mobiquant.config import SWEEPS, Calibration, Format

BUDGETS = (2.25, 3, 3.5, 5, 7)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama calibrated on 640 tokens, and those tokens."""
    folder = tmp_path_factory.mktemp("llama")
    made = tiny.quantize(folder, samples=20, sequence_length=32)
    text = (folder / "text.txt").read_text()
    return made, data.windows(text, tiny.tokenizer(), 32, "text")


def read_at(model, ids, bits):
    with mobiquant.precision(model, bits):
        mobiquant.bits_read(model, reset=True)
        tiny.logits(model, ids)
        return mobiquant.bits_read(model, reset=True)


def test_a_lower_threshold_never_reads_less_in_the_stored_table(llama):
    made, _ = llama
    table = checkpoint_of(made).thresholds
    assert [region["cap"] for region in table] == [3, 4, 5]
    for region in table:
        assert len(region["tau"]) >= 6
        assert region["tau"] == sorted(region["tau"], reverse=True)
        assert all(len(row) == region["cap"] for row in region["bits"])
        for column in zip(*region["bits"], strict=True):
            assert all(b >= a - 0.02 for a, b in itertools.pairwise(column))
        assert all(row == sorted(row) for row in region["bits"])


@pytest.mark.parametrize("bits", BUDGETS)
def test_calibration_text_reads_the_bits_that_are_asked_for(llama, bits):
    made, ids = llama
    assert read_at(made, ids, bits) == pytest.approx(bits, abs=0.1)


def test_larger_budgets_never_read_fewer_bits(llama):
    made, _ = llama
    ids = tiny.tokens(8, 32)
    asked = [2, 2.1, 2.3, 2.6, 2.9, 3.2, 3.5, 3.8, 3.99, 4, 4.2, 4.6, 5, 5.5, 6, 6.5, 7, 7.5, 7.9, 8]
    read = [read_at(made, ids, bits) for bits in asked]
    assert read == sorted(read)
    assert read[0] == 2 and read[-1] == 8


def reads_of(weight, form):
    scale, zero = clip.min_max(weight, form.slices, form.group_size)
    code = s.encode(weight, scale, zero, form.slices, form.group_size)
    return compensate.Grid(scale, zero, form.slices, form.group_size).read(code)


def inputs():
    """2000 tokens; few directions carry most energy, as in real activations."""
    return normal(2000, 4, seed=2) * torch.tensor([6.0, 3.0, 2.0, 1.0]) @ normal(4, 32, seed=3) + normal(2000, 32, seed=4) * 0.3


def test_regressed_routers_beat_a_constant_on_tokens_they_have_not_seen():
    form = Format(group_size=16, router_hidden=16)
    weight = normal(24, 32, seed=1)
    reads = reads_of(weight, form)
    x = inputs()
    target = routers.targets(x, weight, reads)
    fitted = routers.fit(x[:1500], target[:1500], x[:2], form)
    assert routers.explained(router.scores(x[1500:], fitted), target[1500:]) > 0.5
    constant = target[:1500].mean(0).expand(500, -1)
    assert routers.explained(constant, target[1500:]) < 0.05


def test_first_tokens_score_above_all_others_and_others_as_without_them():
    form = Format(group_size=16, router_hidden=16)
    weight = normal(24, 32, seed=1)
    reads = reads_of(weight, form)
    x = inputs()
    # as after a norm: one large feature, little else
    firsts = 0.1 * normal(32, 32, seed=5)
    firsts[:, 7] += 5
    target = routers.targets(x, weight, reads)
    fitted = routers.fit(x, target, firsts[:16], form)
    assert routers.explained(router.scores(x, fitted), target) > 0.5
    unseen = router.scores(firsts[16:], fitted)
    assert (unseen[:, 0].min() > router.scores(x, fitted)[:, 0]).float().mean() > 0.9


def test_an_offset_moves_the_scores_of_a_layer_and_never_reverses_its_slices():
    form = Format(group_size=16)
    weight = normal(8, 16, seed=1)
    reads = reads_of(weight, form)
    x = normal(64, 16, seed=2)
    plain = routers.targets(x, weight, reads)
    moved = routers.targets(x, weight, reads, torch.tensor([1.0, 0.5, 0.0, -1.0]))
    assert torch.allclose(moved - plain, torch.tensor([1.0, 0.5, 0.0, -1.0]).expand(64, 4), atol=1e-5)
    steep = routers.targets(x, weight, reads, torch.tensor([0.0, 9.0, 0.0, 0.0])).mean(0)
    assert (steep[1:] <= steep[:-1] + 0.05).all()


def test_a_sample_holds_all_first_tokens_and_no_other_twice():
    hidden = torch.arange(6 * 8.0)[:, None].expand(-1, 4).reshape(6, 8, 4).contiguous()
    streams = Streams(hidden, [FLOAT, fixed(1)], 4, torch.device("cpu"))

    class Same(Stage):
        def __init__(self):
            pass

        def inputs(self, reading, hidden, name):
            return hidden.flatten(0, 1)

    for sample in (streams.sample(Same(), "x"), streams.moments(Same(), "x")[2]):
        assert sorted(sample.firsts[:, 0].tolist()) == [8.0 * i for i in range(6)]
        others = sample.tokens[:, 0].tolist()
        assert sorted(others) == [float(i) for i in range(48) if i % 8]


def test_scores_of_slices_lie_apart_and_those_of_tokens_around_them():
    form = Format(group_size=16)
    weight = normal(8, 16, seed=1)
    reads = reads_of(weight, form)
    target = routers.targets(normal(64, 16, seed=2), weight, reads)
    assert (target[:, 1:] <= target[:, :-1]).all() and target.std(0).min() > 0.1
    # the same for every layer, however loud it is; tokens that gain nothing are raised, which moves the mean a little
    assert torch.allclose(target.mean(0), -routers.GAP * torch.arange(4), atol=0.3)
    assert torch.allclose(routers.targets(3 * normal(64, 16, seed=2), 5 * weight, 5 * reads), target, atol=1e-3)


def test_at_the_widths_of_the_format_nearly_every_token_reads_that_width(llama):
    made, ids = llama
    for bits in (3, 6):
        with mobiquant.precision(made, bits):
            budget.state(made).depth_shares(reset=True)
            tiny.logits(made, ids)
            assert budget.state(made).depth_shares(reset=True)[{3: 1, 6: 3}[bits]] > 0.99


def test_the_fast_recipe_logs_how_well_each_router_fits(tmp_path):
    made = tiny.quantize(tmp_path)
    made.save_pretrained(tmp_path / "made")
    log = json.loads((tmp_path / "made" / "training_log.json").read_text())
    assert [(entry["block"], entry["input"]) for entry in log[:4]] == [
        (0, "self_attn.q_proj"),
        (0, "self_attn.o_proj"),
        (0, "mlp.gate_proj"),
        (0, "mlp.down_proj"),
    ]
    assert len(log) == 8 and all(entry["router_explains"] > 0.5 for entry in log)


def moments(x, students):
    """Second moments of float inputs and of the inputs of students, as `Streams.moments` gives them."""
    own = {FLOAT: x.T @ x / len(x)} | {reading: y.T @ y / len(x) for reading, y in students.items()}
    return own, {reading: x.T @ y / len(x) for reading, y in students.items()}


def test_students_without_drift_are_solved_as_the_float_model_is():
    form = Format(group_size=16)
    settings = Calibration(sweeps=2).resolved(form.slices, on_cpu=True)
    weight, x = normal(12, 24, seed=1), normal(300, 24, seed=2)
    plain = fast.solve(weight, *moments(x, {}), form, settings)
    same = fast.solve(weight, *moments(x, {fixed(1): x.clone(), fixed(2): x.clone()}), form, settings)
    drifted = fast.solve(weight, *moments(x, {fixed(1): x + normal(300, 24, seed=3)}), form, settings)
    assert torch.equal(plain[1], same[1]) and torch.equal(plain[0].scale, same[0].scale)
    assert not torch.equal(plain[1], drifted[1])


def test_codes_that_are_trained_after_start_from_one_sweep():
    sweeps = {recipe: Calibration(recipe=recipe).resolved((2, 2), on_cpu=True).sweeps for recipe in ("fast", "paper", "full")}
    assert sweeps == {"fast": SWEEPS, "paper": 1, "full": 1} and SWEEPS > 1
    for recipe in ("fast", "full"):
        assert [Calibration(recipe=recipe, sweeps=n).resolved((2, 2), on_cpu=True).sweeps for n in (0, 5)] == [0, 5]


def test_coordinate_descent_lowers_the_output_error_of_every_small_depth():
    form = Format(group_size=16)
    weight = normal(12, 48, seed=1)
    x = normal(400, 6, seed=2) @ normal(6, 48, seed=3) + 0.2 * normal(400, 48, seed=4)
    settings = Calibration(sweeps=2).resolved(form.slices, on_cpu=True)
    before = fast.solve(weight, *moments(x, {}), form, replace(settings, sweeps=0))
    after = fast.solve(weight, *moments(x, {}), form, settings)
    for depth in (0, 1, 2):
        errors = [(x @ (grid.read(code)[depth] - weight).T).square().mean() for grid, code in (before, after)]
        assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    tiny.model().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        integration.load_float(tmp_path / "model")


def test_a_model_without_blocks_is_refused(tmp_path):
    model = tiny.model()
    model.model.layers = torch.nn.ModuleList()
    with pytest.raises(InputError, match="LlamaForCausalLM has no list of blocks"):
        tiny.quantize(tmp_path, model)


def test_calibration_text_shorter_than_a_window_is_refused(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text(tiny.text(10))
    with pytest.raises(InputError, match="has 10 tokens, fewer than one window of 16"):
        mobiquant.quantize(tiny.model(), tokenizer=tiny.tokenizer(), calibration=str(path), sequence_length=16)


def test_as_many_windows_as_asked_for_are_drawn_from_a_longer_text(tmp_path):
    path = tiny.text_file(tmp_path, 320)
    settings = {"tokenizer": tiny.tokenizer(), "calibration": path, "samples": 4, "sequence_length": 16}
    made = [mobiquant.quantize(tiny.model(), format=Format(group_size=32), seed=seed, **settings) for seed in (0, 1)]
    notes = [checkpoint_of(model).calibration for model in made]
    assert [note["tokens"] for note in notes] == [64, 64]
    assert notes[0]["tokens_crc32"] != notes[1]["tokens_crc32"]


def test_calibration_leaves_what_is_not_quantised_as_it_was(tmp_path):
    model = tiny.model(dtype=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "proj" not in name}
    made = tiny.quantize(tmp_path, model)
    after = dict(made.named_parameters())
    assert set(after) == set(before)
    assert all(torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items())


def test_a_quantised_or_damaged_model_in_memory_is_refused(llama, tmp_path):
    with pytest.raises(InputError, match="already quantised"):
        tiny.quantize(tmp_path, llama[0])
    broken = tiny.model()
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"model.layers.1.mlp.up_proj.weight.*NaN or Inf"):
        tiny.quantize(tmp_path, broken)


def test_windows_of_several_texts_are_drawn_alike(tmp_path):
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    texts[0].write_text("w1 " * 64)
    texts[1].write_text("w2 " * 32)
    settings = {"samples": 100, "sequence_length": 16, "device": "cpu", "format": Format(group_size=32)}
    made = mobiquant.quantize(tiny.model(), tokenizer=tiny.tokenizer(), calibration=[str(path) for path in texts], **settings)
    made_from = checkpoint_of(made).calibration
    assert made_from["tokens"] == 96 and made_from["text"] == "a.txt + b.txt"
    with pytest.raises(InputError, match=r"c\.txt"):
        mobiquant.quantize(tiny.model(), tokenizer=tiny.tokenizer(), calibration=[str(texts[0]), "c.txt"], **settings)


def test_progress_names_every_stage_from_its_start_to_its_end(tmp_path):
    seen = []
    tiny.quantize(tmp_path, progress=lambda stage, done, total, note="": seen.append((stage, done, total)))
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == [
        "loading model and text", "reading the model", "quantising blocks", "measuring thresholds"
    ]  # fmt: skip
    assert seen[:2] == [("loading model and text", 0, 1), ("loading model and text", 1, 1)]
    assert seen[-1] == ("measuring thresholds", 2, 2)
