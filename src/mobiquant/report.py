"""The picture of what each bit buys."""

from pathlib import Path
from typing import Any


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """PNG of perplexity over average bits read, one line for each name; rows without bits are horizontal lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), dpi=150)
    names = list(dict.fromkeys(row["name"] for row in rows))
    best = min(row["perplexity"] for row in rows)
    for name, marker in zip(names, "osd^v<>", strict=False):
        own = [row for row in rows if row["name"] == name]
        if own[0]["bits_read"] is None:
            axes.axhline(own[0]["perplexity"], color="black", linestyle=":", label=f"{name} ({own[0]['perplexity']:.2f})")
            continue
        points = sorted((row["bits_read"], row["perplexity"]) for row in own)
        axes.plot(*zip(*points, strict=True), marker=marker, label=name)
        below = 5 if name == names[-1] else -10
        for x, y in points:
            if y < best * 30:
                axes.annotate(f"{y:.1f}", (x, y), textcoords="offset points", xytext=(4, below), fontsize=7)
    axes.set_yscale("log")
    # round-to-nearest at 2 bits lies orders of magnitude above everything of interest
    axes.set_ylim(best * 0.85, best * 30)
    axes.set_xlabel("average bits read of each weight")
    axes.set_ylabel("perplexity")
    axes.set_title(title)
    axes.grid(True, which="both", alpha=0.25)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
