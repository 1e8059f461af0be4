"""The report of `analysis` as one HTML page that needs no network: plots as inline SVG, tables, and a text coloured by bits."""

import html
import io
import math
from collections.abc import Sequence
from typing import Any

from mobiquant.analysis import Analysis

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
svg { max-width: 100%; height: auto; }
.text { white-space: pre-wrap; line-height: 1.9; } .text span { border-radius: 3px; padding: 1px 0; }
.key span { padding: 2px 10px; margin-right: 4px; border-radius: 3px; }
"""
HEAD = {
    "bits": "read at",
    "kl": "mean KL",
    "median_kl": "median KL",
    "made_by_worst": "made by worst 10 %",
    "worst_also_at_full_depth": "of them worst at full depth",
    "bits_of_worst": "bits of worst",
    "bits_of_others": "bits of others",
    "rank_correlation": "rank correlation",
}


def render(found: Analysis, pieces: Sequence[str], about: dict[str, Any]) -> str:
    """The page; `pieces` are the texts of `found.tokens`, as many as are to be shown coloured, `about` what was measured."""
    widths, bits = [f"{width} bits" for width in found.widths], f"{found.routed.bits:g} bits"
    parts = [
        "<h1>What each token loses, and what it is given</h1>",
        "<p>" + ", ".join(f"{html.escape(k)} <b>{html.escape(str(v))}</b>" for k, v in about.items()) + "</p>",
        "<h2>Errors of tokens</h2>",
        "<p>Divergence from the float model in nats a token. To the right what the worst tenth of the tokens of each width, "
        f"and all others, read at a budget of {bits}, and the rank correlation of error and bits.</p>",
        _table(list(HEAD.values()), [[f"{row[key]:.4g}" for key in HEAD] for row in found.rows()]),
        _curves(found),
        "<h2>Do the worst tokens stay the worst?</h2>",
        "<p>Share of the worst tenth at one width (row) that is in the worst tenth at another (column); 0.1 is chance.</p>",
        _heat(found.overlap().tolist(), widths, "{:.2f}", "worst at", "worst at"),
        "<h2>Ranges for one width, read at another</h2>",
        "<p>Mean divergence with ranges chosen for one width alone (row), read at another (column), rounded to nearest.</p>",
        _heat(found.crossed.tolist(), widths, "{:.3g}", "chosen for", "read at", logarithmic=True),
        "<h2>Bits of each layer</h2>",
        _layers(found),
        f"<h2>Bits of each token, {bits} on average</h2>",
        _coloured(found, pieces),
    ]
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>mobiquant analysis</title><style>{STYLE}</style>"
    return head + "".join(parts) + "</html>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return "<table><tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + f"</tr>{lines}</table>"


def _figure(width: float, height: float) -> tuple[Any, Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # no dates and no random ids: the same analysis gives the same page
    pyplot.rcParams["svg.hashsalt"] = "mobiquant"
    figure, axes = pyplot.subplots(figsize=(width, height))
    return pyplot, figure, axes


def _svg(pyplot: Any, figure: Any) -> str:
    figure.tight_layout()
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return "<p>" + buffer.getvalue()[buffer.getvalue().index("<svg") :] + "</p>"


def _curves(found: Analysis) -> str:
    pyplot, figure, axes = _figure(8, 4)
    for width, row in zip(found.widths, found.divergence, strict=True):
        ordered = row.sort(descending=True).values.clamp_min(1e-7)
        axes.plot([(i + 1) / len(ordered) for i in range(len(ordered))], ordered.tolist(), label=f"{width} bits")
    ordered = found.routed.divergence.sort(descending=True).values.clamp_min(1e-7)
    share = [(i + 1) / len(ordered) for i in range(len(ordered))]
    axes.plot(share, ordered.tolist(), "k--", label=f"routed, {found.routed.bits:g} bits")
    axes.set(xscale="log", yscale="log", xlabel="share of tokens, worst first", ylabel="KL in nats")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    return _svg(pyplot, figure)


def _heat(values: list[list[float]], names: list[str], form: str, rows: str, columns: str, logarithmic: bool = False) -> str:
    pyplot, figure, axes = _figure(5.5, 4.2)
    shown = [[math.log(max(v, 1e-9)) if logarithmic else v for v in row] for row in values]
    image = axes.imshow(shown, cmap="viridis")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            axes.text(
                j, i, form.format(value), ha="center", va="center", color="black" if image.norm(shown[i][j]) > 0.6 else "white"
            )
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel=columns, ylabel=rows)
    return _svg(pyplot, figure)


def _layers(found: Analysis) -> str:
    pyplot, figure, axes = _figure(9, 4)
    kinds: dict[str, list[float]] = {}
    for name, bits in found.routed.by_layer.items():
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append(bits)
    for kind, bits in kinds.items():
        axes.plot(range(len(bits)), bits, marker=".", label=kind)
    axes.set(xlabel="block", ylabel="average bits read")
    axes.grid(True, alpha=0.2)
    axes.legend(ncol=2, fontsize=8)
    return _svg(pyplot, figure)


def _coloured(found: Analysis, pieces: Sequence[str]) -> str:
    bits = found.routed.by_token[: len(pieces)].tolist()
    low, high = float(found.routed.by_token.quantile(0.01)), float(found.routed.by_token.quantile(0.99))

    def colour(value: float) -> str:
        share = min(max((value - low) / max(high - low, 1e-6), 0), 1)
        return f"hsl({220 - 200 * share:.0f} 85% {92 - 17 * share:.0f}%)"

    marks = [low + (high - low) * i / 4 for i in range(5)]
    key = "".join(f'<span style="background:{colour(m)}">{m:.2f}</span>' for m in marks)
    spans = [
        f'<span style="background:{colour(b)}" title="{b:.2f} bits, KL {k:.3f}">{html.escape(piece)}</span>'
        for piece, b, k in zip(pieces, bits, found.routed.divergence.tolist(), strict=False)
    ]
    return f'<p class="key">bits read: {key}</p><p class="text">{"".join(spans)}</p>'
