"""Evaluation against plain computations: perplexity, divergence, bits read, the round-to-nearest baseline, the plot."""

import copy
import functools
import math
import struct

import pytest
import small
import torch

import mobiquant
from mobiquant import blocks, budget, data, report
from mobiquant import evaluate as e
from mobiquant.config import InputError


@functools.cache
def windows():
    return data.windows(small.TEXT, small.tokenizer(), 40, "text")[:5]


@functools.cache
def floating():
    """The float model; not to be changed."""
    return small.model()


@pytest.fixture
def model():
    return mobiquant.load(small.quantised(), dtype=torch.float32)


def log_probabilities(model, window):
    """Of every next token, token by token in double precision."""
    with torch.no_grad():
        return model(window[None]).logits[0, :-1].double().log_softmax(-1)


def plain_perplexity(model):
    losses = [-log_probabilities(model, w)[i, w[i + 1]].item() for w in windows() for i in range(len(w) - 1)]
    assert len(losses) == 5 * 39
    return math.exp(sum(losses) / len(losses))


def test_perplexity_of_a_float_model_is_the_plain_one():
    (row,) = e.evaluate(floating(), windows())
    assert (row.name, row.bits, row.bits_read, row.kl) == ("float", None, None, None)
    assert row.perplexity == pytest.approx(plain_perplexity(floating()), rel=1e-5)


def test_perplexity_and_divergence_of_each_budget_are_the_plain_ones(model):
    rows = e.evaluate(model, windows(), [2, 3.3, 8], reference=floating())
    assert [row.bits for row in rows] == [2, 3.3, 8]
    for row in rows:
        with mobiquant.precision(model, row.bits):
            assert row.perplexity == pytest.approx(plain_perplexity(model), rel=1e-5)
            pairs = [(log_probabilities(floating(), w), log_probabilities(model, w)) for w in windows()]
        kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs]).mean().item()
        assert row.kl == pytest.approx(kl, rel=1e-3)
    assert rows[0].kl > rows[1].kl > rows[2].kl > 0


def test_divergence_from_itself_is_nothing():
    (row,) = e.evaluate(floating(), windows(), reference=floating())
    assert row.kl == pytest.approx(0, abs=1e-7)


def test_divergence_from_another_model_is_positive():
    (row,) = e.evaluate(floating(), windows(), reference=small.model(seed=1))
    assert row.kl > 0.1


@pytest.mark.parametrize("count", [2, 4, 5])
def test_windows_in_one_pass_give_what_they_give_alone(monkeypatch, model, count):
    budgets = [2, 3.3, 8]
    alone = e.evaluate(model, windows(), budgets, reference=floating())
    monkeypatch.setattr(e, "windows_per_pass", lambda *_: count)
    done = []
    together = e.evaluate(model, windows(), budgets, reference=floating(), progress=lambda *a: done.append(a[1:]))
    for one, other in zip(alone, together, strict=True):
        assert other.perplexity == pytest.approx(one.perplexity, rel=1e-5)
        assert (other.kl, other.bits_read) == (pytest.approx(one.kl, rel=1e-4), pytest.approx(one.bits_read, rel=1e-6))
    assert done[-1] == (5, 5)


@pytest.mark.parametrize("rows", [1, 7, 39, 1000])
def test_the_size_of_parts_does_not_matter(monkeypatch, rows):
    other = small.model(seed=1)
    (expected,) = e.evaluate(floating(), windows(), reference=other)
    monkeypatch.setattr(e, "ROWS", rows)
    (row,) = e.evaluate(floating(), windows(), reference=other)
    assert row.perplexity == pytest.approx(expected.perplexity, rel=1e-5)
    assert row.kl == pytest.approx(expected.kl, rel=1e-4)


def test_fixed_widths_read_exactly_what_was_asked_for(model):
    rows = e.evaluate(model, windows(), [2, 3, 4, 6, 8], fixed=True)
    assert [row.bits_read for row in rows] == [2, 3, 4, 6, 8]
    assert {row.name for row in rows} == {"fixed"}


def test_bits_read_of_a_routed_budget_are_those_of_its_own_forward_passes(model):
    first, row = e.evaluate(model, windows(), [8, 2.6])
    assert (first.bits_read, row.name) == (8, "routed")
    with mobiquant.precision(model, 2.6), torch.no_grad():
        mobiquant.bits_read(model, reset=True) if sum(budget.state(model).depth_shares()) else None
        for window in windows():
            model(window[None])
        read = mobiquant.bits_read(model)
    assert row.bits_read == pytest.approx(read, abs=1e-6)
    assert 2 < read < 4


def test_the_precision_is_as_before_afterwards(model):
    mobiquant.set_precision(model, 3.5)
    before = budget.state(model).get()
    e.evaluate(model, windows()[:1], [2, 8])
    assert budget.state(model).get() == before


@pytest.mark.parametrize(("bits", "fixed"), [([2, 9], False), ([4, 1.5], False), ([4, 2.5], True), ([math.nan], False)])
def test_a_budget_that_cannot_be_read_is_refused_before_any_work(model, bits, fixed):
    model.forward = None
    with pytest.raises(InputError):
        e.evaluate(model, windows(), bits, fixed=fixed)


def test_windows_of_one_token_are_refused():
    with pytest.raises(InputError, match="leave nothing to predict"):
        e.evaluate(floating(), windows()[:, :1])


def test_progress_counts_windows():
    seen = []
    e.evaluate(floating(), windows(), progress=lambda stage, done, total: seen.append((done, total)))
    assert seen == [(i, 5) for i in range(1, 6)]


def rounded(bits, group):
    made = copy.deepcopy(floating())
    e.round_to_nearest(made, bits, group)
    return made


def plain_rounding(weight, bits, group):
    """Asymmetric min-max rounding, a group at a time; a scale has 16 bits, as everywhere here."""
    out = torch.empty_like(weight)
    for n in range(weight.shape[0]):
        for k in range(0, weight.shape[1], group):
            part = weight[n, k : k + group]
            low, high = min(part.min().item(), 0.0), max(part.max().item(), 0.0)
            scale = torch.tensor((high - low) / (2**bits - 1)).half().float()
            zero = torch.clamp(torch.round(torch.tensor(-low) / scale), 0, 2**bits - 1)
            code = torch.clamp(torch.round(part / scale) + zero, 0, 2**bits - 1)
            out[n, k : k + group] = scale * (code - zero)
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [16, 24])
def test_round_to_nearest_is_plain_min_max_rounding(bits, group):
    before, after = floating().state_dict(), rounded(bits, group).state_dict()
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.allclose(after[name], plain_rounding(before[name], bits, group), atol=1e-6)


def test_round_to_nearest_touches_the_linear_layers_of_the_blocks_only():
    before, made = floating().state_dict(), rounded(3, 16)
    _, stack = blocks.find_blocks(made)
    inside = {f"model.layers.{name}.weight" for name in blocks.linears(stack)}
    assert len(inside) == 14
    assert {name for name, tensor in made.state_dict().items() if not torch.equal(tensor, before[name])} == inside


def test_round_to_nearest_loses_next_to_nothing_at_8_bits_and_more_at_2_than_at_4():
    loss = {bits: e.evaluate(rounded(bits, 16), windows(), reference=floating())[0].kl for bits in (2, 4, 8)}
    assert loss[8] < 1e-3 < loss[4] < loss[2]


def test_the_plot_is_a_picture_of_sensible_size(tmp_path):
    rows = [{"name": "float", "bits_read": None, "perplexity": 10.0}]
    rows += [{"name": "mobiquant", "bits_read": b, "perplexity": 10 + 20 / b**2} for b in (4.0, 2.0, 8.0)]
    rows += [{"name": "round to nearest", "bits_read": b, "perplexity": 10 + 4e4 / b**8} for b in (2.0, 8.0)]
    report.plot(rows, tmp_path / "a.png", "a title")
    content = (tmp_path / "a.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1050, 675)
    report.plot(rows[:1], tmp_path / "less.png", "a title")
    assert len(content) > (tmp_path / "less.png").stat().st_size > 3000
