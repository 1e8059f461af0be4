"""From results to lines, and from lines to markdown: a headline by width, every row, failures included, and how it was made."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import exp, log
from pathlib import Path
from typing import Any

import methods

PUBLISHED = Path(__file__).with_name("published.json")
Numbers = tuple[float, ...]
EXPLAINED = (
    "To the line: where a routed budget lies on the first text, against the straight line in log perplexity over bits read "
    "between the fixed depths of the same checkpoint; below it, routing pays. "
    "KL is the mean divergence of the next-token distribution from the float model, in nats. Stored bits count codes, scales, "
    "zero points and routers for each quantised weight. Seconds are those of quantising; ours load the model and write the "
    "checkpoint in them, and one checkpoint is all of its rows. Several seeds are a mean with the smallest and the largest."
)


@dataclass(frozen=True)
class Line:
    """A row of the table; numbers are one for each seed. `bits` is None for the float model and for a failed checkpoint."""

    name: str
    bits: float | None
    routed: bool = False
    own: bool = False
    read: Numbers = ()
    stored: Numbers = ()
    seconds: Numbers = ()
    perplexity: dict[str, Numbers] = field(default_factory=dict)
    kl: dict[str, Numbers] = field(default_factory=dict)
    accuracy: dict[str, Numbers] = field(default_factory=dict)
    error: str | None = None


def lines(results: Sequence[dict[str, Any]]) -> list[Line]:
    """One line for each method, width and way to read it, the seeds of a recipe together; then failures, in their places."""
    order = [methods.FLOAT, *methods.PEERS, *methods.RECIPES]

    def place(result: dict[str, Any]) -> tuple[int, float, int]:
        job = result["made"]["job"]
        known = order.index(job["method"]) if job["method"] in order else len(order)
        return known, job["bits"] or 0, job["seed"]

    groups: dict[tuple[Any, ...], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for result in sorted(results, key=place):
        rows = result["rows"] if not result["error"] else [{"bits": result["made"]["job"]["bits"], "routed": False}]
        for row in rows:
            error = result["error"]
            groups.setdefault((result["label"], bool(row["routed"]), row["bits"], error), []).append((result, row))
    return [_line(*key, found) for key, found in groups.items()]


def _line(
    name: str, routed: bool, bits: float | None, error: str | None, found: list[tuple[dict[str, Any], dict[str, Any]]]
) -> Line:
    own = found[0][0]["made"]["job"]["kind"] in ("recipe", "checkpoint")
    if error:
        return Line(name, bits, own=own, error=error)

    def gather(get: Any) -> Numbers:
        return tuple(value for result, row in found if (value := get(result, row)) is not None)

    texts, tasks = found[0][1]["scores"], found[0][1].get("accuracy", {})
    scores = {
        what: {text: gather(lambda _, row, t=text, w=what: row["scores"][t][w]) for text in texts}
        for what in ("perplexity", "kl")
    }
    return Line(
        name, bits, routed, own,
        gather(lambda _, row: row["bits_read"]),
        gather(lambda result, _: result["stored_bits"]),
        gather(lambda result, _: result["seconds"]),
        scores["perplexity"], scores["kl"],
        {task: gather(lambda _, row, t=task: row.get("accuracy", {}).get(t)) for task in tasks},
    )  # fmt: skip


def mean(numbers: Numbers) -> float:
    """The mean of the seeds."""
    return sum(numbers) / len(numbers)


def shown(numbers: Numbers, digits: str = ".2f") -> str:
    """A mean, and its range where there are several seeds; large numbers by powers of ten, nothing as a dash."""
    if not numbers:
        return "-"

    def one(value: float) -> str:
        return f"{value:.2e}" if abs(value) >= 1e5 else format(value, digits)

    low, high = one(min(numbers)), one(max(numbers))
    return one(mean(numbers)) + (f" ({low} to {high})" if len(numbers) > 1 and low != high else "")


def grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, all columns but the first to the right."""
    ruled = "|---" + "|---:" * (len(head) - 1) + "|"
    return "\n".join(["| " + " | ".join(head) + " |", ruled, *("| " + " | ".join(row) + " |" for row in rows)])


def full_name(line: Line) -> str:
    """The name of a line, with the way it is read where it is ours."""
    return f"{line.name}, {'routed' if line.routed else 'fixed'}" if line.own and not line.error else line.name


def headline(found: Sequence[Line], widths: Sequence[int], text: str) -> str:
    """Perplexity on one text at whole widths, one method a row, one checkpoint or several models said."""
    names = [n for n in dict.fromkeys(full_name(line) for line in found)]
    rows = []
    for name in names:
        own = {line.bits: line for line in found if full_name(line) == name}
        cells = [own.get(width, own.get(None)) for width in widths]
        if None in own and own[None].error is None:
            rows.append([name, "", *[shown(own[None].perplexity[text])] * len(widths)])
        elif any(cells):
            filled = ["-" if c is None else "failed" if c.error else shown(c.perplexity[text]) for c in cells]
            rows.append([name, "one for all" if any(c and c.own for c in cells) else "one for each", *filled])
    return grid(["method", "models", *(f"{width} bits" for width in widths)], rows)


def gain(line: Line, found: Sequence[Line], text: str) -> float | None:
    """Percent by which a routed line lies above (below: negative) the straight line, in the logarithm of perplexity over bits
    read, between the fixed depths of the same checkpoint; None for what is not routed or not between two depths."""
    fixed = [o for o in found if o.name == line.name and o.own and not o.routed and not o.error]
    depths = sorted((mean(o.read), log(mean(o.perplexity[text]))) for o in fixed)
    if not line.routed or line.error:
        return None
    at = mean(line.read)
    for (low, first), (high, last) in pairwise(depths):
        if low <= at <= high:
            return 100 * (mean(line.perplexity[text]) / exp(first + (last - first) * (at - low) / (high - low)) - 1)
    return None


def everything(found: Sequence[Line]) -> str:
    """All lines with all columns."""
    good = next((line for line in found if not line.error), None)
    texts = list(good.perplexity) if good else []
    tasks = list(dict.fromkeys(task for line in found for task in line.accuracy))
    scores = [f"{what} {text}" for text in texts for what in ("perplexity", "KL")]
    head = ["method", "bits asked", "bits read", "stored bits", *(scores or ["perplexity"]), "to the line", "seconds", *tasks]
    rows = []
    for line in found:
        asked = "-" if line.bits is None else f"{line.bits:g}"
        if line.error:
            reason = f"failed: {line.error}".replace("|", "/")
            rows.append([line.name, asked, "-", "-", reason, *["-"] * (len(head) - 5)])
            continue
        cells = [shown(part[text], how) for text in texts for part, how in ((line.perplexity, ".2f"), (line.kl, ".3g"))]
        accuracy = [shown(line.accuracy.get(task, ())) for task in tasks]
        read, stored = shown(line.read, ".3f"), shown(line.stored, ".3f")
        above = gain(line, found, texts[0])
        against = "-" if above is None else f"{above:+.1f} %"
        rows.append([full_name(line), asked, read, stored, *cells, against, shown(line.seconds, ".1f"), *accuracy])
    return grid(head, rows)


def published(model: str) -> dict[str, Any] | None:
    """Figures of papers for a model whose name says which it is."""
    name = re.sub(r"[^a-z0-9.]+", "-", model.lower())
    return next((entry for entry in json.loads(PUBLISHED.read_text()) if entry["match"] in name), None)


def _published(model: str) -> list[str]:
    entry = published(model)
    if entry is None:
        return []
    rows = []
    for row in entry["rows"]:
        cells = ["-" if width not in row else f"{row[width]:g}" for width in ("2", "3", "4")]
        rows.append([row["method"], *cells, "one for all" if row.get("any_precision") else "one for each", row["source"]])
    note = f"WikiText-2 in windows of 2048 tokens where not said otherwise, {entry['model']} in 16 bits: {entry['float']:g}. "
    note += "Each paper has its own calibration, so these stand beside the tables above and not in them."
    return ["## Published figures", note, grid(["method", "2 bits", "3", "4", "models", "figure from"], rows)]


def _calibration(results: Sequence[dict[str, Any]]) -> list[str]:
    """Which methods saw which calibration tokens."""
    seen: dict[tuple[Any, ...], list[str]] = {}
    for result in results:
        tokens = result.get("calibration") or {}
        if tokens:
            seed = result["made"]["job"]["seed"] if result["made"]["job"]["kind"] == "recipe" else None
            label = result["label"] if seed is None else f"{result['label']} (seed {seed})"
            more = tokens.get("trained_on", 0)
            label += f", then trained on windows of all {more} tokens of the text" if more > tokens.get("tokens", 0) else ""
            seen.setdefault((tokens.get("tokens"), tokens.get("crc32")), []).append(label)
    return [
        f"- {count} calibration tokens with CRC-32 {crc}: {', '.join(dict.fromkeys(labels))}."
        for (count, crc), labels in seen.items()
    ]


def markdown(results: Sequence[dict[str, Any]], about: dict[str, Any], widths: Sequence[int], picture: str) -> str:
    """The whole page; `about` holds the model, the command and the shared settings as they can be printed."""
    found = lines(results)
    good = next((result for result in results if not result["error"]), None)
    parts = [f"# Quantisers compared on {about['model']}", f"    {about['command']}"]
    if good:
        texts = list(good["rows"][0]["scores"])
        counts = ", ".join(f"{text} {good['rows'][0]['scores'][text]['windows']}" for text in texts)
        parts.append(
            f"Windows of {about['window']} tokens ({counts}), groups of {about['group_size']} weights, asymmetric codes, "
            f"activations as they are; {good['machine']}, {', '.join(f'{n} {v}' for n, v in _versions(results).items())}."
        )
        parts += [f"## Perplexity on {texts[0]}", headline(found, widths, texts[0])]
        parts.append(f"![perplexity over bits read]({picture})")
    parts += [
        "## All rows",
        EXPLAINED,
        everything(found),
    ]
    parts += _published(about["model"])
    used = {result["made"]["job"]["method"] for result in results}
    how = [f"- {peer.label}: {peer.how}." for name, peer in methods.PEERS.items() if name in used]
    failed = [f"- {result['label']}: tasks failed, {result['task_error']}." for result in results if result.get("task_error")]
    made = [*how, *_calibration(results), *dict.fromkeys(failed)]
    parts += ["## How", "\n".join(made)] if made else []
    return "\n\n".join(parts) + "\n"


def _versions(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    return {name: version for result in results for name, version in (result.get("versions") or {}).items()}
