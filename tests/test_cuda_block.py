"""What lies between the linear layers of a block on CUDA, against torch; the kernels are emulated on a CPU or run on a GPU."""

import pytest
import torch
from emulation import DEVICES, emulate
from helpers import snr_db

from mobiquant.kernels.cuda import block

BF16 = torch.bfloat16


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    if request.param == "cpu":
        emulate(monkeypatch)
    return torch.device(request.param)


def random(device, *shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(BF16).to(device)


def rms_norm(x, weight, epsilon):
    return weight.float() * (x.float() * (x.float().square().mean(-1, keepdim=True) + epsilon).rsqrt())


def turned(x, cosine, sine):
    """[B, H, D] with the angles [B, D / 2] of each sequence."""
    low, high = x.chunk(2, -1)
    c, s = cosine[:, None], sine[:, None]
    return torch.cat([low * c - high * s, high * c + low * s], -1)


def expected(attention, query, key, value, cosine, sine, position, norms):
    """The same in fp32, and the cache with the new tokens."""
    count, (heads, own, size) = len(query), (attention.heads, attention.key_heads, attention.head)
    query, key = query.view(count, heads, size).float(), key.view(count, own, size).float()
    if norms:
        query, key = (rms_norm(x, weight, norms[2]) for x, weight in ((query, norms[0]), (key, norms[1])))
    angles = cosine[position.long()], sine[position.long()]
    query, key = turned(query, *angles), turned(key, *angles)
    keys, values = attention.keys.float(), attention.values.float()
    made = []
    for i, at in enumerate(position.tolist()):
        keys[i, :, at], values[i, :, at] = key[i], value[i].view(own, size).float()
        shared = [kept[i, :, : at + 1].repeat_interleave(heads // own, 0) for kept in (keys, values)]
        weights = (query[i][:, None] @ shared[0].transpose(1, 2) * attention.scale).softmax(-1)  # [H, 1, P]
        made.append((weights @ shared[1]).flatten())
    return torch.stack(made), keys, values


@pytest.mark.parametrize(
    ("head", "key_heads", "share", "positions", "position", "normed"),
    [
        (64, 3, 3, 128, (0, 63), False),
        (64, 1, 16, 256, (64, 200), False),
        (128, 2, 4, 640, (511, 5), True),
        (192, 1, 2, 192, (100, 128), False),
        (256, 1, 8, 128, (127, 64), True),
        (128, 1, 1, 128, (1, 126), False),
    ],
)
def test_attention_is_that_of_torch_wherever_the_token_is(device, head, key_heads, share, positions, position, normed):
    heads, like = key_heads * share, torch.empty(0, dtype=BF16, device=device)
    norms = (random(device, head, seed=7), random(device, head, seed=8), 1e-6) if normed else None
    attention = block.Attention(2, heads, key_heads, positions, head, head**-0.5, like, norms)
    attention.keys.copy_(random(device, *attention.keys.shape, seed=1))
    attention.values.copy_(random(device, *attention.values.shape, seed=2))
    # large scores, so that chunks differ
    query = 3 * random(device, 2, heads * head, seed=3)
    key, value = (random(device, 2, key_heads * head, seed=seed) for seed in (4, 5))
    angles = torch.rand(positions, head // 2, generator=torch.Generator().manual_seed(6)).to(device) * 6.3
    cosine, sine = angles.cos(), angles.sin()
    where = torch.tensor(position, dtype=torch.int32, device=device)
    wanted, keys, values = expected(attention, query, key, value, cosine, sine, where, norms)
    if device.type == "cuda":
        torch.cuda.synchronize()
    given = query.clone(), key.clone(), value.clone()
    made = attention(query, key, value, cosine, sine, where)
    assert snr_db(wanted, made.float()) > 40
    assert snr_db(keys, attention.keys.float()) > 45 and torch.equal(values, attention.values.float())
    assert all(torch.equal(a, b) for a, b in zip(given, (query, key, value), strict=True))
    if device.type == "cuda":
        torch.cuda.synchronize()
    # the counters of arrivals are zero again, and sums have one order
    assert torch.equal(made, attention(query, key, value, cosine, sine, where)) and not attention.arrived.any()


@pytest.mark.parametrize("columns", [8, 576, 4096, 8192])
@pytest.mark.parametrize("added", [False, True])
def test_the_norm_is_that_of_the_sum(device, columns, added):
    hidden, more, weight = (random(device, 3, columns, seed=seed) for seed in range(3))
    weight = weight[0]
    total = (hidden.float() + more.float()).to(BF16) if added else hidden.clone()
    made = block.sum_norm(hidden, more if added else None, weight, 1e-5)
    assert torch.equal(hidden, total)
    assert snr_db(rms_norm(total, weight, 1e-5), made.float()) > 45


def test_the_gate_is_silu_times_up(device):
    gated, up = random(device, 2, 600), random(device, 2, 600, seed=1)
    wanted = torch.nn.functional.silu(gated.float()) * up.float()
    assert snr_db(wanted, block.gate(gated, up).float()) > 45
