"""The C++ kernels of a CPU against the fp32 definition of the product, on every instruction set of this machine."""

import threading

import pytest
import torch
from helpers import SLICES, interpreted, normal, packed, snr_db, weights
from hypothesis import given
from hypothesis import strategies as st

from mobiquant import matmul, pack
from mobiquant import slices as s
from mobiquant.kernels.cpu import library, product
from mobiquant.matmul import Packed, reference

pytestmark = [
    pytest.mark.backend,
    pytest.mark.skipif(library.load() is None, reason="the CPU kernels are not built: no C++ compiler"),
]
SETS = library.instructions()
# int8 activations with a scale for each 32 columns; short rows average little of their noise away
LEAST_DB = 40
GROUPS = (32, 64, 96, 128, 4096)
SHAPES = ((24, 40, 32), (9, 576, 64), (16, 576, 64), (8, 1536, 64), (13, 1000, 96), (5, 3000, 128), (1, 8, 32), (6, 64, 32))


def noise_db(x, weight, depth, y):
    """Signal to noise against the size of the terms: a sum that cancels has less signal than they have."""
    terms = torch.stack([x[t].float().abs() @ weight.read(int(d)).abs().T for t, d in enumerate(depth)])
    return snr_db(terms, terms + (y.double() - reference(x, weight, depth).double()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_every_depth_on_every_shape(instructions, shape, tokens):
    for slices in SLICES:
        weight, x = packed(slices, *shape, seed=1), normal(tokens, shape[1], seed=3)
        for d in range(1, len(slices) + 1):
            depth = torch.full((tokens,), d)
            assert noise_db(x, weight, depth, matmul.matmul(x, weight, d)) > LEAST_DB, (slices, d)


@given(
    st.sampled_from(SLICES),
    st.integers(1, 40),
    st.integers(1, 700),
    st.integers(1, 40),
    st.sampled_from(GROUPS),
    st.integers(0, 99),
)
def test_mixed_depths(slices, tokens, columns, rows, group, seed):
    weight, x = packed(slices, rows, columns, group, seed=seed), normal(tokens, columns, seed=seed)
    depth = torch.randint(1, len(slices) + 1, (tokens,), generator=torch.Generator().manual_seed(seed))
    y = matmul.matmul(x, weight, depth)
    assert y.shape == (tokens, rows) and noise_db(x, weight, depth, y) > LEAST_DB


@pytest.mark.parametrize("tokens", [1, 5])
def test_sums_are_exact_where_activations_are(instructions, tokens):
    # whole numbers up to 127 with a 127 in every lane are their own int8 codes
    x = torch.randint(-127, 128, (tokens, 576), generator=torch.Generator().manual_seed(0)).float()
    x[:, ::32] = 127
    for slices in SLICES:
        weight = packed(slices, 16, 576, 64, seed=2)
        for d in range(1, len(slices) + 1):
            assert noise_db(x, weight, torch.full((tokens,), d), matmul.matmul(x, weight, d)) > 120


@pytest.mark.parametrize("kind", ["zero", "huge", "tiny", "outlier", "zero group", "constant"])
def test_weights_of_every_kind(instructions, kind):
    w = weights(kind, 16, 320)
    parts = w.unflatten(1, (5, 64))
    scale, zero = s.from_range(parts.amin(2), parts.amax(2), (2, 1, 1, 2, 2))
    code = s.encode(w, scale, zero, (2, 1, 1, 2, 2), 64)
    weight = Packed(pack.pack(code, (2, 1, 1, 2, 2)), scale, zero, (2, 1, 1, 2, 2), 64, 320)
    x, depth = normal(6, 320), torch.tensor([1, 2, 3, 4, 5, 1])
    assert noise_db(x, weight, depth, matmul.matmul(x, weight, depth)) > LEAST_DB


@pytest.mark.parametrize("shape", [(30, 576, 64), (9, 1000, 96), (5, 40, 4096)])
def test_a_weight_is_written_out_as_it_is_read(instructions, shape):
    for slices in SLICES:
        weight = packed(slices, *shape, seed=1)
        group = min(shape[2], -(-shape[1] // 32) * 32)
        held = library.weight_of(list(weight.planes), weight.scale, weight.zero, None, slices[0], group, shape[1])
        for d, bits in enumerate(s.bounds(slices)):
            assert torch.equal(product.read(held, bits, torch.float32), weight.read(d + 1))
            assert torch.equal(product.read(held, bits, torch.bfloat16), weight.read(d + 1).bfloat16())


def test_many_tokens_with_matrix_units_are_exact_in_their_dtype(monkeypatch):
    monkeypatch.setattr(product, "matrix_units", lambda: True)
    weight, x = packed(rows=30, columns=200, group=64), normal(2 * product.MANY + 9, 200).bfloat16()
    depth = torch.ones(x.shape[0], dtype=torch.int64)
    depth[product.MANY :] = 4
    depth[-9:] = 2
    assert noise_db(x, weight, depth, matmul.matmul(x, weight, depth)) > LEAST_DB
    y, wanted = matmul.matmul(x, weight, 3), matmul.dense(x, weight, 3)
    assert torch.equal(y, wanted)


@pytest.mark.parametrize("tokens", [1, 50])
def test_the_number_of_threads_changes_no_bit(instructions, tokens):
    weight, x = packed(rows=700, columns=576, group=64), normal(tokens, 576)
    depth, found = torch.randint(1, 6, (tokens,)), []
    before = torch.get_num_threads()
    for count in (1, 2, 3, 7, 1):
        torch.set_num_threads(count)
        found.append(matmul.matmul(x, weight, depth))
    torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_instruction_sets_agree():
    weight, x, depth, found = packed(rows=64, columns=640, group=64), normal(9, 640), torch.randint(1, 6, (9,)), []
    for name in SETS:
        library.use(name)
        found.append(matmul.matmul(x, weight, depth))
    library.use(SETS[-1])
    assert all(snr_db(found[0], other) > 110 for other in found)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tokens", [1, 6])
def test_a_broken_row_stays_alone(instructions, bad, tokens):
    weight, x, depth = packed(rows=30, columns=200, group=64), normal(tokens, 200), torch.randint(1, 6, (tokens,))
    clean = matmul.matmul(x, weight, depth)
    x[-1, 77] = bad
    y = matmul.matmul(x, weight, depth)
    assert torch.equal(y[:-1], clean[:-1]) and y[-1].isnan().all()


def test_tiny_and_huge_activations(instructions):
    weight = packed(rows=30, columns=200, group=64)
    for size in (1e-25, 1e25):
        x, depth = normal(3, 200) * size, torch.tensor([1, 3, 5])
        assert noise_db(x.double().float(), weight, depth, matmul.matmul(x, weight, depth)) > LEAST_DB
    assert torch.equal(matmul.matmul(torch.zeros(2, 200), weight, 2), torch.zeros(2, 30))


def test_no_tokens_other_dtypes_and_strides():
    weight, x, depth = packed(rows=30, columns=200, group=64), normal(4, 400), torch.tensor([1, 3, 5, 2])
    assert matmul.matmul(torch.zeros(0, 200), weight, 3).shape == (0, 30)
    assert matmul.matmul(torch.zeros(0, 200), weight, torch.zeros(0, dtype=torch.int64)).shape == (0, 30)
    assert torch.equal(matmul.matmul(x[:, ::2], weight, depth), matmul.matmul(x[:, ::2].contiguous(), weight, depth))
    assert torch.equal(matmul.matmul(x[:, :200], weight, depth[::1]), matmul.matmul(x[:, :200].clone(), weight, depth))
    for dtype in (torch.bfloat16, torch.float16):
        y = matmul.matmul(x[:, :200].to(dtype), weight, depth)
        assert y.dtype == dtype and noise_db(x[:, :200].to(dtype), weight, depth, y) > 40


def test_planes_at_any_address_and_parts_of_larger_ones(instructions):
    weight, x, depth = packed(rows=30, columns=200, group=64), normal(4, 200), torch.tensor([1, 3, 5, 2])

    def moved(tensor, by):
        held = torch.zeros(tensor.numel() + by, dtype=tensor.dtype)
        held[by:] = tensor.flatten()
        return held[by:].view(tensor.shape)

    other = Packed([moved(p, 1 + e) for e, p in enumerate(weight.planes)], moved(weight.scale, 1), moved(weight.zero, 3),
                   weight.slices, 64, 200)  # fmt: skip
    assert torch.equal(matmul.matmul(x, weight, depth), matmul.matmul(x, other, depth))
    wide = [torch.cat([p, p], 2)[:, :, : p.shape[2]] for p in weight.planes]
    other = Packed(wide, weight.scale, weight.zero, weight.slices, 64, 200)
    assert torch.equal(matmul.matmul(x, weight, depth), matmul.matmul(x, other, depth))


def test_deeper_planes_do_not_matter():
    weight, x, depth = packed(rows=30, columns=200, group=64), normal(4, 200), torch.tensor([1, 3, 2, 3])
    planes = [*weight.planes[:3], *(~plane for plane in weight.planes[3:])]
    other = Packed(planes, weight.scale, weight.zero, weight.slices, 64, 200)
    assert torch.equal(matmul.matmul(x, other, depth), matmul.matmul(x, weight, depth))
    part = Packed(weight.planes[:3], weight.scale, weight.zero, weight.slices[:3], 64, 200)
    assert torch.equal(matmul.matmul(x, part, depth), matmul.matmul(x, weight, depth))


def test_the_operator_is_well_behaved():
    weight, x = packed(rows=30, columns=200, group=64), normal(4, 200)
    bits = torch.tensor([2, 4, 8, 3], dtype=torch.int8)
    given = (x, list(weight.planes), weight.scale, weight.zero, bits, 2, 64, 200)
    torch.library.opcheck(product.product, given, test_utils=("test_schema", "test_faketensor"))


COMPILED = """
import torch
from helpers import layer, normal
from mobiquant.config import Format
made, x = layer(Format(group_size=32), 64), normal(3, 64)
compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
with torch.inference_mode():
    for tau, cap in ((0.1, 5), (float("-inf"), 2), (0.0, 4)):
        made.precision.set([tau], [cap])
        print(torch.equal(compiled(x), made(x)))
"""


def test_a_compiled_layer_is_one_graph():
    # in a process of its own: the type checks of the tests cannot be traced
    done = interpreted(COMPILED)
    assert done.stdout.split() == ["True"] * 3, done.stderr[-2000:]


def test_gradients_take_the_exact_path():
    weight, x = packed(rows=30, columns=200, group=64), normal(4, 200).requires_grad_()
    matmul.matmul(x, weight, 2).sum().backward()
    assert snr_db(weight.read(2).sum(0).expand(4, -1), x.grad) > 100
    with torch.no_grad():
        assert not torch.equal(matmul.matmul(x, weight, 2), matmul.dense(x, weight, 2))


def test_exact_is_exact_and_ends():
    weight, x = packed(rows=30, columns=200, group=64), normal(4, 200)
    with matmul.exact():
        assert torch.equal(matmul.matmul(x, weight, 2), matmul.dense(x, weight, 2))
    assert not torch.equal(matmul.matmul(x, weight, 2), matmul.dense(x, weight, 2))


def test_groups_that_do_not_fit_are_told_once():
    weight, x = packed(rows=30, columns=200, group=40), normal(4, 200)
    product._warn.cache_clear()
    with pytest.warns(UserWarning, match="groups of 40 weights are no multiple of 32"):
        y = matmul.matmul(x, weight, 2)
    assert torch.equal(y, matmul.dense(x, weight, 2))


def test_without_the_library_products_are_right_and_one_warning_says_why(monkeypatch, recwarn):
    weight, x = packed(rows=30, columns=200, group=64), normal(4, 200)
    product._warn.cache_clear()
    monkeypatch.setattr(library, "load", lambda: None)
    assert torch.equal(matmul.matmul(x, weight, 2), matmul.dense(x, weight, 2))
    matmul.matmul(x, weight, 3)
    found = [str(w.message) for w in recwarn if "not built" in str(w.message)]
    assert len(found) == 1 and "install a C++ compiler" in found[0]


def test_several_threads_of_python_may_call_at_once():
    weight, x = packed(rows=512, columns=576, group=64), normal(8, 576)
    expected, found = matmul.matmul(x, weight, 3), {}
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def work(number):
        found[number] = all(torch.equal(matmul.matmul(x, weight, 3), expected) for _ in range(30))

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    torch.set_num_threads(before)
    assert found == dict.fromkeys(range(4), True)


FORKED = """
import os, torch
from helpers import normal, packed
from mobiquant import matmul
torch.set_num_threads(2)
weight, x = packed(rows=512, columns=576, group=64), normal(1, 576)
expected = matmul.matmul(x, weight, 3)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(matmul.matmul(x, weight, 3), expected) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), torch.equal(matmul.matmul(x, weight, 3), expected))
"""


def test_a_forked_process_goes_on():
    assert interpreted(FORKED).stdout.split() == ["0", "True"]


def test_another_instruction_set_can_be_asked_for_and_a_wrong_one_is_refused():
    with pytest.raises(ValueError, match="'sse9' do not work"):
        library.use("sse9")
    code = "from mobiquant.kernels.cpu import library; library.load()"
    done = interpreted(f"import os; os.environ['{library.INSTRUCTIONS}'] = 'sse9'; {code}")
    assert "do not work on this machine" in done.stderr
