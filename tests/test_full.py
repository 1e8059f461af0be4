"""The full recipe: latents that are what is stored, training that helps, and runs that go on where they were killed."""

import json
from dataclasses import replace

import pytest
import tiny
import torch
from helpers import normal
from typer.testing import CliRunner

import mobiquant
from mobiquant import InputError, blocks, data
from mobiquant import slices as s
from mobiquant.budget import checkpoint_of
from mobiquant.calibrate import distill, latent, nested, passes, sensitivity, work
from mobiquant.calibrate import full as running
from mobiquant.calibrate.streams import FLOAT, Streams, fixed
from mobiquant.cli import app
from mobiquant.config import Format, Training
from mobiquant.linear import MobiLinear

FORM = Format(group_size=32)
SHORT = Training(6, 2, distill_steps=8, distill_batch=2, position_rate=2e-2, scale_rate=2e-3, routing_steps=4)
LISTS = [(2, 1, 1, 2, 2), (2, 2, 2, 2), (4, 4), (7, 1)]


def mobilinear(slices=(2, 1, 1, 2, 2), rows=12, columns=40, group=16):
    form = Format(slices=slices, group_size=group)
    layer = MobiLinear(columns, rows, form)
    code = torch.randint(0, 2 ** sum(slices), (rows, columns), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    groups = s.groups(columns, group)
    zero = torch.randint(0, 256, (rows, groups), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    layer.set_weight(code, (normal(rows, groups).abs() + 0.01).half(), zero, None)
    return layer


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def full(folder, training=SHORT, **settings):
    return tiny.quantize(folder, format=FORM, recipe="full", training=training, **settings)


@pytest.mark.parametrize("slices", LISTS)
def test_a_latent_starts_as_the_layer_it_came_from_and_stores_as_it_reads(slices):
    layer, again = mobilinear(slices), mobilinear(slices)
    made = latent.LatentLinear(layer, latent.Depth(1))
    again.set_weight(torch.zeros(12, 40, dtype=torch.uint8), layer.scale, layer.zero, None)
    made.store(again)
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), again.buffers(), strict=True))
    # after a change too, what is read in training is what is stored
    with torch.no_grad():
        made.position += normal(12, 40, seed=3)
        made.log_scale += 0.013
        made.zero += 0.111
    made.store(again)
    for depth in range(1, len(slices) + 1):
        made.depth.value = depth
        assert torch.allclose(made(torch.eye(40)).T, again.packed().read(depth), atol=1e-6)


def test_gradients_pass_inside_the_range_and_stop_outside():
    layer = mobilinear()
    made = latent.LatentLinear(layer, latent.Depth(1))
    with torch.no_grad():
        made.position[0, 0] = 100.0
    made(torch.eye(40)).sum().backward()
    assert made.position.grad[0, 0] == 0
    steps = s.expand(layer.scale.float(), 16, 40)
    assert torch.allclose(made.position.grad.flatten()[1:], steps.flatten()[1:])
    assert made.log_scale.grad.abs().sum() > 0 and made.zero.grad[0, 0] != 0


def test_a_position_that_left_the_grid_is_put_back_and_learns_again():
    made = latent.LatentLinear(mobilinear(), latent.Depth(2))
    with torch.no_grad():
        made.position[0, 0], made.position[0, 1], made.zero[0, 0] = 100.0, -3.0, 77.0
    latent.project({"one": made})
    assert (made.position[0, 0], made.position[0, 1]) == (4 - 2**-7, 0) and made.zero.max() < 4
    for made.depth.value in range(1, 6):
        made.zero_grad()
        made(torch.eye(40)).sum().backward()
        assert made.position.grad[0, 0] > 0 and made.position.grad[0, 1] > 0


def test_draws_are_the_same_for_a_step_and_cover_all_depths():
    draws = nested.Draws.of(FORM.widths)
    picked = [draws.pick(nested.generator_for(0, "blocks", 3, step)) for step in range(300)]
    assert picked == [draws.pick(nested.generator_for(0, "blocks", 3, step)) for step in range(300)]
    counts = [picked.count([depth]) for depth in range(1, 6)]
    assert counts[0] == max(counts) and min(counts) > 0
    assert sorted(draws.pick(nested.generator_for(0, "distillation", 0), 5)) == [1, 2, 3, 4, 5]
    places = {nested.generator_for(seed, "blocks", place, step).initial_seed()
              for seed in (0, 1) for place in (0, 1) for step in (0, 1)}  # fmt: skip
    assert len(places) == 8


def test_a_mixture_has_two_neighbouring_depths_and_all_of_them_come_up():
    drawn = [distill.mixture(nested.generator_for(0, "distillation", 0, step), 40, 5) for step in range(60)]
    assert drawn[7] == distill.mixture(nested.generator_for(0, "distillation", 0, 7), 40, 5)
    assert all(len(one) == 40 and set(one) <= {min(one), min(one) + 1} and max(one) <= 5 for one in drawn)
    assert {min(one) for one in drawn} == {1, 2, 3, 4}
    shares = [sum(d > min(one) for d in one) / 40 for one in drawn if len(set(one)) == 2]
    assert min(shares) < 0.25 and max(shares) > 0.75


def test_layers_read_at_the_depth_of_their_place_and_those_of_one_input_share_it(tmp_path):
    made = torch.nn.Module.float(tiny.quantize(tmp_path, format=FORM))
    layers = {name: layer for name, layer in made.named_modules() if isinstance(layer, MobiLinear)}
    depth = latent.Depth(1)
    latents = latent.open_latents(made, depth)
    places = {name.rpartition(".")[2]: one.place for name, one in latents.items() if ".layers.1." in name}
    assert places["q_proj"] == places["k_proj"] == places["v_proj"] and places["gate_proj"] == places["up_proj"]
    assert len(set(places.values())) == 4 and depth.places == 8
    depth.value = tuple(1 + (place * 2) % 5 for place in range(8))
    for name, one in latents.items():
        wanted = layers[name].packed().read(depth.value[one.place])
        assert torch.allclose(one.weight(torch.float32), wanted, atol=1e-6)
    # what kernels read says the same
    depth.hold(latents.values(), torch.device("cpu"))
    depth.fill(FORM)
    assert depth.held.tolist() == [2.0 ** (FORM.widths[d - 1] - 2) for d in depth.value]
    for one in latents.values():
        assert one.cells.item() == 2.0 ** (FORM.widths[depth.value[one.place] - 1] - 2)


def test_codes_have_seen_mixed_depths_unless_told_otherwise(tmp_path):
    short = replace(SHORT, block_steps=0, routing_steps=0, distill_steps=4)
    logs = [full(tmp_path, replace(short, mixed=mixed))._mobiquant_log for mixed in (True, False)]
    seen = [set(next(entry["kl"] for entry in log if "kl" in entry and "step" in entry)) for log in logs]
    assert seen == [{"2", "3", "4", "6", "8", "mixed"}, {"2", "3", "4", "6", "8"}]


def test_routers_see_windows_that_codes_do_not(tmp_path, monkeypatch):
    windows = torch.arange(40)[:, None]
    kept = running.held_out(windows, 0.25)
    assert not kept.any() and not running.held_out(windows, 0.0).any()
    monkeypatch.setattr(running, "LEAST_HELD", 2)
    kept = running.held_out(windows, 0.25)
    assert kept.nonzero().flatten().tolist() == list(range(3, 40, 4))
    seen = {"codes": [], "routers": [], "gains": []}

    def watch(module, name, key, place):
        original = getattr(module, name)

        def watched(*args, **kwargs):
            seen[key].append(args[place])
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    watch(distill, "distill", "codes", 3)
    watch(running.routing, "train", "routers", 3)
    watch(sensitivity, "gains", "gains", 1)
    full(tmp_path, replace(SHORT, block_steps=0, held_out=0.25), samples=16)
    rows = {key: {tuple(row) for one in found for row in one.tolist()} for key, found in seen.items()}
    assert rows["routers"] == rows["gains"] and len(rows["routers"]) >= 2 and len(rows["codes"]) > len(rows["routers"])
    assert not rows["codes"] & rows["routers"]


def test_one_loud_token_does_not_own_the_block_loss():
    wanted = normal(1, 64, 16)
    made = wanted + 0.1 * normal(1, 64, 16, seed=1)
    quiet = nested.relative_error(made, wanted)
    wanted[0, 0] *= 1000
    loud = wanted.clone()
    loud[0, 1:] = made[0, 1:]
    loud[0, 0] *= 1.01
    assert nested.relative_error(loud, wanted) < quiet


def test_block_training_lowers_the_error_of_the_block(tmp_path):
    original = tiny.model()
    made = tiny.quantize(tmp_path, tiny.model(), format=FORM)
    root, originals = blocks.find_blocks(original)
    stack = made.get_submodule(root)
    hidden, calls = blocks.capture(original, tiny.tokens(8, 16), torch.device("cpu"), 4)
    streams = Streams(hidden, nested.readings(FORM), 4, torch.device("cpu"))
    stage = nested.NestedStage(originals[0], stack[0], 0, calls, torch.device("cpu"))

    def errors():
        wanted = streams.ahead(stage, FLOAT)
        return [float(nested.relative_error(stage.run(fixed(d), hidden), wanted)) for d in (1, 2, 3)]

    with torch.no_grad():
        before = errors()
        log = nested.train_block(stage, streams, FORM, replace(SHORT, block_steps=60), 0)
        after = errors()
    assert after[0] < 0.8 * before[0] and after[1] < before[1]
    assert [entry["bits"] for entry in log] == [2, 3, 4, 6, 8]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(folder of the checkpoint, folder of the work) of a short run."""
    home = tmp_path_factory.mktemp("undisturbed")
    made = full(home, work_dir=home / "work")
    made.save_pretrained(home / "out")
    return home / "out", home / "work"


def test_the_recipe_makes_an_ordinary_checkpoint(undisturbed):
    out, _ = undisturbed
    loaded = mobiquant.load(out, dtype=torch.float32)
    stored = checkpoint_of(loaded)
    assert stored.calibration["recipe"] == "full" and stored.calibration["training"]["distill_steps"] == 8
    log = json.loads((out / "training_log.json").read_text())
    assert [entry["step"] for entry in log if "step" in entry] == [8]
    assert sum("budget" in entry for entry in log) >= 4
    assert {entry["bits"] for entry in log if "bits" in entry} == {2, 3, 4, 6, 8}
    for bits in (2, 3.5, 8):
        mobiquant.set_precision(loaded, bits)
        assert tiny.logits(loaded).isfinite().all()


def test_end_to_end_training_comes_nearer_to_the_float_model(tmp_path):
    start = full(tmp_path, replace(SHORT, block_steps=0, distill_steps=0), samples=16)
    longer = replace(SHORT, block_steps=0, distill_steps=80, distill_batch=4, position_rate=2e-2, zero_rate=1e-2)
    trained = full(tmp_path, longer, samples=16)
    ids = data.windows((tmp_path / "text.txt").read_text(), tiny.tokenizer(), 16, "text")
    reference = tiny.logits(tiny.model(), ids).log_softmax(-1)

    def divergence(made, bits):
        with mobiquant.precision(made, bits, routed=False):
            return float((reference.exp() * (reference - tiny.logits(made, ids).log_softmax(-1))).sum(-1).mean())

    for bits, share in ((2, 0.7), (3, 0.9)):
        assert divergence(trained, bits) < share * divergence(start, bits)


def test_the_power_of_the_loss_weighs_depths_and_a_steady_model_is_the_same_model(tmp_path):
    made, original = torch.nn.Module.float(tiny.quantize(tmp_path, format=FORM)), tiny.model()
    pair, depth, tokens = passes.Pair.of(made, original), latent.Depth(1), tiny.tokens(3, 16)
    latents = latent.open_latents(made, depth)
    first = next(iter(latents.values())).position
    gradients, losses = {}, {}
    for power in (1.0, 0.5, 0.0):
        one = passes.Passes(pair, depth, power)
        with passes.steady(made, pair.stack, tokens[:1]):
            one.teach(tokens)
            losses[power] = one.learn(2)
        gradients[power], first.grad = first.grad.clone(), None
    assert all("forward" not in block.__dict__ for block in pair.stack)
    wanted = original(tokens).logits.log_softmax(-1)
    plain = (wanted.exp() * (wanted - made(tokens).logits.log_softmax(-1))).sum(-1).mean()
    assert losses[1.0].item() == pytest.approx(plain.item(), rel=1e-4)
    plain.backward()
    assert torch.allclose(gradients[1.0], first.grad, rtol=1e-3, atol=1e-7)
    assert torch.allclose(gradients[0.5], first.grad / plain.sqrt(), rtol=1e-3, atol=1e-7)
    assert torch.allclose(gradients[0.0], first.grad / plain, rtol=1e-3, atol=1e-7)


# in the first block, in the end-to-end stage, behind the training of routers
@pytest.mark.parametrize("saves", [2, 5, 7])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, undisturbed, monkeypatch, saves):
    class Killed(BaseException):
        pass

    def dying(self, *args, original=work.Work.save):
        original(self, *args)
        dying.left -= 1
        if not dying.left:
            raise Killed

    dying.left = saves
    monkeypatch.setattr(work.Work, "save", dying)
    monkeypatch.setattr(distill, "LOG_EVERY", 4)
    monkeypatch.setattr(work, "SPARE", 0)
    with pytest.raises(Killed):
        full(tmp_path, work_dir=tmp_path / "work")
    monkeypatch.undo()
    made = full(tmp_path, work_dir=tmp_path / "work", resume=True)
    made.save_pretrained(tmp_path / "out")
    ours, theirs = folder_bytes(tmp_path / "out"), folder_bytes(undisturbed[0])
    # the log has losses of every so many steps, of fewer in the killed run
    ours.pop("training_log.json"), theirs.pop("training_log.json")
    assert ours == theirs


def test_work_that_goes_on_is_not_kept_more_often_than_writing_it_is_worth(tmp_path, monkeypatch):
    clock, kept = [100.0], []

    def slow(self, name, values, note):
        clock[0] += 3.0
        kept.append(note)

    monkeypatch.setattr(work.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(work.Work, "save", slow)
    folder = work.Work(None, {}, False)
    for step in range(200):
        folder.keep("distillation", dict, step)
        clock[0] += 1.0
    # at once, then 60 seconds after the end of each
    assert kept == [0, 60, 120, 180]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"samples": 5}, "samples|text"),
        ({"training": replace(SHORT, distill_steps=9)}, "distill steps"),
        ({"format": Format(group_size=16)}, "group size"),
    ],
)
def test_a_run_is_resumed_only_with_what_it_was_started_with(tmp_path, undisturbed, change, named):
    before = folder_bytes(undisturbed[1] / "fast")
    settings = {"format": FORM, "training": SHORT, **change}
    with pytest.raises(InputError, match=f"holds a run with ({named}) .* give another --work-dir"):
        tiny.quantize(tmp_path, recipe="full", work_dir=undisturbed[1], resume=True, **settings)
    other = tiny.model()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(InputError, match="holds a run with model"):
        tiny.quantize(tmp_path, other, format=FORM, recipe="full", training=SHORT, work_dir=undisturbed[1], resume=True)
    assert folder_bytes(undisturbed[1] / "fast") == before


def test_a_work_folder_is_not_taken_by_mistake(tmp_path, undisturbed):
    with pytest.raises(InputError, match="holds a run already: go on with --resume"):
        full(tmp_path, work_dir=undisturbed[1])
    with pytest.raises(InputError, match="holds no run to resume"):
        full(tmp_path, work_dir=tmp_path / "new", resume=True)
    with pytest.raises(InputError, match="give --work-dir"):
        full(tmp_path, resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="not empty and holds no run"):
        full(tmp_path, work_dir=tmp_path / "mine")
    with pytest.raises(InputError, match="use recipe full"):
        tiny.quantize(tmp_path, work_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists() and len(list((tmp_path / "mine").iterdir())) == 1


def test_a_wrong_work_folder_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load_text", lambda *_: pytest.fail("text was read"))
    with pytest.raises(InputError, match="give --work-dir"):
        full(tmp_path, resume=True)
    with pytest.raises(InputError, match="holds no run to resume"):
        full(tmp_path, work_dir=tmp_path / "new", resume=True)


def test_scales_alone_are_trained_where_weights_do_not_fit(tmp_path, undisturbed, monkeypatch, capsys):
    monkeypatch.setattr(distill, "free_memory", lambda device: 1000)
    made = full(tmp_path, replace(SHORT, block_steps=0, scale_rate=1e-2))
    assert "scales and zero points alone are trained" in capsys.readouterr().err
    assert [entry["weights"] for entry in made._mobiquant_log if "weights" in entry] == [False]
    assert all("forward" not in block.__dict__ for block in made.model.layers)
    start = mobiquant.load(undisturbed[1] / "fast")
    ours, theirs = ([m.scale for m in model.modules() if isinstance(m, MobiLinear)] for model in (made, start))
    assert not any(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_training_can_be_kept_to_the_samples(tmp_path):
    codes, seen = [], []
    text = tiny.text_file(tmp_path, 8 * 16)
    for whole in (True, False):
        made = mobiquant.quantize(
            tiny.model(), tokenizer=tiny.tokenizer(), calibration=text, recipe="full", format=FORM, device="cpu",
            training=replace(SHORT, block_steps=0, routing_steps=0, whole_text=whole), samples=2, sequence_length=16,
        )  # fmt: skip
        seen.append((checkpoint_of(made).calibration["training_tokens"], checkpoint_of(made).calibration["tokens"]))
        codes.append(torch.cat([m.planes_0.flatten() for m in made.modules() if isinstance(m, MobiLinear)]))
    assert seen == [(128, 32), (32, 32)] and not torch.equal(*codes)


def test_a_budget_of_minutes_bounds_the_steps(tmp_path):
    training = replace(SHORT, distill_steps=10**7, block_steps=10**7, budget_minutes=0.03)
    made = full(tmp_path, training)
    steps = [entry["step"] for entry in made._mobiquant_log if "step" in entry]
    assert not steps or steps[-1] < 10**4


@pytest.mark.parametrize(
    "bad", [{"block_steps": -1}, {"distill_batch": 0}, {"budget_minutes": 0}, {"passes_per_step": 0}, {"held_out": 0.6}]
)
def test_bad_training_is_refused(bad):
    with pytest.raises(InputError, match=r"is not usable|leaves no time"):
        Training(**bad)


def test_the_command_knows_the_recipe(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    command = ["quantize", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--calibration", tiny.text_file(tmp_path, 128)]
    command += ["--samples", "4", "--sequence-length", "16", "--group-size", "32"]
    steps = ["--recipe", "full", "--block-steps", "1", "--distill-steps", "1", "--work-dir", str(tmp_path / "work")]
    planned = CliRunner().invoke(app, [*command, *steps, "--json", "--dry-run"], catch_exceptions=False)
    assert json.loads(planned.stdout)["memory_gb"] > 0 and not (tmp_path / "work").exists()
    done = CliRunner().invoke(app, [*command, *steps, "--json"], catch_exceptions=False)
    assert json.loads(done.stdout)["recipe"] == "full"
    with pytest.raises(InputError, match="need --recipe full"):
        CliRunner().invoke(app, [*command, "--overwrite", "--resume"], catch_exceptions=False)
