"""Passes of end-to-end training: the float model predicts a batch, the student learns it at one depth after another.

What: `teach` sets the next-token distributions that are wanted, `learn` adds the gradients of one depth. The loss of a depth is
`KL(float || student)^p / p`, its logarithm for p = 0: depths of few bits diverge a hundred times more than those of many, and
with p = 1 they would own the code.

How: launching the small operations of a model costs more than doing them, so on CUDA a pass is captured once as a graph and
replayed: depths lie in device memory. Models look at values while they build attention masks, which cannot be captured: blocks
are given the arguments that an ordinary pass gave them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from mobiquant import blocks, kernels
from mobiquant.calibrate.latent import Depth, LatentLinear
from mobiquant.config import Format

WARM_UP = 2


@dataclass(frozen=True)
class Pair:
    """A quantised model in training beside the float model, and the blocks of both, which lie at `root`."""

    student: PreTrainedModel
    teacher: PreTrainedModel
    root: str
    stack: nn.ModuleList
    originals: nn.ModuleList

    @classmethod
    def of(cls, student: PreTrainedModel, teacher: PreTrainedModel) -> "Pair":
        """The pair of two models of one architecture."""
        root, originals = blocks.find_blocks(teacher)
        return cls(student, teacher, root, student.get_submodule(root), originals)  # type: ignore[arg-type]


def divergence(made: Float[Tensor, "T V"], wanted: Float[Tensor, "T V"]) -> Float[Tensor, " T"]:
    """`KL(wanted || made)` of each token in nats, fp32, from logits; differentiable by `made`."""
    if kernels.usable(made):
        from mobiquant.kernels.divergence import Divergence

        return Divergence.apply(made, wanted)  # type: ignore[return-value]
    ours, theirs = made.float().log_softmax(-1), wanted.float().log_softmax(-1)
    return kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def powered(mean: Float[Tensor, "*S"], power: float) -> Float[Tensor, "*S"]:
    """What enters the loss of a divergence: `mean^power / power`, its logarithm at 0."""
    # bf16 may make the divergence of equal models negative
    kept = mean.clamp_min(1e-6)
    return kept.pow(power) / power if power else kept.log()


class Passes:
    """Passes run as they are; gradients are added to the `.grad` of whatever of the student requires them."""

    def __init__(self, pair: Pair, depth: Depth, power: float):
        self.student, self.teacher, self.depth, self.power = pair.student, pair.teacher, depth, power
        self.wanted: Tensor = torch.empty(0)

    @torch.no_grad()
    def teach(self, tokens: Int[Tensor, "S L"]) -> None:
        """Predict a batch with the float model."""
        self.tokens = tokens
        with blocks.lower(tokens.device):
            logits = self.teacher(tokens, use_cache=False).logits
        self.wanted = logits.flatten(0, 1)

    @torch.enable_grad()
    def learn(self, depth: int | Sequence[int]) -> Float[Tensor, ""]:
        """Add the gradients of the batch read at a depth, or at one for each place; returns the divergence in nats a token."""
        self.depth.value = depth
        with blocks.lower(self.tokens.device):
            logits = self.student(self.tokens, use_cache=False).logits
        mean = divergence(logits.flatten(0, 1), self.wanted).mean()
        powered(mean, self.power).backward()
        return mean.detach()


class Replayed:
    """Work on CUDA that is captured as a graph when it is first done and replayed from then on.

    What it reads must stay in place. It may add gradients to `parameters`, whose `.grad` must be there and stay in place.
    """

    def __init__(self, work: Callable[[], Any], parameters: Sequence[Tensor] = (), pool: Any = None):
        self.work, self.parameters, self.pool = work, parameters, pool
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> Any:
        """Do the work; returns what it made, which the next time overwrites."""
        self.prepare()
        self.graph.replay()  # type: ignore[union-attr]
        return self.made

    def prepare(self) -> None:
        """Capture the graph, if that is not done; the work is done a few times then, gradients are put back."""
        if self.graph is None:
            self.graph = self._capture()

    def _capture(self) -> torch.cuda.CUDAGraph:
        kept = [(p, p.grad.clone()) for p in self.parameters if p.grad is not None]
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP):
                self.work()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.made = self.work()
        for parameter, gradient in kept:
            parameter.grad.copy_(gradient)  # type: ignore[union-attr]
        return graph


class CapturedPasses(Passes):
    """Passes on CUDA replayed as graphs, for batches of one shape; `.grad` of the student must be there and stay in place."""

    def __init__(self, pair: Pair, depth: Depth, power: float, tokens: Int[Tensor, "S L"], form: Format):
        super().__init__(pair, depth, power)
        self.tokens, self.form, pool = tokens.clone(), form, torch.cuda.graph_pool_handle()
        self.predict = Replayed(lambda: super(CapturedPasses, self).teach(self.tokens), pool=pool)
        parameters = [p for p in self.student.parameters() if p.grad is not None]
        self.step = Replayed(lambda: super(CapturedPasses, self).learn(depth.value), parameters, pool)
        depth.hold((one for one in pair.student.modules() if isinstance(one, LatentLinear)), tokens.device)

    @torch.no_grad()
    def teach(self, tokens: Int[Tensor, "S L"]) -> None:
        """As `Passes.teach`."""
        self.tokens.copy_(tokens)
        self.predict()

    def learn(self, depth: int | Sequence[int]) -> Float[Tensor, ""]:
        """As `Passes.learn`."""
        self.depth.value = depth
        self.depth.fill(self.form)
        return self.step().clone()


@contextmanager
def steady(model: nn.Module, stack: nn.ModuleList, tokens: Int[Tensor, "S L"], fused: bool = False) -> Iterator[None]:
    """While open, the blocks `stack` of `model` get the arguments that an ordinary pass over `tokens` gives them.

    `fused` blocks are compiled: all of a kind share one code.
    """
    originals = [block.forward for block in stack]
    ready = [torch.compile(forward, dynamic=False) for forward in originals] if fused else originals
    held: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def recording(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            held[index] = args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}
            return originals[index](*args, **kwargs)

        return forward

    def steadied(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            return ready[index](hidden, *held[index][0], **held[index][1])

        return forward

    try:
        for index, block in enumerate(stack):
            block.forward = recording(index)
        with torch.no_grad(), blocks.lower(tokens.device):
            model(tokens, use_cache=False)
        for index, block in enumerate(stack):
            block.forward = steadied(index)
        yield
    finally:
        blocks.restore_forward(stack)
