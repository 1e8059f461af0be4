"""Many tokens by the weights of layers that read them, both ways: emulated on a CPU, and on a GPU."""

import pytest
import torch
from emulation import DEVICES, emulate
from helpers import normal, snr_db
from test_cuda import LISTS, laid, moved, packed

from mobiquant import matmul
from mobiquant.kernels.cuda import many, tiles


@pytest.fixture(autouse=True)
def on_a_cpu(request, monkeypatch):
    """Emulate where the test is for a CPU, in an order of threads of its own each time."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("device") == "cpu":
        emulate(monkeypatch, abs(hash(request.node.name)))


# ways to multiply many tokens
WAYS = [pytest.param(many.dense, id="dense"), pytest.param(many.fused, id="fused")]


def ways_on(device, way):
    """Skips what a GPU does not have."""
    if way is many.fused and device == "cuda" and not many.has_warpgroups(torch.device(device)):
        pytest.skip("products of four warps are Hopper's")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
def test_many_tokens_of_any_mixture_of_depths(device, way):
    ways_on(device, way)
    weight = moved(packed(96, 128, (2, 1, 1, 2, 2), 64), device)
    x = normal(40, 128).to(torch.bfloat16).to(device)
    drawn = torch.randint(1, 6, (40,), generator=torch.Generator().manual_seed(0))
    for depth in (drawn, torch.full((40,), 5), torch.where(torch.arange(40) == 7, 5, 1)):
        depth = depth.to(device)
        assert snr_db(matmul.reference(x, weight, depth), way(x, [laid(weight)], depth)[0].float()) > 40
    assert snr_db(matmul.reference(x, weight, torch.full((40,), 2, device=device)), way(x, [laid(weight)], 2)[0].float()) > 40


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("rows", "columns", "group", "tokens"), [(40, 72, 32, 70), (160, 328, 128, 65), (33, 576, 64, 17), (129, 64, 128, 130)]
)
@pytest.mark.parametrize(("slices", "dtype"), [((2, 1, 1, 2, 2), torch.bfloat16), ((3, 3), torch.float16)])
def test_weights_made_on_their_way_are_those_of_the_reference(rows, columns, group, tokens, slices, dtype, device):
    ways_on(device, many.fused)
    weight = moved(packed(rows, columns, slices, group), device)
    # one number in each row of x: products are the weights themselves, rounded to the dtype
    x, columns_of = torch.zeros(tokens, columns, dtype=dtype, device=device), torch.arange(tokens, device=device) * 7 % columns
    x[torch.arange(tokens, device=device), columns_of] = 1
    depth = torch.arange(tokens, device=device) % len(slices) + 1
    tile = laid(weight)
    made = many.fused(x, [tile], depth)[0]
    for d in range(1, len(slices) + 1):
        exact = weight.read(d).to(dtype).T[columns_of]
        assert torch.equal(made[depth == d], exact[depth == d])
        assert torch.equal(many.fused(x, [tile], d)[0], exact)


@pytest.mark.parametrize("device", DEVICES)
def test_fused_products_keep_nan_in_its_row_and_repeat(device):
    ways_on(device, many.fused)
    weight, x = laid(moved(packed(64, 200, (2, 1, 1, 2, 2), 32), device)), normal(33, 200).to(torch.float16).to(device)
    x[5, 3], x[9, 100] = float("nan"), float("inf")
    depth = torch.arange(33, device=device) % 5 + 1
    made, again = (many.fused(x, [weight], depth)[0] for _ in range(2))
    others = [t for t in range(33) if t not in (5, 9)]
    assert torch.equal(made[others], again[others]) and made[others].isfinite().all()
    assert made[5].isnan().all() and not made[9].isfinite().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("tokens", "depths"), [(1, 2), (37, 8), (256, 5), (1000, 3)])
def test_tokens_are_put_in_the_order_of_their_depths(tokens, depths, device):
    depth = torch.randint(1, depths + 1, (tokens,), generator=torch.Generator().manual_seed(tokens)).to(device)
    order, counts = many.order_of(depth, depths)
    assert torch.equal(order.long(), depth.argsort(stable=True))
    assert torch.equal(counts.long(), depth.bincount(minlength=depths + 1)[1:])


# layers of blocks of 128 rows, of which some have only a part: their rows, columns, group, tokens and those of a tile
TOGETHER = [
    ((128,), 576, 64, 40, 64),
    ((100, 60, 32), 200, 64, 140, 64),
    ((192,), 192, 32, 130, 128),
    ((320, 96, 96), 392, 64, 30, 64),
    ((48,), 1096, 64, 20, 64),
    ((160,), 392, 128, 150, 256),
    ((130, 48), 136, 128, 90, 256),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize(("rows", "columns", "group", "tokens", "own"), TOGETHER)
def test_layers_together_and_columns_shared_out_give_the_same(rows, columns, group, tokens, own, split, device):
    ways_on(device, many.fused)
    weights = [moved(packed(count, columns, (2, 1, 1, 2, 2), group, seed), device) for seed, count in enumerate(rows)]
    # steps of a power of two and x of small whole numbers: all sums are exact, in any order
    weights = [matmul.Packed(w.planes, torch.ones_like(w.scale) / 4, *list(vars(w).values())[2:]) for w in weights]
    x = torch.randint(-2, 3, (tokens, columns), generator=torch.Generator().manual_seed(1)).to(torch.float16).to(device)
    # depths 1 and 4 are read by nobody, 3 only by the last
    depth = torch.where(torch.arange(tokens) == tokens - 1, 3, torch.where(torch.arange(tokens) % 3 == 0, 2, 5)).to(device)
    tile = [laid(weight) for weight in weights]
    wanted = [matmul.reference(x.double(), weight, depth).to(x.dtype) for weight in weights]
    assert all(map(torch.equal, many.fused(x, tile, depth, split, own=own), wanted))
    exact = [(x.double() @ weight.read(3).double().T).to(x.dtype) for weight in weights]
    assert all(map(torch.equal, many.fused(x, tile, 3, split, own=own, stages=2), exact))
    # all rows at once, or in two launches
    assert split == 1 or all(map(torch.equal, many.fused(x, tile, 3, own=own), exact))


@pytest.mark.parametrize("device", DEVICES)
def test_sums_of_columns_shared_out_keep_nan_in_its_row_and_repeat(device):
    ways_on(device, many.fused)
    weight, x = laid(moved(packed(160, 840, (3, 1, 2), 128), device)), normal(30, 840).to(torch.bfloat16).to(device)
    alone = many.fused(x, [weight], 2, 1)[0]
    x[5, 3], x[9, 800] = float("nan"), float("inf")
    made, again = (many.fused(x, [weight], 2, 2)[0] for _ in range(2))
    others = [t for t in range(30) if t not in (5, 9)]
    assert torch.equal(made[others], again[others]) and snr_db(alone[others].float(), made[others].float()) > 45
    assert made[5].isnan().all() and not made[9].isfinite().any()


def test_columns_are_shared_out_where_processors_are_left_over():
    # two tiles of 4096 rows keep half of 132 processors busy, four tiles all
    assert many.split_for(2, 32, 64, 132) == 2 and many.split_for(4, 32, 64, 132) == 1
    # few columns are not
    assert many.split_for(1, 1, 4, 132) == 1
    # 96 blocks of rows by two tiles: once all processors, and a rest that is shared out
    assert many.launches_for(2, 96, 64, 132) == [(66, 1), (30, 2)]
    assert many.launches_for(4, 99, 64, 132) == [(99, 1)] and many.launches_for(1, 32, 64, 132) == [(32, 2)]
    for blocks, tile_count in ((172, 1), (133, 1), (33, 4), (67, 2), (3, 3), (1, 200)):
        assert sum(count for count, _ in many.launches_for(tile_count, blocks, 64, 132)) == blocks


def test_tiles_are_as_large_as_keeps_processors_busy():
    enough = many.LEAST_STAGES
    sizes = [many.tile_for(tokens, 96, True, enough, 132) for tokens in (17, 64, 65, 128, 129, 512)]
    assert sizes == [64, 64, 128, 128, 256, 256]
    # 4096 rows: few blocks, so smaller tiles
    assert [many.tile_for(tokens, 32, True, enough, 132) for tokens in (128, 256, 512)] == [64, 128, 256]
    # depths that are mixed leave tiles unfilled; without enough stages nothing hides the way from memory
    assert many.tile_for(512, 96, False, enough, 132) == many.tile_for(512, 96, True, enough - 1, 132) == 128
    for slices in LISTS:
        for group in tiles.GROUPS:
            for own, least in ((64, 4), (128, 4), (256, 2)):
                stages, memory = many.stages_for(own, slices, group)
                assert least <= stages <= many.STAGES and memory <= many.MEMORY
    assert many.stages_for(256, (2, 1, 1), 128)[0] == enough
