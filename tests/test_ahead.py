"""Routers that read the input of a block's first layers: what they are fitted to, where they lie, what the checkpoint says."""

import pytest
import tiny
import torch

import mobiquant
from mobiquant import InputError, blocks, budget, checkpoint, data, router
from mobiquant.calibrate import routers
from mobiquant.config import Checkpoint, Format
from mobiquant.linear import mobilinears

FORM = Format(group_size=32)
NAMES = (("0.q", "0.k"), ("0.o",), ("1.q", "1.k"), ("1.o",), ("2.q", "2.k"))


def test_the_checkpoint_says_what_each_router_reads():
    stored = Checkpoint(FORM, NAMES, (0, 2, 4))
    assert stored.read_by_routers() == {"0.q": "0.q", "0.o": "0.q", "1.q": "0.q", "1.o": "1.q", "2.q": "1.q"}
    assert Checkpoint.from_dict(stored.to_dict()) == stored
    own = Checkpoint(Format(routers="per-input"), NAMES)
    assert own.read_by_routers() == {names[0]: names[0] for names in NAMES}
    every = Checkpoint(Format(routers="per-linear"), NAMES)
    assert every.read_by_routers() == {name: name for names in NAMES for name in names}
    for begins in ((), (2, 4)):
        with pytest.raises(InputError, match="does not say where its blocks begin"):
            Checkpoint(FORM, NAMES, begins).read_by_routers()
    # version 1 knew no blocks
    old = {key: value for key, value in own.to_dict().items() if key != "blocks"} | {"format_version": 1}
    assert Checkpoint.from_dict(old) == own


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(quantised model of three blocks, its float original, the tokens that it was calibrated with)."""
    home, settings = tmp_path_factory.mktemp("ahead"), {"samples": 16, "sequence_length": 32}
    original = tiny.model(num_hidden_layers=3)
    quantised = tiny.quantize(home, tiny.model(num_hidden_layers=3), format=FORM, **settings)
    ids = data.windows((home / "text.txt").read_text(), tiny.tokenizer(), 32, "text")
    return quantised, original, ids


def test_routers_lie_with_the_layers_whose_input_they_read(made):
    quantised, _, _ = made
    layers, stored = mobilinears(quantised), budget.checkpoint_of(quantised)
    holders = checkpoint.router_holders(layers, stored)
    read = stored.read_by_routers()
    assert list(holders) == [names[0] for names in stored.inputs] and stored.blocks == (0, 4, 8)
    for name, (holder, ahead) in holders.items():
        own = holder.get_router(ahead)
        assert own.weight.shape[1] == layers[read[name]].in_features and own.weight.abs().max() == 127
        carried = name in ("model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj")
        assert ahead == carried and holder is layers[read[name] if carried else name]
        assert layers[name].place == (list(holders).index(name) or None)


def test_routers_are_fitted_to_what_they_will_read(made):
    quantised, original, ids = made
    layers, stored = mobilinears(quantised), budget.checkpoint_of(quantised)
    holders, read = checkpoint.router_holders(layers, stored), stored.read_by_routers()
    seen = {}
    owners = [names[0] for names in stored.inputs]
    watched = blocks.watch_inputs(quantised, owners, lambda name, x: seen.update({name: x.flatten(0, 1)}))
    with mobiquant.precision(quantised, 4, routed=False), watched, torch.no_grad():
        quantised(ids)
    explained = []
    for names in stored.inputs:
        weight = torch.cat([blocks.weight_of(original.get_submodule(name)) for name in names])
        reads = torch.stack([torch.cat([layers[name].packed().read(d) for name in names]) for d in range(1, 6)])
        holder, ahead = holders[names[0]]
        score = router.scores(seen[read[names[0]]], holder.get_router(ahead))
        explained.append(routers.explained(score, routers.targets(seen[names[0]], weight.detach(), reads)))
    # little on a random model; fitted to another input, those of the next block's first layers explain less than nothing
    assert min(explained) > 0
