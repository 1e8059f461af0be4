"""The page, the picture and the figures of one run."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from layers import Row
from whole import Speed

# measured before on the same kind of GPU with the same harness: all linear layers of LLaMA-2-7B, one token, one graph, tokens/s
BEFORE = {"Any-Precision LLM": {2: 598, 3: 512, 4: 394}, "AnyBCQ": {2: 618, 3: 504, 4: 411}}


def page(found: dict[str, Any], rows: list[Row], speeds: list[Speed], command: str) -> str:
    """Markdown of everything that was measured."""
    machine, copy = found["machine"], found["copy"]
    lines = [
        f"# GPU kernels on {machine.get('device', 'a CPU')}", "", f"    {command}", "",
        ", ".join(f"{name} {value}" for name, value in machine.items())
        + f". A copy moves {copy / 1e9:.0f} GB/s, read and written bytes counted.",
        f"All linear layers of {found['model']}, every block with weights of its own, medians over replays of one CUDA graph, "
        f"activations in bf16, groups of 128, slices 2,1,1,2,2, routers {found['routers']}.", "",
        "| | tokens | bits read | deepest | microseconds | tokens/s | to bf16 | GB | % of the copy |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    plain = {row.tokens: row.microseconds for row in rows if row.name.startswith("bf16")}
    for row in rows:
        speed, beside = row.tokens * 1e6 / row.microseconds, plain.get(row.tokens)
        ratio = "-" if beside is None else f"{beside / row.microseconds:.2f}"
        share = row.bytes * 1e8 / row.microseconds / copy
        bits, deepest = (f"{value:.2f}" if value is not None else "-" for value in (row.bits, row.deepest))
        lines.append(
            f"| {row.name} | {row.tokens} | {bits} | {deepest} | {row.microseconds:.0f} | {speed:.0f} | {ratio} | "
            f"{row.bytes / 1e9:.2f} | {share:.0f} |"
        )
    lines += ["", *routing(rows)]
    if found["model"] == "llama-2-7b":
        before = "; ".join(
            f"{name} {', '.join(f'{speed} at {bits}' for bits, speed in own.items())}" for name, own in BEFORE.items()
        )
        said = "Tokens/s of other any-precision kernels for one token, measured before on an H200 in a harness like this"
        lines += ["", f"{said}: {before} bits."]
    if speeds:
        lines += ["", f"One stream of {found['whole']}, random weights, the whole step as one graph:", ""]
        lines += ["| | tokens/s | to bf16 | GB of weights | linear layers | to bf16 |", "|---|---:|---:|---:|---:|---:|"]
        first = speeds[0]
        for one in speeds:
            lines.append(
                f"| {one.name} | {one.tokens_per_second:.1f} | {one.tokens_per_second / first.tokens_per_second:.2f} | "
                f"{one.resident / 1e9:.2f} | {one.linears / 1e9:.2f} | {one.linears / first.linears:.3f} |"
            )
    return "\n".join(lines) + "\n"


def routing(rows: list[Row]) -> list[str]:
    """What deciding costs: the same width with routers and without."""
    plain = {(row.tokens, row.bits): row.microseconds for row in rows if row.name == "fixed"}
    costs = [
        f"{row.bits:g} bits, {row.tokens} tokens: {100 * (row.microseconds / plain[row.tokens, row.bits] - 1):+.1f} %"
        for row in rows
        if row.name.endswith("with routers") and (row.tokens, row.bits) in plain
    ]
    return ["Routing, by the same width with routers and without: " + "; ".join(costs) + "."] if costs else []


def write(folder: Path, name: str, found: dict[str, Any], rows: list[Row], speeds: list[Speed], command: str) -> Path:
    """Write NAME.md, NAME.json and NAME.png; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = {**found, "rows": [asdict(row) for row in rows], "whole_rows": [asdict(one) for one in speeds]}
    (folder / f"{name}.json").write_text(json.dumps(everything, indent=1) + "\n")
    text = page(found, rows, speeds, command) + f"\n![time over tokens, and bytes over time]({name}.png)\n"
    (folder / f"{name}.md").write_text(text)
    draw(folder / f"{name}.png", found, rows)
    return folder / f"{name}.md"


def draw(path: Path, found: dict[str, Any], rows: list[Row]) -> None:
    """Time over tokens for each width, and the bytes that a second moves beside what a copy moves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(14, 5), dpi=150)
    series = dict.fromkeys((row.name, row.bits if row.name == "fixed" else None) for row in rows)
    for i, (name, bits) in enumerate(series):
        own = sorted((r for r in rows if r.name == name and (bits is None or r.bits == bits)), key=lambda r: r.tokens)
        how = {"label": name if bits is None else f"{bits:g} bits", "color": f"C{i}"}
        if name == "fixed" or name.startswith(("bf16", "int4", "mixed")):
            left.plot([r.tokens for r in own], [r.microseconds / 1e3 for r in own], marker="o", **how)
        few = [r for r in own if r.tokens <= 16]
        if few:
            right.plot([r.bytes / 1e9 for r in few], [r.microseconds / 1e3 for r in few], "o", **how)
    most = max((row.bytes for row in rows), default=1.0)
    right.plot([0, most / 1e9], [0, most / found["copy"] * 1e3], "k:", label="speed of a copy")
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xticks(sorted({row.tokens for row in rows}))
    left.xaxis.set_major_formatter("{x:g}")
    left.set_xlabel("tokens")
    right.set_xlabel("GB of weights read")
    for panel in (left, right):
        panel.set_ylabel("milliseconds for all linear layers")
        panel.grid(True, which="both", alpha=0.25)
        panel.legend(fontsize=7)
    figure.suptitle(f"{found['model']} on {found['machine'].get('device', 'a CPU')}")
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
