"""Depths that a launch of `few.cu` decides for launches to come: emulated on a CPU, and on a GPU."""

import pytest
import torch
from emulation import DEVICES, Emulated, emulate, needs_compiler
from helpers import random_router
from test_cuda import SHUT, Case, between, laid

from mobiquant import router
from mobiquant.kernels.cuda import few, tiles

SLICES = (2, 1, 1, 2, 2)


@pytest.fixture(autouse=True)
def on_a_cpu(request, monkeypatch):
    """Emulate where the test is for a CPU, in an order of threads of its own each time."""
    case = getattr(request.node, "callspec", None)
    if case is None or case.params.get("device", "cpu") == "cpu":
        emulate(monkeypatch, abs(hash(request.node.name)))


class Ahead(Case):
    """A case whose group has the routers of `count` inputs: its own, and those of launches to come."""

    def __init__(self, device, count=3, rows=(64, 33), columns=192, given=False):
        super().__init__(rows, columns, SLICES, 64, device)
        drawn = [random_router(columns, 16, len(SLICES) - 1, seed) for seed in range(count)]
        self.routers = [router.Router(**{name: part.to(device) for name, part in vars(one).items()}) for one in drawn]
        laid_out = [tiles.prepare_router(one) for one in self.routers]
        self.group = few.Group([laid(weight) for weight in self.weights], self.biases, laid_out, given)

    def call(self, x, tau, cap, given=None):
        """Products, and how many tokens were counted at each depth."""
        read = torch.zeros(len(tau), self.depths, dtype=torch.float64, device=self.device)
        limits = torch.tensor(tau, device=self.device), torch.tensor(cap, device=self.device)
        made = self.group(x, *limits, read, given)
        assert not self.group.state[1]
        return made, (read / (sum(weight.scale.shape[0] for weight in self.weights) * self.columns)).cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 3, 8, 16])
def test_one_launch_decides_for_itself_and_for_others(tokens, device):
    case = Ahead(device)
    x = case.x(tokens, torch.bfloat16)
    scores = [router.scores(x, one) for one in case.routers]
    tau = between(torch.cat(scores))
    depth = [router.depths(s, torch.tensor([tau], device=x.device), torch.tensor([4], device=x.device)) for s in scores]
    made, read = case.call(x, [tau], [4])
    for decided, wanted in zip(case.group.depths, depth, strict=True):
        assert torch.equal(decided[:tokens].long(), wanted)
    assert read[0].tolist() == [int((depth[0] == d).sum()) for d in range(1, 6)]
    case.check(x, made, depth[0].cpu())
    again, _ = case.call(x, [tau], [4])
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("tokens", "count"), [(1, 3), (3, 0), (8, 2), (16, 0), (16, 3)])
def test_depths_that_are_handed_over_are_read_and_others_decided(tokens, count, device):
    case = Ahead(device, count=count, given=True)
    x = case.x(tokens, torch.bfloat16)
    scores = [router.scores(x, one) for one in case.routers]
    tau = between(torch.cat(scores)) if scores else 0.5
    given = torch.tensor([1, 4, 2, 3], device=x.device, dtype=torch.int32).repeat(4)[:tokens]
    for _ in range(2):
        made, read = case.call(x, [tau], [5], given)
        case.check(x, made, given.long().cpu())
        assert read[0].tolist() == [int((given == d).sum()) for d in range(1, 6)]
    for decided, score in zip(case.group.depths, scores, strict=False):
        wanted = router.depths(score, torch.tensor([tau], device=x.device), torch.tensor([5], device=x.device))
        assert torch.equal(decided[:tokens].long(), wanted)


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_without_a_threshold_read_their_cap_whatever_was_decided(device):
    case = Ahead(device, count=1, given=True)
    x = case.x(4, torch.float16)
    given = torch.tensor([2, 2, 1, 3], device=x.device, dtype=torch.int32)
    made, read = case.call(x, [SHUT, 0.5], [4, 5], given)
    case.check(x, made, torch.tensor([4, 4, 1, 3]))
    assert read.tolist() == [[0, 0, 0, 2, 0], [1, 0, 1, 0, 0]]


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_of_a_call_have_their_own_tokens(device):
    case, other = Ahead(device), Ahead(device, count=1, given=True)
    x = case.x(10, torch.float16)
    tau = between(torch.cat([router.scores(x, one) for one in case.routers]))
    case.call(x, [tau], [5])
    depths = case.group.depths.clone()
    for group in (case.group, other.group):
        group.limit = group.memory(4)
    case.group.depths.fill_(1)
    case.call(x, [tau], [5])
    assert torch.equal(case.group.depths[:, :10], depths[:, :10])
    given = torch.arange(10, device=x.device, dtype=torch.int32) % 5 + 1
    made, _ = other.call(x, [tau], [5], given)
    other.check(x, made, given.long().cpu())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("given", [False, True])
def test_one_buffer_of_sums_where_two_do_not_fit(given, device, monkeypatch):
    case = Ahead(device, rows=(64, 200, 96), given=given)
    # as many warps, so that sums have one order
    monkeypatch.setattr(few, "NARROW", {2: few.SHAPES[2]._replace(buffers=1)})
    x = case.x(7, torch.bfloat16)
    tau = between(torch.cat([router.scores(x, one) for one in case.routers]))
    depths = torch.tensor([1, 4, 2, 3, 5, 2, 1], device=x.device, dtype=torch.int32) if given else None
    wanted, counted = case.call(x, [tau], [5], depths)
    decided = case.group.depths.clone()
    assert case.group.shape(8).buffers == 2
    case.group.limit = case.group.memory(8) - 1
    assert case.group.shape(8).buffers == 1 and case.group.memory(8) <= case.group.limit and case.group.fits() >= 8
    made, again = case.call(x, [tau], [5], depths)
    assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
    assert torch.equal(counted, again) and torch.equal(decided, case.group.depths)


@needs_compiler
def test_blocks_with_the_fewest_rows_score_and_others_of_them_decide():
    case = Ahead("cpu", count=4, given=True)
    p = case.group.params
    # query, key and value of 4096 columns: 12 of 132 blocks have two row tiles, the others three
    case.group.row_tiles, p.column_tiles = 384, 64
    case.group._share(132, few.Shape(16, 2))
    assert (p.parts, p.deciders, p.busy) == (2, 8, 12)
    # as many rows for all: as many parts as there are warps for
    case.group.row_tiles = 396
    case.group._share(132, few.Shape(16, 2))
    assert (p.parts, p.deciders, p.busy) == (4, 16, 20)
    # fewer blocks than routers
    case.group._share(3, few.Shape(16, 2))
    assert (p.parts, p.deciders, p.busy) == (1, 1, 3)


@needs_compiler
def test_launches_without_routers_take_shapes_of_their_own(monkeypatch):
    monkeypatch.setattr(few, "FIXED", {2: few.Shape(8, 2, ring=6912)})
    case = Ahead("cpu", count=0)
    assert case.group.shape(8) == few.FIXED[2] and case.group.shape(1) == few.SHAPES[1]
    assert Ahead("cpu", count=0, given=True).group.shape(8) == few.SHAPES[2]


# what a launch sees when it begins, and what the launch before it writes
@pytest.mark.parametrize(("early", "late"), [(1, 4), (5, 2), (3, 3)])
@needs_compiler
def test_depths_that_are_decided_while_a_launch_begins_are_the_new_ones(early, late, monkeypatch):
    case = Ahead("cpu", count=1, rows=(96, 200), columns=328, given=True)
    x, given = case.x(3, torch.float16), torch.full((3,), early, dtype=torch.int32)
    monkeypatch.setattr(Emulated, "late", {given: torch.full((3,), late, dtype=torch.int32)})
    made, read = case.call(x, [0.1], [5], given)
    case.check(x, made, torch.full((3,), late))
    assert read[0, late - 1] == 3


@needs_compiler
def test_more_routers_than_a_launch_takes_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="9 routers: a launch takes 4 and 8"):
        Ahead("cpu", count=9)
    case = Ahead("cpu", count=1)
    other = tiles.prepare_router(random_router(192, 8, len(SLICES) - 1))
    with pytest.raises(ValueError, match="differ in hidden units or scores"):
        few.Group(case.group.members, case.biases, [*case.group.routers, other])
    with pytest.raises(ValueError, match="given to layers that decide themselves"):
        case.call(case.x(1, torch.float16), [0.5], [5], torch.ones(1, dtype=torch.int32))
