"""Folders on disk: saved twice the same, loaded in part, refused when damaged, written whole or not at all."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from helpers import snr_db
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

import mobiquant
from mobiquant import InputError, checkpoint
from mobiquant.budget import checkpoint_of
from mobiquant.linear import MobiLinear

ROOT = Path(__file__).resolve().parent.parent
SMALL_BUDGETS = (2, 2.3, 3, 3.4, 3.9, 4)
NAME = "model.layers.0.self_attn.k_proj"
WEIGHTS = "model.safetensors"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def buffer_bytes(model):
    layers = [m for m in model.modules() if isinstance(m, MobiLinear)]
    return sum(b.numel() * b.element_size() for layer in layers for b in layer.buffers())


def at(model, bits, ids=None, routed=True):
    with mobiquant.precision(model, bits, routed=routed):
        return tiny.logits(model, ids)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of a tiny Llama, not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    tiny.quantize(folder).save_pretrained(folder / "made")
    return folder / "made"


@pytest.fixture
def copy(saved, tmp_path):
    """The same checkpoint, to be damaged."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for name, data in contents(saved).items():
        (folder / name).write_bytes(data)
    return folder


def test_saving_what_was_loaded_gives_the_same_bytes(saved, tmp_path):
    mobiquant.load(saved).save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved)


def test_one_seed_gives_the_same_bytes(saved, tmp_path):
    tiny.quantize(tmp_path).save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved)


@pytest.mark.parametrize("tied", (True, False))
def test_embeddings_stay_tied_or_untied(tmp_path, tied):
    made = tiny.quantize(tmp_path, tiny.model(tie_word_embeddings=tied))
    made.save_pretrained(tmp_path / "made")
    loaded = mobiquant.load(tmp_path / "made")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in load_file(tmp_path / "made" / WEIGHTS)) == (not tied)
    assert torch.equal(tiny.logits(loaded), tiny.logits(made))


def test_shards_give_the_same_model(saved, tmp_path):
    loaded = mobiquant.load(saved)
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert torch.equal(tiny.logits(mobiquant.load(tmp_path / "shards")), tiny.logits(loaded))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
def test_models_keep_their_dtype(tmp_path, dtype):
    made = tiny.quantize(tmp_path, tiny.model("qwen2", dtype=dtype))
    made.save_pretrained(tmp_path / "made")
    loaded = mobiquant.load(tmp_path / "made")
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert loaded.get_submodule(NAME).bias.dtype == made.get_submodule(NAME).bias.dtype == dtype
    assert load_file(tmp_path / "made" / WEIGHTS)[NAME + ".bias"].dtype == dtype
    assert tiny.logits(loaded).dtype == dtype
    assert torch.equal(tiny.logits(loaded), tiny.logits(made))
    other = mobiquant.load(tmp_path / "made", dtype=torch.float32)
    assert other.get_submodule(NAME).scale.dtype == torch.float16
    assert snr_db(tiny.logits(other), tiny.logits(loaded)) > 25


def test_a_load_of_four_bits_gives_what_the_full_load_gives(saved):
    full, small = mobiquant.load(saved), mobiquant.load(saved, max_bits=4)
    for bits in SMALL_BUDGETS:
        assert torch.equal(at(small, bits), at(full, bits))
    for bits in (2, 3, 4):
        assert torch.equal(at(small, bits, routed=False), at(full, bits, routed=False))
    assert torch.equal(tiny.logits(small), at(full, 4, routed=False))
    assert buffer_bytes(small) < 0.7 * buffer_bytes(full)


@pytest.mark.parametrize("bits", (4.1, 6, 8, 1.9))
def test_a_load_of_four_bits_refuses_other_budgets(saved, bits):
    with pytest.raises(InputError, match="from 2 to 4 bits"):
        mobiquant.set_precision(mobiquant.load(saved, max_bits=4), bits)


def test_a_load_of_four_bits_is_saved_as_a_checkpoint_of_four_bits(saved, tmp_path):
    small = mobiquant.load(saved, max_bits=4)
    small.save_pretrained(tmp_path / "small")
    again = mobiquant.load(tmp_path / "small")
    assert checkpoint_of(again).format.widths == (2, 3, 4)
    for bits in SMALL_BUDGETS:
        assert torch.equal(at(again, bits), at(small, bits))
    assert not [name for name in load_file(tmp_path / "small" / WEIGHTS) if name.endswith(("planes_3", "planes_4"))]


def test_transformers_loads_the_folder_once_both_are_imported_in_either_order(saved):
    code = f"""
import {{}}, {{}}, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(saved)!r})
print(float(model(torch.arange(5, 17)[None]).logits.double().sum()))
"""
    orders = [("mobiquant", "transformers"), ("transformers", "mobiquant")]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": {"PYTHONPATH": str(ROOT / "src")}}
    running = [subprocess.Popen([sys.executable, "-c", code.format(*order)], **settings) for order in orders]
    expected = float(tiny.logits(mobiquant.load(saved), torch.arange(5, 17)[None]).double().sum())
    for process in running:
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert float(out) == pytest.approx(expected, rel=1e-4)


def test_pipelines_and_chat_templates_work(saved):
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer.chat_template == tiny.TEMPLATE
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False) == "<user> w1 "
    run = pipeline("text-generation", model=mobiquant.load(saved), tokenizer=tokenizer)
    (out,) = run("w1 w2 ", max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out["generated_text"].startswith("w1 w2 ")
    assert len(tokenizer(out["generated_text"]).input_ids) == 5


@pytest.mark.parametrize("family", ("qwen2", "gpt2"))
def test_a_dequantised_model_is_what_was_read_at_eight_bits(tmp_path, family):
    made = tiny.quantize(tmp_path, tiny.model(family))
    before, count = tiny.logits(made), len([m for m in made.modules() if isinstance(m, MobiLinear)])
    made.dequantize()
    assert not [m for m in made.modules() if isinstance(m, MobiLinear)]
    assert len([m for m in made.modules() if isinstance(m, torch.nn.Linear)]) == count + 1
    assert snr_db(before, tiny.logits(made)) > 90


def test_sequences_of_one_batch_read_at_budgets_of_their_own(saved):
    loaded = mobiquant.load(saved)
    ids = tiny.tokens(4, 12)
    budgets = [2, 8, 3.3, 6]
    together = at(loaded, budgets, ids)
    for row, bits in enumerate(budgets):
        assert snr_db(at(loaded, bits, ids[row : row + 1])[0], together[row]) > 90
    assert snr_db(at(loaded, 8, ids[:1])[0], together[0]) < 20


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 16
    path.write_bytes(raw)


def cut_file(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def flip_data(folder):
    flip(folder / WEIGHTS, -1000)


def flip_header(folder):
    path = folder / WEIGHTS
    flip(path, path.read_bytes().index(NAME.encode()) + 3)


def drop_digests(folder):
    (folder / "digests.json").unlink()


def make_newer(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))


def drop_tensor(folder):
    tensors = load_file(folder / WEIGHTS)
    del tensors[NAME + ".scale"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def drop_tensor_and_digest(folder):
    drop_tensor(folder)
    checkpoint.write_digests(folder)


def drop_setting(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["group_size"]
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage, named",
    [
        (cut_file, WEIGHTS),
        (flip_data, r"tensor '\S+' in .* is not what was written"),
        (flip_header, r"self_attn\.k_proj"),
        (drop_digests, "digests.json"),
        (make_newer, "format version 99"),
        (drop_tensor, NAME + ".scale"),
        (drop_tensor_and_digest, NAME + ".scale"),
        (drop_setting, "group_size"),
    ],
)
def test_damaged_folders_are_refused_by_name(copy, damage, named):
    damage(copy)
    with pytest.raises(InputError, match=named):
        mobiquant.load(copy)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("owner, name", [(checkpoint, "write_digests"), (PreTrainedModel, "save_pretrained")])
def test_a_save_that_fails_leaves_the_folder_as_it_was(saved, copy, monkeypatch, error, owner, name):
    loaded = mobiquant.load(saved)
    before = contents(copy)
    genuine = getattr(owner, name)

    def fail(*args, **kwargs):
        genuine(*args, **kwargs)
        raise error

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(type(error)):
        loaded.save_pretrained(copy)
    with pytest.raises(type(error)):
        loaded.save_pretrained(copy.parent / "new")
    assert contents(copy) == before
    assert list(copy.parent.iterdir()) == [copy]


def test_a_save_whose_last_step_fails_brings_the_old_folder_back(saved, copy, monkeypatch):
    before, rename = contents(copy), Path.rename

    def fail(self, target):
        if self.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    loaded = mobiquant.load(saved)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError):
        loaded.save_pretrained(copy)
    assert contents(copy) == before and list(copy.parent.iterdir()) == [copy]


def test_foreign_folders_are_kept_and_older_checkpoints_replaced(saved, copy, tmp_path):
    loaded = mobiquant.load(saved, max_bits=4)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("do not lose")
    with pytest.raises(InputError, match="foreign' is not empty"):
        loaded.save_pretrained(foreign)
    assert contents(foreign) == {"thesis.txt": b"do not lose"}
    loaded.save_pretrained(foreign, overwrite=True)
    assert "thesis.txt" not in contents(foreign)
    loaded.save_pretrained(copy)
    assert contents(copy) == contents(foreign)


def test_a_model_can_be_saved_over_the_folder_it_was_loaded_from(copy):
    before = contents(copy)
    mobiquant.load(copy).save_pretrained(copy)
    assert contents(copy) == before


def test_folders_of_float_models_are_told_apart(tmp_path):
    tiny.model().save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match="is not quantised"):
        mobiquant.load(tmp_path / "plain")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "plain").lm_head.weight.isfinite().all()
