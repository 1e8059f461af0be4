"""The picture: perplexity over bits read, one panel for each text, ours as lines through one checkpoint."""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import methods
from table import Line, full_name, mean

# above this multiple of the float model nothing is of interest: round to nearest at 2 bits lies orders of magnitude higher
REACH = 12


def draw(found: Sequence[Line], path: Path, title: str) -> None:
    """Write a PNG; a method with several seeds has a band from the smallest to the largest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [line for line in found if not line.error]
    texts = list(good[0].perplexity) if good else []
    figure, panels = pyplot.subplots(1, max(len(texts), 1), figsize=(7.5 * max(len(texts), 1), 5), dpi=150, squeeze=False)
    for panel, text in zip(panels[0], texts, strict=False):
        _panel(panel, good, text)
        panel.set_title(f"{title}, {text}")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _panel(panel, found: Sequence[Line], text: str) -> None:
    others = {peer.label for peer in methods.PEERS.values()}
    best = min(mean(line.perplexity[text]) for line in found)
    marker = cycle("osd^v<>pXP*h")
    for name in dict.fromkeys(full_name(line) for line in found):
        own = sorted((line for line in found if full_name(line) == name), key=lambda line: line.bits or 0)
        if not own[0].read:
            level = mean(own[0].perplexity[text])
            panel.axhline(level, color="black", linestyle=":", label=f"{name} ({level:.2f})")
            continue
        x = [mean(line.read) for line in own]
        values = [line.perplexity[text] for line in own]
        apart = name in others
        drawn = panel.plot(
            x, [mean(v) for v in values], marker=next(marker), label=name,
            linestyle="none" if apart else "-", alpha=0.8 if apart else 1.0, zorder=2 if apart else 3,
        )  # fmt: skip
        if any(len(v) > 1 for v in values):
            panel.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=drawn[0].get_color(), alpha=0.2)
    panel.set_yscale("log")
    panel.set_ylim(best * 0.92, best * REACH)
    # plain numbers: on a short logarithmic axis powers of ten say little
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")
    panel.set_xlabel("bits read of each weight")
    panel.set_ylabel("perplexity")
    panel.grid(True, which="both", alpha=0.25)
    panel.legend(fontsize=7)
