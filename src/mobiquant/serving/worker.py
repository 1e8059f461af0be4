"""What a worker of vLLM does besides computing: the budget of each request reaches its tokens, and the server can ask and tell.

vLLM has no hook between scheduling a batch and running it, so the methods that lay out a batch are wrapped, those of both
model runners. A request carries its budget in its sampling parameters (`extra_args`, set by `http`); one that carries none
follows the default of the worker, also while it runs.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from mobiquant.config import QUANT_METHOD, InputError
from mobiquant.serving.state import Budget, State

# in the extra arguments of a request: "3" for 3 bits on average, "=3" for exactly 3
FIELD = QUANT_METHOD


def write(wanted: Budget) -> str:
    """A budget as it travels with a request."""
    return f"{'' if wanted.routed else '='}{wanted.bits:g}"


def read(text: str) -> Budget:
    """Back from `write`; raises InputError on anything else."""
    try:
        return Budget(float(text.removeprefix("=")), not text.startswith("="))
    except ValueError:
        raise InputError(f"'{text}' is no budget: give a number of bits, such as 3, or =3 for exactly 3") from None


class Requests:
    """Budgets of the requests that are running, by the id that the scheduler gives them."""

    def __init__(self, state: State):
        self.state = state
        self.budgets: dict[str, Budget | None] = {}

    def follow(self, scheduled: Any) -> None:
        """Take in what the scheduler says: requests that are new and requests that have ended."""
        for name in scheduled.finished_req_ids:
            self.budgets.pop(name, None)
        for new in scheduled.scheduled_new_reqs:
            given = (getattr(new.sampling_params, "extra_args", None) or {}).get(FIELD)
            self.budgets[new.req_id] = None if given is None else read(str(given))

    def lay_out(self, names: Iterable[str], counts: Iterable[int]) -> None:
        """Fill thresholds and caps for a batch: so many tokens of each request, in this order."""
        runs = [(int(count), self.budgets.get(name) or self.state.default) for name, count in zip(names, counts, strict=False)]
        self.state.fill(runs)


def install(state: State) -> None:
    """Wrap the model runners of this process and give its worker the methods that `http` calls; done once."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # pyright: ignore[reportMissingImports]
    from vllm.v1.worker.worker_base import WorkerBase  # pyright: ignore[reportMissingImports]

    requests = Requests(state)

    def before(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def prepare(self: Any, scheduled: Any, counts: Any, *rest: Any, **more: Any) -> Any:
            requests.follow(scheduled)
            requests.lay_out(self.input_batch.req_ids, counts)
            return original(self, scheduled, counts, *rest, **more)

        return prepare

    def after(original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def prepare(self: Any, scheduled: Any, *rest: Any, **more: Any) -> Any:
            batch = original(self, scheduled, *rest, **more)
            requests.follow(scheduled)
            requests.lay_out(batch.req_ids, batch.num_scheduled_tokens)
            return batch

        return prepare

    GPUModelRunner._prepare_inputs = before(GPUModelRunner._prepare_inputs)
    try:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner as Second  # pyright: ignore[reportMissingImports]
    except ImportError:
        # it needs Triton, and without that vLLM takes the first
        pass
    else:
        Second.prepare_inputs = after(Second.prepare_inputs)

    def tell(_: Any, text: str) -> None:
        state.set_default(read(text))

    def ask(_: Any) -> dict[str, Any]:
        return {**state.counts(), "default": write(state.default), "widths": list(state.stored.format.widths)}

    WorkerBase.mobiquant_tell, WorkerBase.mobiquant_ask = tell, ask
