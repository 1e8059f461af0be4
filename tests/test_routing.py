"""Routers trained end to end: gates that are those of the layers, budgets that are kept, and order that is learnt."""

import weakref
from dataclasses import replace

import pytest
import tiny
import torch

import mobiquant
from mobiquant import budget, data, router
from mobiquant.calibrate import distill, gates, passes, routing
from mobiquant.calibrate.fast import Fitted
from mobiquant.calibrate.thresholds import Curve
from mobiquant.calibrate.work import Work
from mobiquant.config import Format, Training
from mobiquant.linear import mobilinears

FORM = Format(group_size=32)
HOST = torch.device("cpu")
ROUTERS = Training(0, distill_steps=0, routing_steps=0, distill_batch=4, router_rate=5e-2)
LIST = {"samples": 32, "sequence_length": 32, "format": FORM, "recipe": "full"}


def opened(made, original=None, device=HOST):
    """The context of a quantised model beside its float original."""
    return gates.opened(passes.Pair.of(made, original or tiny.model()), budget.checkpoint_of(made), device)


@pytest.mark.parametrize("routers", ["per-block", "per-input", "per-linear"])
@pytest.mark.parametrize(("tau", "cap"), [(float("-inf"), 1), (float("-inf"), 5), (-3.0, 3), (-7.0, 5), (1e9, 5)])
def test_gated_layers_read_what_quantised_ones_do(tmp_path, routers, tau, cap):
    form = replace(FORM, routers=routers)
    made, ids = tiny.quantize(tmp_path, format=form), tiny.tokens(2, 16)
    dtype = next(made.parameters()).dtype
    layers = mobilinears(made)
    precision = next(iter(layers.values())).precision
    precision.set([tau], [cap])
    wanted = tiny.logits(made, ids)
    mobiquant.bits_read(made, reset=True)
    tiny.logits(made, ids)
    bits = mobiquant.bits_read(made)
    with opened(made) as routed:
        step = gates.Step(torch.full((2,), tau), torch.full((2,), cap), 1.0)
        _, read, _ = routed.losses(ids, step)
        assert torch.allclose(routed.pair.student(ids).logits, wanted, atol=1e-4)
    assert read.mean().item() == pytest.approx(bits, abs=1e-4)
    assert list(mobilinears(made)) == list(layers) and dtype == next(made.parameters()).dtype


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_layers_of_every_family_can_be_gated(tmp_path, family):
    made, ids = tiny.quantize(tmp_path, tiny.model(family), format=FORM), tiny.tokens(2, 16)
    with mobiquant.precision(made, [2.5, 5.0]):
        wanted = tiny.logits(made, ids)
        tau, cap = next(iter(mobilinears(made).values())).precision.get()
    with opened(made, original=tiny.model(family)) as routed:
        for gate in routed.gates.values():
            gate.begin(gates.Step(torch.tensor(tau), torch.tensor(cap), 1.0))
        assert torch.allclose(routed.pair.student(ids).logits, wanted, atol=1e-4)


def test_each_sequence_of_a_batch_has_its_own_budget(tmp_path):
    made, ids = tiny.quantize(tmp_path, format=FORM), tiny.tokens(3, 16)
    tau, cap = torch.tensor([-1.0, -5.0, float("-inf")]), torch.tensor([3, 5, 2])
    with opened(made) as routed:
        together, read, slope = routed.losses(ids, gates.Step(tau, cap, 0.5))
        for i in range(3):
            alone = routed.losses(ids[i : i + 1], gates.Step(tau[i : i + 1], cap[i : i + 1], 0.5))
            for one, all_of in zip(alone, (together, read, slope), strict=True):
                assert one.item() == pytest.approx(all_of[i].item(), rel=1e-3, abs=1e-5)
    assert read[2] == 3 and slope[2] == 0 and (slope[:2] < 0).all()


def test_the_slope_of_the_bits_is_their_gradient_by_the_threshold(tmp_path):
    made = tiny.quantize(tmp_path, format=FORM)
    with opened(made) as routed:
        tau = torch.tensor([-1.0, -5.0], requires_grad=True)
        _, read, slope = routed.losses(tiny.tokens(2, 16), gates.Step(tau, torch.tensor([3, 5]), 0.7))
        (gradient,) = torch.autograd.grad(read.sum(), tau)
    # the gradient also knows that earlier gates change the inputs of later ones
    assert torch.allclose(gradient, slope, rtol=0.05)


def test_a_share_of_the_gradient_is_that_of_the_text(tmp_path):
    made, ids = tiny.quantize(tmp_path, format=FORM), tiny.tokens(2, 16)

    def gradient(share):
        with opened(made) as routed:
            each, _, _ = routed.losses(ids, gates.Step(torch.tensor([-1.0, -5.0]), torch.tensor([3, 5]), 1.0), share)
            parameters = [gate.out_bias for gate in routed.gates.values()]
            own = torch.cat(torch.autograd.grad(each[1], parameters, retain_graph=True))
            logits = routed.pair.student(ids).logits[1]
            text = -logits[:-1].log_softmax(-1).gather(1, ids[1, 1:, None]).mean()
            return each.detach(), own, torch.cat(torch.autograd.grad(text, parameters))

    (value, none, text), (same, half, _), (_, whole, _) = (gradient(share) for share in (0.0, 0.5, 1.0))
    assert torch.equal(value, same)
    assert torch.allclose(half, (none + whole) / 2, atol=1e-7) and torch.allclose(whole, text, atol=1e-6)
    assert (none - whole).norm() > 0.1 * whole.norm()


def test_all_budgets_take_turns():
    fitted = [Fitted((), 10, torch.randn(50, 4, generator=torch.Generator().manual_seed(seed))) for seed in range(2)]
    budgets = routing.Budgets.of(FORM, fitted, HOST)
    for count in (4, 30):
        turn = budgets.turn(count)
        assert set(torch.cat(turn).tolist()) == set(range(budgets.bits.numel())) and all(len(part) == count for part in turn)
    assert len(budgets.turn(4)) == -(-budgets.bits.numel() // 4)


@pytest.mark.parametrize("cap", [1, 2, 4, 5])
def test_the_curve_counts_the_tokens_above_a_threshold(cap):
    draw = torch.Generator().manual_seed(0)
    # coarse scores: many are equal to each other and to thresholds
    fitted = [Fitted((), size, (torch.randn(50, 4, generator=draw) * 4).round() / 4) for size in (10, 30, 7)]
    curve = Curve.of(FORM, fitted)
    for tau in (-9.0, -0.5, 0.0, 0.1, 0.25, 9.0):
        open_gates = sum(one.size * (one.scores > tau).double().mean(0) for one in fitted) / 47
        wanted = [FORM.widths[0] + float((open_gates * torch.tensor(FORM.slices[1:]))[:c].sum()) for c in range(cap)]
        assert curve.bits(tau, cap) == pytest.approx(wanted, abs=1e-12)
    for bits in (2.3, 2.5, 2.9):
        tau = curve.tau_for(bits, 5)
        # scores are a quarter apart: next to the threshold the budget is passed
        assert curve.bits(tau + 1e-3, 5)[-1] <= bits + 1e-9 <= curve.bits(tau - 0.25, 5)[-1] + 1e-9


@pytest.mark.gpu
def test_captured_steps_learn_what_plain_ones_do(tmp_path):
    device = torch.device("cuda")
    made, ids = tiny.quantize(tmp_path, format=FORM), tiny.tokens(4, 16).to(device)
    found = {}
    for captured in (False, True):
        with opened(made, device=device) as routed, routing._learner(routed, ids, 2, 0.5) as learner:
            assert isinstance(learner, routing.CapturedLearner)
            learn = learner.learn if captured else super(routing.CapturedLearner, learner).learn
            step = gates.Step(*(torch.tensor(v, device=device) for v in ([-1.0, -5.0], [3, 5])), 0.7)
            other = replace(step, tau=step.tau + 0.5, temperature=0.4)
            price = torch.tensor([0.01, 0.02], device=device)
            made_of = [learn(*one) for one in ((ids[:2], step, price), (ids[2:], other, 2 * price), (ids[:2], step, price))]
            found[captured] = made_of, [p.grad.clone() for p in learner.parameters]
    for one, same in zip(*(found[captured][0] for captured in (False, True)), strict=True):
        for a, b in zip(one, same, strict=True):
            assert torch.allclose(a, b, rtol=2e-2, atol=1e-4)
    for a, b in zip(*(found[captured][1] for captured in (False, True)), strict=True):
        assert torch.allclose(a, b, rtol=2e-2, atol=1e-2 * float(a.abs().max()) + 1e-7)


def test_a_stored_router_scores_as_the_trained_one(tmp_path):
    made = tiny.quantize(tmp_path, format=FORM)
    layer = next(iter(mobilinears(made).values()))
    trained = gates.GateRouter(layer.get_router(), FORM)
    with torch.no_grad():
        trained.out_bias += 0.3
        trained.weight *= 1.1
    x = torch.randn(1, 50, layer.in_features, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(router.scores(x[0], trained.stored()), trained.scores(x), atol=0.05)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(model with fitted routers, the same with trained ones, windows of their text, log of the latter)."""
    home = tmp_path_factory.mktemp("routing")
    # random models cannot predict a text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "TEXT", 0.0)
        trainings = (replace(ROUTERS, routing_steps=steps) for steps in (0, 150))
        fitted, trained = (tiny.quantize(home, training=training, **LIST) for training in trainings)
    ids = data.windows((home / "text.txt").read_text(), tiny.tokenizer(), 32, "text")
    return fitted, trained, ids, trained._mobiquant_log


def test_training_routers_comes_nearer_to_the_float_model_at_the_same_bits(both):
    fitted, trained, ids, _ = both
    wanted = tiny.logits(tiny.model(), ids).log_softmax(-1)

    def divergence(made, bits):
        with mobiquant.precision(made, bits):
            mobiquant.bits_read(made, reset=True)
            made_log = tiny.logits(made, ids).log_softmax(-1)
        return float((wanted.exp() * (wanted - made_log)).sum(-1).mean()), mobiquant.bits_read(made)

    ratios = []
    for bits in (2.25, 2.5, 2.75, 3, 3.25, 3.5):
        (before, _), (after, read) = divergence(fitted, bits), divergence(trained, bits)
        assert read == pytest.approx(bits, abs=0.02)
        ratios.append(after / before)
    # seen: 0.80 to 0.96
    assert max(ratios) < 1 and sum(ratios) / len(ratios) < 0.95


def test_codes_and_fixed_depths_stay_as_they_were(both):
    fitted, trained, ids, _ = both
    for name, layer in mobilinears(trained).items():
        other = fitted.get_submodule(name)
        assert all(torch.equal(a, b) for a, b in zip(layer.packed().planes, other.packed().planes, strict=True))
    with mobiquant.precision(fitted, 3, routed=False), mobiquant.precision(trained, 3, routed=False):
        assert torch.equal(tiny.logits(fitted, ids), tiny.logits(trained, ids))


def test_the_log_tells_what_each_budget_read(both):
    entries = [entry for entry in both[3] if "budget" in entry]
    assert len(entries) == 21
    # thresholds follow scores that move, which a text that a random model cannot predict moves on and on
    assert all(abs(entry["read"] - entry["budget"]) < (0.3 if entry["budget"] < 4 else 0.8) for entry in entries)


def test_routers_stay_as_fitted_where_memory_is_short(tmp_path, both, monkeypatch, capsys):
    monkeypatch.setattr(routing, "free_memory", lambda device: 1000)
    made = tiny.quantize(tmp_path, training=replace(ROUTERS, routing_steps=5), **LIST)
    assert "routers stay as fitted by regression" in capsys.readouterr().err
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), both[0].state_dict().values(), strict=True))


def test_a_batch_in_parts_learns_what_it_does_at_once(tmp_path):
    made, ids, picked = tiny.quantize(tmp_path, format=FORM), tiny.tokens(4, 16), torch.tensor([0, 7, 12, 20])
    whole, found = [], []
    for together in (4, 2, 1):
        scores = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
        budgets = routing.Budgets.of(FORM, [Fitted((), 10, scores)], HOST)
        budgets.tau.copy_(torch.linspace(-4, 2, budgets.tau.numel()))
        budgets.price.copy_(torch.linspace(0, 1, budgets.tau.numel()))
        with opened(made) as routed, routing._learner(routed, ids, together, 0.5) as learner:
            step = gates.Step(budgets.tau[picked], budgets.cap[picked], 0.7)
            each, read, _, _ = learner.learn(ids, step, budgets.price[picked])
            whole.append([each, read, *(p.grad.clone() for p in learner.parameters)])
            for parameter in learner.parameters:
                parameter.grad.zero_()
            each, read = routing._step(learner, budgets, picked, ids, 0.7, 1.0)
            scores = routing.sample_scores(routed, budgets, ids, together)
            found.append([each, read, *(p.grad for p in learner.parameters), budgets.tau, budgets.price, *scores.values()])
    for wanted, one in [(found[0], found[1]), (found[0], found[2]), *((whole[0], one[: len(whole[0])]) for one in found)]:
        for a, b in zip(wanted, one, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))


@pytest.mark.parametrize("room, size", [(4.5, 4), (4.4, 2), (3.4, 2), (2.2, 1), (1.2, 1), (1.1, 0)])
def test_as_many_sequences_go_through_at_once_as_memory_allows(room, size, monkeypatch, capsys):
    monkeypatch.setattr(routing, "free_memory", lambda device: room)
    assert routing.sequences_at_once(lambda few: few, 4, HOST) == size
    said = capsys.readouterr().err
    assert (f"{size} of 4 sequences" in said) == (0 < size < 4) and ("stay as fitted" in said) == (size == 0)


def test_what_earlier_stages_left_behind_counts_as_free_memory(monkeypatch):
    class Captured:
        """Refers to itself, as a captured pass does."""

        def __init__(self):
            self.itself = self

    held = {"free": 5, "cached": 0}
    left = weakref.ref(one := Captured(), lambda _: held.update(cached=20))
    del one
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.update(free=held["free"] + held["cached"], cached=0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (held["free"], 100))
    assert distill.free_memory(torch.device("cuda")) == 25 and left() is None


def test_finished_routers_are_taken_from_the_work_folder(tmp_path, both, monkeypatch):
    settings = {**LIST, "samples": 4, "training": replace(ROUTERS, routing_steps=3), "work_dir": tmp_path / "work"}
    first = tiny.quantize(tmp_path, **settings)
    monkeypatch.setattr(routing, "optimise", None)
    again = tiny.quantize(tmp_path, resume=True, **settings)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    assert Work(None, {}, False).load(routing.NAME) is None
