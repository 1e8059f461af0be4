"""The `paper` recipe: clips and routers trained block by block, the budget met, the same losses however a step is made."""

import json

import pytest
import tiny
import torch

import mobiquant
from mobiquant import InputError
from mobiquant.calibrate import paper
from mobiquant.config import Format, default_routers


def read_at(model, ids, bits):
    with mobiquant.precision(model, bits):
        mobiquant.bits_read(model, reset=True)
        tiny.logits(model, ids)
        return mobiquant.bits_read(model, reset=True)


@pytest.mark.parametrize(
    "form",
    [Format(group_size=32, routers="per-input"), Format(group_size=32, routers="per-linear", slices=(2, 2, 2, 2))],
    ids=["shared routers", "setting of the paper"],
)
def test_the_paper_recipe_trains_clips_and_meets_its_budget(tmp_path, form):
    made = tiny.quantize(tmp_path, recipe="paper", format=form, epochs=14, learning_rate=1e-2, batch=1, target_bits=3.5)
    made.save_pretrained(tmp_path / "made")
    log = json.loads((tmp_path / "made" / "training_log.json").read_text())
    assert len(log) == 2 * 2 * 14
    for block in (0, 1):
        first = [entry for entry in log if entry["block"] == block and entry["stage"] == 1]
        second = [entry for entry in log if entry["block"] == block and entry["stage"] == 2]
        assert [entry["epoch"] for entry in first] == list(range(14))
        # clips cannot repair the drift that reaches the second block of a random model
        assert first[-1]["loss"] < (0.95 if block == 0 else 1.1) * first[0]["loss"]
        assert second[0]["target_bits"] == 8 and second[-1]["target_bits"] == 3.5
        # 56 steps are few: gates that nothing drives to the target stay above 5 bits
        assert max(entry["avg_bits"] for entry in second) > 5
        assert second[-1]["avg_bits"] == pytest.approx(3.5, abs=1)
    loaded = mobiquant.load(tmp_path / "made")
    assert torch.equal(tiny.logits(loaded), tiny.logits(made))
    assert read_at(loaded, tiny.tokens(4, 16), 3.5) == pytest.approx(3.5, abs=0.6)


def test_the_paper_recipe_has_no_routers_ahead(tmp_path):
    with pytest.raises(InputError, match="routers block by block: give it routers per-input or per-linear"):
        tiny.quantize(tmp_path, recipe="paper", format=Format(group_size=32))
    assert default_routers("paper") == "per-input" and default_routers("full") == Format().routers == "per-block"


def trained(folder, **settings):
    """The log of a tiny model trained on three sequences, in batches of two and of one."""
    settings = {"samples": 3, "batch": 2, "epochs": 3, "learning_rate": 1e-2, **settings}
    made = tiny.quantize(folder, recipe="paper", format=Format(group_size=32, routers="per-input"), **settings)
    made.save_pretrained(folder / "made")
    return json.loads((folder / "made" / "training_log.json").read_text())


def test_losses_of_the_log_are_means_over_batches_and_steps_lower_them(tmp_path, monkeypatch):
    steps = []
    learn = paper.Lesson.learn

    def watched(lesson, hidden, goal):
        before = lesson.sums.clone()
        learn(lesson, hidden, goal)
        steps.append((len(hidden), *(lesson.sums - before).tolist(), float(lesson.target)))

    monkeypatch.setattr(paper.Lesson, "learn", watched)
    log = trained(tmp_path)
    assert [count for count, *_ in steps] == [2, 1] * 3 * 2 * 2
    for entry, (first, second) in zip(log, zip(steps[::2], steps[1::2], strict=True), strict=True):
        assert entry["loss"] == pytest.approx((first[1] + second[1]) / 2)
        if entry["stage"] == 2:
            assert entry["avg_bits"] == pytest.approx((first[2] + second[2]) / 2)
            assert entry["target_bits"] == first[3] == second[3]
    # the target of the second stage falls from all bits to the goal in the first half
    assert [entry["target_bits"] for entry in log[3:6]] == [8, 3, 3]


@pytest.mark.gpu
def test_passes_replayed_on_a_gpu_teach_what_plain_ones_do(tmp_path, monkeypatch):
    (tmp_path / "replayed").mkdir()
    (tmp_path / "plain").mkdir()
    replayed = trained(tmp_path / "replayed", samples=5, device="cuda")
    monkeypatch.setattr(paper.Lesson, "step", plain_step)
    plain = trained(tmp_path / "plain", samples=5, device="cuda")
    for ours, theirs in zip(replayed, plain, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
        assert ours.get("avg_bits") == pytest.approx(theirs.get("avg_bits"), rel=0.02)


def plain_step(lesson, hidden, goal):
    """A step of `Lesson` without a graph."""
    lesson.learn(hidden, goal)
    lesson.optimizer.step()
    lesson.optimizer.zero_grad(set_to_none=False)
