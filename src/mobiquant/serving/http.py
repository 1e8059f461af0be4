"""The server's side: budgets of requests, the route of the precision, metrics, and the controller at work.

`Middleware` takes the field `mobiquant` out of a request and puts the budget where the worker finds it. It also goes into the
salt of the prefix cache, so that tokens never see keys and values that were made at another precision. A request without the
field gets the server's budget of the moment for as long as it runs; with `follow` it takes whatever is current instead, which
mixes keys and values of several precisions, and is what makes a change felt at once.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

from mobiquant.config import InputError
from mobiquant.serving import controller
from mobiquant.serving.state import BUCKETS, Budget
from mobiquant.serving.worker import FIELD, read, write

ROUTE = "/v1/mobiquant/precision"
COMPLETIONS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
# seconds between two looks at the counters of the workers, and at vLLM's metrics
POLL, LOOK = 1.0, 0.5
# a server that has made no token for so many seconds is idle
IDLE = 2.0
ENTRIES = {"bits": "a number", "routed": "true or false"}


class Server:
    """What the routes and the middleware of one process share."""

    def __init__(self) -> None:
        self.engine: Any = None
        self.default: Budget | None = None
        self.widths: tuple[int, ...] = ()
        self.follow = False
        self.switches = 0

    async def start(self, engine: Any) -> None:
        """Ask the workers what they serve."""
        self.engine = engine
        told = (await engine.collective_rpc("mobiquant_ask"))[0]
        self.default, self.widths = read(told["default"]), tuple(told["widths"])

    def budget(self, given: Any) -> Budget:
        """A budget from JSON; raises InputError with what is wrong with it."""
        if not isinstance(given, dict):
            raise InputError('the field "mobiquant" is no object: give {"bits": 3}')
        unknown = [name for name in given if name not in ENTRIES]
        if unknown:
            raise InputError(f"the field '{unknown[0]}' is unknown: give {', '.join(ENTRIES)}")
        bits, routed = given.get("bits"), given.get("routed", True)
        if isinstance(bits, bool) or not isinstance(bits, int | float):
            raise InputError(f"bits of {bits!r} are no number: give one from {self.widths[0]} to {self.widths[-1]}")
        if not isinstance(routed, bool):
            raise InputError(f"routed is {routed!r}: give true or false")
        if not self.widths[0] <= bits <= self.widths[-1]:
            raise InputError(f"{bits:g} bits cannot be read: this model reads from {self.widths[0]} to {self.widths[-1]} bits")
        if not routed and bits not in self.widths:
            raise InputError(f"no prefix has {bits:g} bits: fixed widths are {', '.join(map(str, self.widths))}")
        return Budget(float(bits), routed)

    async def set(self, wanted: Budget) -> None:
        """Change the budget of all workers."""
        await self.engine.collective_rpc("mobiquant_tell", args=(write(wanted),))
        self.switches += wanted != self.default
        self.default = wanted

    def stamp(self, body: dict[str, Any]) -> None:
        """Put the budget of a request where the worker and the prefix cache find it; raises InputError."""
        given = body.pop(FIELD, None)
        if given is None and self.follow:
            return
        wanted = self.default if given is None else self.budget(given)
        assert wanted is not None
        body["vllm_xargs"] = {**(body.get("vllm_xargs") or {}), FIELD: write(wanted)}
        body["cache_salt"] = f"{body.get('cache_salt') or ''}|{FIELD}:{write(wanted)}"


SERVER = Server()
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


def refusal(error: InputError) -> bytes:
    """An error in the form that OpenAI's clients read."""
    return json.dumps({"error": {"message": str(error), "type": "BadRequestError", "param": FIELD, "code": 400}}).encode()


class Middleware:
    """Rewrites the bodies of requests for text: `--middleware mobiquant.serving.http.Middleware`."""

    def __init__(self, app: Callable[..., Awaitable[None]]):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in COMPLETIONS or not SERVER.widths:
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        try:
            content = json.loads(body)
            if isinstance(content, dict):
                SERVER.stamp(content)
                body = json.dumps(content).encode()
        except InputError as error:
            said = refusal(error)
            head = [(b"content-type", b"application/json"), (b"content-length", str(len(said)).encode())]
            await send({"type": "http.response.start", "status": 400, "headers": head})
            await send({"type": "http.response.body", "body": said})
            return
        except ValueError:
            # no JSON: vLLM says so
            pass
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> dict[str, Any]:
            return given.pop() if given else await receive()

        await self.app(scope, again, send)


class Metrics:
    """Prometheus metrics from the counters of the workers."""

    def __init__(self) -> None:
        from prometheus_client import Counter, Gauge  # pyright: ignore[reportMissingImports] -- comes with vLLM

        self.bits = Gauge("mobiquant_bits_read", "Average bits of a weight that a token read since the last look")
        self.budget = Gauge("mobiquant_budget_bits", "Average bits that requests without a field get")
        self.tokens = Counter("mobiquant_tokens", "Tokens by the bits of a weight that they read on average", ["bits"])
        self.switches = Counter("mobiquant_switches", "Changes of the server's budget")
        self.before: dict[str, list[float]] = {}
        self.counted = 0

    def take(self, told: dict[str, Any]) -> None:
        """What workers have counted by now, in sum."""
        before = self.before or {key: [0.0] * len(told[key]) for key in ("weights", "tokens")}
        new = {key: [b - a for a, b in zip(before[key], told[key], strict=True)] for key in before}
        if total := sum(new["weights"]):
            self.bits.set(sum(n * width for n, width in zip(new["weights"], told["widths"], strict=True)) / total)
        for place, count in enumerate(new["tokens"]):
            if count > 0:
                self.tokens.labels(f"{place * BUCKETS:g}").inc(count)
        self.before = {key: told[key] for key in before}
        self.switches.inc(SERVER.switches - self.counted)
        self.counted = SERVER.switches
        if SERVER.default is not None:
            self.budget.set(SERVER.default.bits)


class Plugin:
    """Routes for vLLM's OpenAI server; named in the group `vllm.endpoint_plugins`."""

    name = FIELD
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """`GET` and `PUT` of the server's budget."""
        from fastapi import Request  # pyright: ignore[reportMissingImports]
        from fastapi.responses import JSONResponse  # pyright: ignore[reportMissingImports]

        def current() -> dict[str, Any]:
            default = SERVER.default
            return {} if default is None else {"bits": default.bits, "routed": default.routed, "widths": list(SERVER.widths)}

        async def show() -> Any:
            return JSONResponse(current())

        async def change(request: Request) -> Any:
            try:
                await SERVER.set(SERVER.budget(await request.json()))
            except InputError as error:
                return JSONResponse(json.loads(refusal(error)), status_code=400)
            except ValueError:
                return JSONResponse(json.loads(refusal(InputError('the body is no JSON: give {"bits": 3}'))), status_code=400)
            return JSONResponse(current())

        # annotations in a function are strings that FastAPI cannot look up
        change.__annotations__["request"] = Request
        app.add_api_route(ROUTE, show, methods=["GET"])
        app.add_api_route(ROUTE, change, methods=["PUT"])

    async def init_state(self, engine: Any, state: Any, args: Any) -> None:
        """Ask the workers, and look at their counters from then on."""
        if engine is None:
            return
        await SERVER.start(engine)
        given = (getattr(args, "additional_config", None) or {}).get(FIELD, {})
        SERVER.follow = bool(given.get("follow"))
        # kept, or they would be collected while they run
        state.mobiquant = [asyncio.create_task(watch(Metrics()))]
        if "goal" in given:
            state.mobiquant.append(asyncio.create_task(control(goal_of(given, SERVER.widths))))


async def watch(metrics: Metrics) -> None:
    """Look at the counters of the workers every `POLL` seconds, as long as the engine lives."""
    while True:
        await asyncio.sleep(POLL)
        # the first worker has all tokens: with tensor parallelism every one sees them all
        metrics.take((await SERVER.engine.collective_rpc("mobiquant_ask"))[0])


def goal_of(given: dict[str, Any], widths: tuple[int, ...]) -> controller.Goal:
    """What `mobiquant serve` was asked to keep; raises InputError where it cannot be."""
    floor, ceiling = float(given.get("floor", widths[0])), float(given.get("ceiling", widths[-1]))
    if not widths[0] <= floor < ceiling <= widths[-1]:
        raise InputError(f"{floor:g} to {ceiling:g} bits is no range of this model: it reads from {widths[0]} to {widths[-1]}")
    return controller.Goal(given["goal"], float(given["target"]), floor, ceiling)


class Observed:
    """One number of vLLM's own metrics, since the last look: a mean of seconds, or how many requests wait."""

    HISTOGRAMS: ClassVar = {"per_token": "vllm:inter_token_latency_seconds", "first_token": "vllm:time_to_first_token_seconds"}
    WAITING, TOKENS = "vllm:num_requests_waiting", ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")

    def __init__(self, metric: str):
        self.metric, self.before, self.tokens, self.active = metric, (0.0, 0.0), 0.0, float("-inf")

    def look(self, now: float, samples: dict[str, float]) -> float | None:
        """The number; None where the server is idle, nan where it works and nothing was measured.

        How many requests run is not asked: vLLM says that of its last step, and an idle server makes none.
        """
        tokens, waiting = sum(samples.get(name, 0.0) for name in self.TOKENS), samples.get(self.WAITING, 0.0)
        if tokens != self.tokens:
            self.tokens, self.active = tokens, now
        if self.metric == "queue":
            return waiting if now - self.active < IDLE else None
        name = self.HISTOGRAMS[self.metric]
        after = samples.get(f"{name}_sum", 0.0), samples.get(f"{name}_count", 0.0)
        mean = controller.mean_since(self.before, after)
        self.before = after
        return float("nan") if mean is None and now - self.active < IDLE else mean


def samples() -> dict[str, float]:
    """vLLM's metrics of this process by name, those of several engines added up."""
    from prometheus_client import REGISTRY  # pyright: ignore[reportMissingImports]

    found: dict[str, float] = {}
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


async def control(goal: controller.Goal) -> None:
    """Move the server's budget as the controller says, every `LOOK` seconds."""
    memory, observed = controller.start(goal, time.monotonic()), Observed(goal.metric)
    observed.look(time.monotonic(), samples())
    await SERVER.set(Budget(memory.bits))
    while True:
        await asyncio.sleep(LOOK)
        now = time.monotonic()
        memory = controller.step(goal, memory, now, observed.look(now, samples()))
        if SERVER.default != Budget(memory.bits):
            await SERVER.set(Budget(memory.bits))
