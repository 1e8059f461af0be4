"""The page, the pictures and the figures of one run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt


def page(found: dict[str, Any], rows: Sequence[Any], bursts: Sequence[Any], name: str) -> str:
    """Markdown of everything that was measured."""
    asked, made = found["lengths"]
    lines = ["# Serving under load", "", f"    {found['command']}", ""]
    lines += [f"{found['machine']}. Requests of {asked} tokens for {made} more, random arrivals by vLLM's own client.", ""]
    heads = ("requests/s", "tokens/s", "first token, s: p50", "p99", "further tokens, ms: p50", "p99", "failed")
    lines += ["| | " + " | ".join(heads) + " |", "|---" + "|---:" * len(heads) + "|"]
    for one in rows:
        lines.append(
            f"| {one.name} | {one.rate:g} | {one.tokens_per_second:.1f} | {one.first[0]:.2f} | {one.first[1]:.2f} | "
            f"{one.per_token[0] * 1e3:.0f} | {one.per_token[1] * 1e3:.0f} | {one.failed} |"
        )
    if bursts:
        about = found["about"]
        bare, kept = about["unloaded"] * 1e3, about["target"] * 1e3
        lines += [
            "",
            f"![tokens and budgets over time]({name}.png)",
            "",
            f"A burst: {about['calm']:g} requests/s, then {about['burst']:.2f}, four times what the ceiling sustains. "
            f"The controller is told to keep {kept:.0f} ms for each token; without load it is {bare:.0f} ms, "
            f"{about['promise']:g} times that {about['promise'] * bare:.0f} ms.",
            "",
        ]
        heads = (
            "p99 of a token in the burst, ms",
            "times the unloaded",
            "burst done after, s",
            "ceiling back after, s",
            "failed",
        )
        lines += ["| | " + " | ".join(heads) + " |", "|---" + "|---:" * len(heads) + "|"]
        for one in bursts:
            back, times = "-" if one.back is None else f"{one.back:.0f}", one.worst / about["unloaded"]
            failed = sum(bool(request.error) for request in one.requests)
            took = one.ended - one.begun
            lines.append(f"| {one.name} | {one.worst * 1e3:.0f} | {times:.2f} | {took:.0f} | {back} | {failed} |")
    return "\n".join(lines) + "\n"


def draw(bursts: Sequence[Any], about: dict[str, float], path: Path) -> None:
    """Requests, budgets and what tokens took over time, the servers in one colour each; dashed what was promised."""
    figure, axes = plt.subplots(3, 1, figsize=(9, 8), sharex=True, constrained_layout=True)
    for number, one in enumerate(bursts):
        colour = f"C{number}"
        until = max(request.end for request in one.requests)
        grid = np.arange(0, until, 0.5)
        inside = [sum(request.start <= at < request.end for request in one.requests) for at in grid]
        axes[0].plot(grid, inside, color=colour, label=one.name)
        if one.budgets:
            axes[1].step(*zip(*one.budgets, strict=True), where="post", color=colour, label=one.name)
        good = [request for request in one.requests if not request.error]
        middles = [(request.start + request.first + request.end) / 2 for request in good]
        axes[2].scatter(middles, [request.per_token * 1e3 for request in good], color=colour, s=12, label=one.name)
    axes[2].axhline(about["promise"] * about["unloaded"] * 1e3, color="grey", linestyle="--", linewidth=1)
    axes[2].axhline(about["unloaded"] * 1e3, color="grey", linestyle=":", linewidth=1)
    for axis, label in zip(axes, ("requests in the server", "average bits", "ms for each token of a request"), strict=True):
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes[0].set_xlim(left=0)
    axes[0].legend()
    axes[2].set_xlabel("seconds")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def write(output: Path, name: str, found: dict[str, Any], rows: Sequence[Any], bursts: Sequence[Any]) -> Path:
    """Write `NAME.md`, `NAME.json`, and `NAME.png` where there was a burst; returns the path of the page."""
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    if bursts:
        draw(bursts, found["about"], output / f"{name}.png")
    made = output / f"{name}.md"
    made.write_text(page(found, rows, bursts, name))
    return made
