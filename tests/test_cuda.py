"""The CUDA kernels against the reference: emulated on a CPU, and on a GPU."""

import pytest
import torch
from emulation import DEVICES, Emulated, emulate, needs_compiler
from helpers import normal, random_router, snr_db

from mobiquant import matmul, pack, router
from mobiquant import slices as s
from mobiquant.kernels.cuda import few, many, product, tiles

LISTS = [(2, 1, 1, 2, 2), (2, 2, 2, 2), (3, 1, 1, 1, 1, 1), (4, 4), (2, 1), (1, 3)]
# rows of layers that share an input of so many columns, and the group: short last groups, rows that fill no tile
SHAPES = [((64,), 128, 64), ((48, 32, 16), 576, 128), ((33, 70), 200, 32), ((40,), 72, 64)]
SHUT = float("-inf")


@pytest.fixture(autouse=True)
def on_a_cpu(request, monkeypatch):
    """Emulate where the test is for a CPU, in an order of threads of its own each time."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("device") == "cpu":
        emulate(monkeypatch, abs(hash(request.node.name)))


def packed(rows, columns, slices, group, seed=0, magnitude=1.0):
    generator = torch.Generator().manual_seed(seed)
    code = torch.randint(0, 2 ** sum(slices), (rows, columns), generator=generator).to(torch.uint8)
    count = s.groups(columns, group)
    scale = ((torch.rand(rows, count, generator=generator) + 0.1) * magnitude).clamp(s.MIN_SCALE, s.MAX_SCALE).half()
    zero = torch.randint(0, 256, (rows, count), generator=generator).to(torch.uint8)
    return matmul.Packed(pack.pack(code, slices), scale, zero, slices, group, columns)


def laid(weight):
    return tiles.prepare(weight.planes, weight.scale, weight.zero, weight.slices, weight.group_size, weight.columns)


def moved(weight, device):
    planes = [plane.to(device) for plane in weight.planes]
    return matmul.Packed(planes, weight.scale.to(device), weight.zero.to(device), *list(vars(weight).values())[3:])


class Case:
    """Layers of one input on a device, their group, and what a call of it should give."""

    def __init__(self, rows, columns, slices, group, device, routed=True, magnitude=1.0, biased=True):
        self.weights = [moved(packed(n, columns, slices, group, i, magnitude), device) for i, n in enumerate(rows)]
        self.biases = [normal(n, seed=9).to(device) if biased and i % 2 == 0 else None for i, n in enumerate(rows)]
        self.router = None
        if routed:
            drawn = random_router(columns, 32, len(slices) - 1)
            self.router = router.Router(**{name: part.to(device) for name, part in vars(drawn).items()})
        scoring = tiles.prepare_router(self.router) if routed else None
        self.group = few.Group([laid(weight) for weight in self.weights], self.biases, [scoring] if scoring else [])
        self.depths, self.device, self.columns = len(slices), torch.device(device), columns

    def x(self, tokens, dtype, seed=0):
        return normal(tokens, self.columns, seed=seed).to(dtype).to(self.device)

    def run(self, x, tau, cap):
        """Products, and the depths that were counted [entries, E]."""
        read = torch.zeros(len(tau), self.depths, dtype=torch.float64, device=self.device)
        tau, cap = torch.tensor(tau, device=self.device), torch.tensor(cap, device=self.device)
        made = self.group(x, tau, cap, read)
        size = sum(weight.scale.shape[0] for weight in self.weights) * self.columns
        assert not self.group.state[1]
        return made, (read / size).cpu()

    def wanted(self, x, depth):
        every = [matmul.reference(x, weight, depth) for weight in self.weights]
        return [y if bias is None else y + bias for y, bias in zip(every, self.biases, strict=True)]

    def check(self, x, made, depth, least=None):
        least = least or (45 if x.dtype == torch.bfloat16 else 62)
        for y, expected in zip(made, self.wanted(x, depth.to(self.device)), strict=True):
            assert y.dtype == x.dtype and snr_db(expected, y.float()) > least


def between(score):
    """A threshold that no score is near, with about half of them above."""
    ordered = score.flatten().sort().values
    middle = slice(len(ordered) // 4, max(len(ordered) // 4 + 1, 3 * len(ordered) // 4))
    gaps = ordered.diff()[middle]
    at = middle.start + int(gaps.argmax())
    return float((ordered[at] + ordered[at + 1]) / 2)


@pytest.mark.parametrize("slices", LISTS)
@pytest.mark.parametrize(("rows", "columns", "group"), [(70, 200, 32), (32, 576, 128), (33, 72, 64)])
def test_tiles_hold_each_weight_where_they_say_and_turn_back(slices, rows, columns, group):
    weight = packed(rows, columns, slices, group)
    made = laid(weight)
    planes, scale, zero = tiles.restore(made)
    assert all(torch.equal(a, b) for a, b in zip(planes, weight.planes, strict=True))
    assert torch.equal(scale, weight.scale) and torch.equal(zero, weight.zero)
    code = pack.unpack(weight.planes, columns)
    for n, k in torch.randint(0, 10**6, (40, 2), generator=torch.Generator().manual_seed(1)).tolist():
        n, k, found = n % rows, k % columns, 0
        t, m, u, r = n // 32, n % 32 // 16, n % 16 // 8, n % 8
        c, f, j, h, i = k // 64, k % 64 // 32, k % 32 // 8, k % 8 // 4, k % 4
        for piece, part in zip(tiles.pieces_of(slices), made.pieces, strict=True):
            word, field = (2 * m + f, 2 * h + u) if piece.width == 2 else (m, 4 * f + 2 * h + u)
            byte = int(part[t, c, 4 * r + j, 4 * word + i])
            found = found << piece.width | byte >> (8 - piece.width * (field + 1)) & (2**piece.width - 1)
        assert found == int(code[n, k])


def test_tiles_take_the_bytes_of_planes_and_say_what_does_not_fit():
    weight = packed(64, 128, (2, 1, 1, 2, 2), 64)
    assert sum(part.numel() for part in laid(weight).pieces) == sum(plane.numel() for plane in weight.planes)
    assert "groups have 48" in tiles.unfit((2, 1), 48, 64) and "7 bits" in tiles.unfit((7, 1), 64, 64)
    assert "no multiple of 8" in tiles.unfit((2, 1), 64, 68) and not tiles.unfit((2, 1), 64, 72)
    with pytest.raises(ValueError, match="groups have 16 weights"):
        laid(packed(8, 64, (2, 1), 16))


# compiling is what takes time on a CPU: there each list comes in one dtype and group
FIXED = [pytest.param(slices, dtype, SHAPES, "cuda", marks=pytest.mark.gpu) for slices in LISTS for dtype in few.DTYPES]
FIXED += [
    pytest.param(slices, few.DTYPES[i % 2], [SHAPES[i % 4]], "cpu", marks=needs_compiler) for i, slices in enumerate(LISTS)
]


@pytest.mark.parametrize(("slices", "dtype", "shapes", "device"), FIXED)
def test_fixed_depths_are_those_of_the_reference(slices, dtype, shapes, device):
    for rows, columns, group in shapes:
        case = Case(rows, columns, slices, group, device)
        for tokens, depth in ((1, 1), (1, len(slices)), (4, 2)):
            x = case.x(tokens, dtype)
            made, read = case.run(x, [SHUT], [depth])
            case.check(x, made, torch.full((tokens,), depth))
            assert read[0].tolist() == [tokens * (d == depth) for d in range(1, len(slices) + 1)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tokens", [1, 3, 8, 16])
@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES[1:3])
def test_the_router_decides_as_in_torch_and_mixed_depths_are_right(rows, columns, group, tokens, device):
    case = Case(rows, columns, (2, 1, 1, 2, 2), group, device)
    x = case.x(tokens, torch.float16)
    score = router.scores(x, case.router)
    tau = between(score)
    made, read = case.run(x, [tau], [5])
    depth = router.depths(score, torch.tensor([tau], device=x.device), torch.tensor([5], device=x.device))
    assert torch.equal(case.group.depths[0, :tokens].long(), depth)
    assert read[0].tolist() == [int((depth == d).sum()) for d in range(1, 6)]
    case.check(x, made, depth.cpu())
    again, _ = case.run(x, [tau], [5])
    assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_each_entry_of_a_batch_has_its_threshold_and_cap(device):
    case = Case((64, 33), 128, (2, 1, 1, 2, 2), 64, device)
    x = case.x(6, torch.bfloat16)
    score = router.scores(x, case.router)
    taus, caps = [SHUT, between(score[2:4]), 1e9], [3, 4, 5]
    made, read = case.run(x, taus, caps)
    tau, cap = torch.tensor(taus).repeat_interleave(2), torch.tensor(caps).repeat_interleave(2)
    depth = router.depths(score.cpu(), tau, cap)
    assert depth[:2].tolist() == [3, 3] and depth[4:].tolist() == [1, 1]
    case.check(x, made, depth)
    assert read.sum(1).tolist() == [2, 2, 2] and read[2, 0] == 2


# thresholds and caps that a launch sees when it begins, and those that are set by the launch before it
@pytest.mark.parametrize(("early", "late"), [((SHUT, 1), (SHUT, 3)), ((SHUT, 4), (0.1, 5)), ((0.1, 5), (SHUT, 2))])
@needs_compiler
def test_precision_that_changes_while_a_launch_begins_is_the_new_one(early, late, monkeypatch):
    emulate(monkeypatch, 3)
    case = Case((96, 200), 328, (2, 1, 1, 2, 2), 64, "cpu")
    x = case.x(3, torch.float16)
    tau, cap = torch.tensor([early[0]]), torch.tensor([early[1]])
    read = torch.zeros(1, 5, dtype=torch.float64)
    monkeypatch.setattr(Emulated, "late", {tau: torch.tensor([late[0]]), cap: torch.tensor([late[1]])})
    made = case.group(x, tau, cap, read)
    monkeypatch.setattr(Emulated, "late", {})
    wanted = case.group(x, torch.tensor([late[0]]), torch.tensor([late[1]]), torch.zeros_like(read))
    for y, again in zip(made, wanted, strict=True):
        assert torch.equal(y, again)
    if late[0] == SHUT:
        case.check(x, made, torch.full((3,), late[1]))


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_that_shared_memory_does_not_hold_take_several_launches(device, monkeypatch):
    # as many warps for few tokens as for more, so that more tokens take more memory and sums have one order
    monkeypatch.setattr(few, "SHAPES", dict.fromkeys(few.SHAPES, few.Shape(4, 1)))
    case = Case((64, 40), 192, (2, 1, 1, 2, 2), 64, device)
    x = case.x(10, torch.float16)
    tau, cap = [SHUT, -0.2, 0.1, SHUT, 0.3], [1, 5, 5, 4, 3]
    together, counted = case.run(x, tau, cap)
    depth = case.group.depths.clone()
    case.group.limit = case.group.memory(4)
    assert case.group.fits() == 4 and case.group.most() == 16
    apart, again = case.run(x, tau, cap)
    for y, other in zip(together, apart, strict=True):
        assert torch.equal(y, other)
    assert torch.equal(counted, again) and torch.equal(case.group.depths, depth)
    # where few tokens take more memory than many, by their warps, none are taken that would not fit
    monkeypatch.setattr(few, "SHAPES", {1: few.Shape(8, 1), 2: few.Shape(4, 1), 4: few.Shape(4, 1)})
    case.group.limit = case.group.memory(16)
    assert case.group.memory(4) > case.group.limit and case.group.fits() == 0
    with pytest.raises(ValueError, match="a call takes 0"):
        case.run(x, tau, cap)


@pytest.mark.parametrize("device", DEVICES)
def test_launches_of_one_group_do_not_take_each_others_scores(device):
    case = Case((64, 40), 192, (2, 1, 1, 2, 2), 64, device)
    x = case.x(4, torch.float16)
    for number, own in enumerate((x, -x, x.flip(0), x.flip(1)), 1):
        assert int(case.group.state[0]) == number
        made, _ = case.run(own, [-0.1], [5])
        depth = case.group.depths[0, :4].clone()
        alone = Case((64, 40), 192, (2, 1, 1, 2, 2), 64, device)
        for y, other in zip(made, alone.run(own, [-0.1], [5])[0], strict=True):
            assert torch.equal(y, other)
        assert torch.equal(depth, alone.group.depths[0, :4])


@pytest.mark.parametrize("device", DEVICES)
def test_one_token_alone_at_full_depth(device):
    case = Case((64,), 192, (2, 1, 1, 2, 2), 64, device, routed=False)
    for tokens, alone in ((4, 2), (7, 0), (16, 15)):
        x = case.x(tokens, torch.float16)
        caps = [5 if i == alone else 1 for i in range(tokens)]
        made, _ = case.run(x, [SHUT] * tokens, caps)
        case.check(x, made, torch.tensor(caps))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("magnitude", [1e-7, 1e-3, 3e4])
def test_huge_and_tiny_scales_and_inputs(magnitude, device):
    case = Case((64,), 128, (2, 1, 1, 2, 2), 64, device, magnitude=magnitude, biased=False)
    for size in (1e-6, 1.0, 100.0):
        x = case.x(3, torch.bfloat16) * size
        made, _ = case.run(x, [SHUT], [4])
        case.check(x, made, torch.full((3,), 4))


@pytest.mark.parametrize("device", DEVICES)
def test_a_group_of_x_with_one_large_value_keeps_the_others(device):
    case = Case((64,), 256, (2, 1, 1, 2, 2), 64, device, biased=False)
    x = case.x(2, torch.bfloat16)
    x[:, 17] = 300.0
    made, _ = case.run(x, [SHUT], [5])
    case.check(x, made, torch.tensor([5, 5]))
    x[:, 17] = 0
    without, _ = case.run(x, [SHUT], [5])
    x[:, 17] = 300.0
    column = case.weights[0].read(5)[:, 17] * 300.0
    # what the other columns add is still there to the last digit that bf16 has of the sum
    assert snr_db(without[0].float() + column, made[0].float()) > 45


@pytest.mark.parametrize("device", DEVICES)
def test_nan_stays_in_its_row_and_nothing_is_made_of_nothing(device):
    case = Case((48, 32), 128, (2, 1, 1, 2, 2), 64, device)
    x = case.x(5, torch.float16)
    x[3, 7] = float("nan")
    for tau in (SHUT, -0.3):
        made, _ = case.run(x, [tau], [3])
        for y in made:
            assert y[3].isnan().all() and not y[[0, 1, 2, 4]].isnan().any()
    assert [y.shape for y in case.run(case.x(0, torch.float16), [SHUT], [3])[0]] == [(0, 48), (0, 32)]
    with pytest.raises(ValueError, match="a call takes 16"):
        case.run(case.x(17, torch.float16), [SHUT], [3])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("slices", "dtype"), [(slices, few.DTYPES[i % 2]) for i, slices in enumerate(LISTS)])
def test_weights_written_out_are_those_of_the_reference(slices, dtype, device):
    for rows, columns, group in ((70, 200, 32), (64, 576, 128), (33, 72, 64)):
        weight = moved(packed(rows, columns, slices, group), device)
        made = many.spread(laid(weight), range(1, len(slices) + 1), dtype)
        for depth in range(1, len(slices) + 1):
            assert torch.equal(made[depth - 1], weight.read(depth).to(dtype))


@pytest.mark.parametrize("device", DEVICES)
def test_depths_that_no_token_reads_are_not_written(device):
    weight = laid(moved(packed(32, 64, (2, 1, 1, 2, 2), 64), device))
    counts = torch.tensor([0, 3, 0, 1, 0], dtype=torch.int32, device=device)
    made = many.spread(weight, range(1, 6), torch.float16, counts)
    every = many.spread(weight, range(1, 6), torch.float16)
    assert torch.equal(made[1], every[1]) and torch.equal(made[3], every[3])


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_that_fail_or_are_wrong_are_not_used_and_say_why(device, monkeypatch):
    place = torch.device(device)
    product.failing.cache_clear()
    assert product.failing((2, 1, 1, 2, 2), 64, torch.float16, place) == ""
    if many.has_warpgroups(place):
        fused = many.fused
        monkeypatch.setattr(many, "fused", lambda *args, **how: [1.1 * y for y in fused(*args, **how)])
        product.failing.cache_clear()
        assert "wrong products on this device (error 0.1)" in product.failing((2, 1, 1, 2, 2), 64, torch.float16, place)
        monkeypatch.setattr(many, "fused", fused)
    product.failing.cache_clear()
    right = few.Group.__call__
    monkeypatch.setattr(few.Group, "__call__", lambda *args: [1.1 * y for y in right(*args)])
    assert "wrong products on this device (error 0.1)" in product.failing((2, 1, 1, 2, 2), 64, torch.float16, place)

    def refused(*_):
        raise RuntimeError("launching a kernel failed: CUDA_ERROR_X\nand more")

    product.failing.cache_clear()
    monkeypatch.setattr(few.Group, "__call__", refused)
    assert product.failing((2, 1, 1, 2, 2), 64, torch.float16, place).endswith("(launching a kernel failed: CUDA_ERROR_X)")
    product.failing.cache_clear()
