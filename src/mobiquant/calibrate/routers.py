"""Routers by regression: the score of a slice says how much more than usual a token gains by reading it.

For a token x and the layers that read it, `gain_e = |x D_e^T|^2 - |x D_(e+1)^T|^2` with `D_e = read(q, e) - W`. The target is
the logarithm of the gain, relative to its mean over tokens, minus `GAP` for each slice before. So every layer spends the
budget alike, at any threshold tokens differ by at most about one slice, and where the budget is a width of the format every
token reads that width. Gains compared across layers or slices, by the energy of the output, lost to fixed depths (46 against 36
perplexity at 3 bits, `docs/method.md`): what a layer's output error does to the model is not in them. Where that was measured
(`sensitivity`), its logarithm is added, and the budget goes to the layers that need it.

The first token of a sequence gains little by that measure and is the last that may be read at fewer bits, since all others
attend to it: leaving it alone at 2 bits cost 7 % at 3 (`docs/method.md`). It is fitted to a score above all others.

How: gains are quadratic forms of x, so the hidden layer starts with pairs of directions `+v, -v` in which the gains vary most,
the output layer is solved in closed form, and a few full-batch steps of L-BFGS polish both. No gate can collapse: nothing is
trained through a threshold. On SmolLM2 such a router of 16 units explains 0.8 to 0.9 of the variance of the log gain on
tokens it has not seen; as many steps of Adam left it worse than the closed form.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import mse_loss, silu

from mobiquant import router
from mobiquant.config import Format

STEPS, RIDGE, ITERATIONS = 20, 1e-2, 8
# distance of the slices' mean scores; the scores of one slice spread by about 0.5 over tokens
GAP = 4.0
# tokens of one slice are this many times as far apart as the logarithms of their gains
SPREAD = 1.0
# one part in so many of what a router is fitted to are first tokens
FIRSTS = 16
# first tokens are told from others where their means are this many times as far apart as those of like tokens would be
APART = 4.0


@torch.no_grad()
def targets(
    x: Float[Tensor, "T K"],
    weight: Float[Tensor, "N K"],
    reads: Float[Tensor, "E N K"],
    offset: Float[Tensor, " R"] | None = None,
) -> Float[Tensor, "T R"]:
    """Score wanted of every residual slice for each token: its log gain relative to the slice's mean, `GAP` lower from slice to
    slice, plus the `offset` of each slice."""
    error = torch.stack([_energy(x, read - weight) for read in reads], 1)  # [T, E]
    gain = error[:, :-1] - error[:, 1:]
    # a gain below a thousandth of the usual one is noise
    level = gain.maximum(gain.mean(0).clamp_min(1e-30) * 1e-3).log()
    level = (level - level.mean(0)).mul(SPREAD).clamp(-GAP / 2, GAP / 2)
    return level + _means(level, offset)


def _means(like: Float[Tensor, "T R"], offset: Float[Tensor, " R"] | None) -> Float[Tensor, " R"]:
    """Mean score of each slice, falling."""
    apart = -GAP * torch.arange(like.shape[1], device=like.device)
    return apart if offset is None else (apart + offset.to(like.device)).cummin(0).values


def _energy(x: Float[Tensor, "T K"], matrix: Float[Tensor, "N K"]) -> Float[Tensor, " T"]:
    """`|x M^T|^2` of each token, by way of `M^T M` where that is smaller."""
    if matrix.shape[0] > matrix.shape[1]:
        return ((x @ (matrix.T @ matrix)) * x).sum(1)
    return (x @ matrix.T).square().sum(1)


def fit(x: Float[Tensor, "T K"], target: Float[Tensor, "T R"], firsts: Float[Tensor, "F K"], form: Format) -> router.Router:
    """Router whose scores lie nearest to the targets in the mean square, those of first tokens above all; deterministic."""
    with torch.no_grad():
        f, _ = router.features(x)
        apart = _apart(f, firsts)
        params = _start(f, target, apart, form.router_hidden)
        if apart is not None:
            often = -(-x.shape[0] // (FIRSTS * firsts.shape[0]))
            top = (target.mean(0) + GAP / 2).expand(often * firsts.shape[0], -1)
            x, target = torch.cat([x, firsts.repeat(often, 1)]), torch.cat([target, top])
        f, log_rms = router.features(x)
        # free outputs whose ordered scores are the targets
        steps = (target[:, :-1] - target[:, 1:]).clamp_min(1e-2)
        wanted = torch.cat([target[:, :1], steps + torch.log(-torch.expm1(-steps))], 1)
        out, out_bias = _ridge(silu(_hidden(f, log_rms, *params)), wanted)
    everything = [p.detach().clone().requires_grad_() for p in (*params, out, out_bias)]
    optimizer = torch.optim.LBFGS(everything, max_iter=STEPS, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        error = mse_loss(scores(f, log_rms, *everything), target)
        optimizer.zero_grad()
        error.backward()
        return error

    with torch.enable_grad():
        optimizer.step(loss)
    return router.store(*[p.detach() for p in everything])


def scores(
    f: Float[Tensor, "T K"],
    log_rms: Float[Tensor, "T 1"],
    weight: Tensor,
    rms: Tensor,
    bias: Tensor,
    out: Tensor,
    out_bias: Tensor,
) -> Float[Tensor, "T R"]:
    """As `router.scores`, from features and parameters in training, not yet rounded; differentiable."""
    return router.order(silu(_hidden(f, log_rms, weight, rms, bias)) @ out.T + out_bias)


def _hidden(f: Tensor, log_rms: Tensor, weight: Tensor, rms: Tensor, bias: Tensor) -> Tensor:
    return f @ weight.T + log_rms * rms + bias


def _apart(f: Float[Tensor, "T K"], firsts: Float[Tensor, "F K"]) -> tuple[Float[Tensor, " K"], float] | None:
    """A direction and a bias that put the mean of other tokens at -3 and that of first ones at 3, or None where they are alike.

    They are in the first block, whose inputs do not know their place. The means of F like tokens would be about K / F apart.
    """
    between, variance = router.features(firsts)[0].mean(0) - f.mean(0), f.var(0).clamp_min(1e-4)
    distance = float((between.square() / variance).sum())
    if distance < APART * (1 + f.shape[1] / firsts.shape[0]):
        return None
    along = between / variance * (6 / distance)
    return along, float(-3 - along @ f.mean(0))


def _start(
    f: Float[Tensor, "T K"], target: Float[Tensor, "T R"], apart: tuple[Float[Tensor, " K"], float] | None, hidden: int
) -> tuple[Float[Tensor, "h K"], Float[Tensor, " h"], Float[Tensor, " h"]]:
    """Hidden layer to start from: weights, factors of the log energy, biases. The last unit tells first tokens from others."""
    weight = _directions(f, target, hidden - (apart is not None))
    weight = weight * (2.0 / (f @ weight.T).std(0).clamp_min(1e-6))[:, None]
    none = torch.zeros(hidden, device=f.device)
    if apart is None:
        return weight, none, none.clone()
    along, bias = apart
    return torch.cat([weight, along[None]]), none, torch.cat([none[1:], none.new_tensor([bias])])


def _directions(f: Float[Tensor, "T K"], target: Float[Tensor, "T R"], count: int) -> Float[Tensor, "c K"]:
    """Pairs `+v, -v` of directions in which the second moment of tokens with a high target differs from that of the rest."""
    centred = target.mean(1) - target.mean()
    moment = f.T @ (f * (centred / centred.std().clamp_min(1e-6))[:, None]) / f.shape[0]
    scale = f.square().mean(0).sqrt().clamp_min(1e-4)
    pairs = -(-count // 2)
    direction = (_leading(moment / (scale[:, None] * scale), pairs) / scale[:, None]).T
    return torch.cat([direction, -direction])[:count]


def _leading(matrix: Float[Tensor, "K K"], count: int) -> Float[Tensor, "K c"]:
    """Eigenvectors of a symmetric matrix with the eigenvalues of largest modulus, by subspace iteration."""
    size = min(count + 8, matrix.shape[0])
    start = torch.randn(matrix.shape[0], size, generator=torch.Generator().manual_seed(0)).to(matrix.device)
    basis = torch.linalg.qr(start).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ basis).Q
    values, vectors = torch.linalg.eigh(basis.T @ matrix @ basis)
    best = values.abs().argsort(descending=True)[:count]
    return basis @ vectors[:, best]


def _ridge(z: Float[Tensor, "T h"], wanted: Float[Tensor, "T R"]) -> tuple[Tensor, Tensor]:
    """Output layer [R, h] and bias [R] of least squares."""
    mean_z, mean_w = z.mean(0), wanted.mean(0)
    z, wanted = z - mean_z, wanted - mean_w
    gram = z.T @ z
    gram.diagonal().add_(RIDGE * gram.diagonal().mean() + 1e-12)
    out = torch.linalg.solve(gram, z.T @ wanted).T
    return out, mean_w - out @ mean_z


def explained(score: Float[Tensor, "T R"], target: Float[Tensor, "T R"]) -> float:
    """Share of the variance of the first target over tokens that the scores explain."""
    return 1 - float((score - target)[:, 0].square().mean() / target[:, 0].var().clamp_min(1e-12))
