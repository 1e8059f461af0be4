"""Calibration and evaluation text: from a name or a file to windows of tokens.

Names: `builtin` (the prose of Python's own documentation, in every Python), `wikitext2`, `c4`, `ptb` (through the optional
`datasets` package), a `.txt` file, a `.jsonl` file with a `text` field on each line, or `wikitext2:FILE` for a local copy of
a raw WikiText file. Each name has two parts that share no paragraph: `calibrate` and `measure`. A file is one text, and the
same for both.
"""

import io
import json
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from mobiquant.config import InputError

Part = Literal["calibrate", "measure"]
# every fifth topic of the built-in text is kept for measuring
BUILTIN_MEASURE = 5
NAMES = "builtin, wikitext2, c4, ptb, a .txt or a .jsonl file"


def load_text(name: str, part: Part) -> str:
    """The text of a name or file; raises InputError where there is none."""
    if name == "builtin":
        text = _builtin(part)
    elif name in ("wikitext2", "c4", "ptb"):
        text = _from_datasets(name, part)
    elif name.startswith("wikitext2:"):
        text = _wikitext(list(io.StringIO(_read(Path(name.partition(":")[2])))))
    elif name.endswith((".txt", ".jsonl")):
        text = _read(Path(name))
        text = _from_jsonl(text, name) if name.endswith(".jsonl") else text
    else:
        raise InputError(f"text '{name}' is unknown: give {NAMES}")
    if not text.strip():
        raise InputError(f"text '{name}' is empty: give {NAMES} with some content")
    return text


def _builtin(part: Part) -> str:
    from pydoc_data.topics import topics

    documents = [topics[key] for key in sorted(topics)]
    measured = "\n\n".join(documents[::BUILTIN_MEASURE])
    if part == "measure":
        return measured
    # topics quote each other at length: what is measured must not have been calibrated with
    seen = set(measured.split("\n\n"))
    rest = "\n\n".join(text for i, text in enumerate(documents) if i % BUILTIN_MEASURE)
    return "\n\n".join(paragraph for paragraph in rest.split("\n\n") if paragraph not in seen)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"text file '{path}' cannot be read ({error.strerror}): give {NAMES}") from None
    except UnicodeDecodeError:
        raise InputError(f"text file '{path}' is not UTF-8 text: give {NAMES}") from None


def _from_jsonl(content: str, name: str) -> str:
    documents: list[str] = []
    # splitlines would also split at separators that are legal inside a JSON string
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            found = None
        document = found.get("text") if isinstance(found, dict) else None
        if not isinstance(document, str):
            raise InputError(f"line {number} of '{name}' is no JSON object with a text in its 'text' field: give one a line")
        documents.append(document)
    return "\n\n".join(documents)


def _wikitext(lines: list[str]) -> str:
    """Lines joined as perplexities on WikiText are usually reported: two newlines between lines, blank lines empty."""
    return "\n\n".join("" if not line.strip() else line for line in lines)


def _from_datasets(name: str, part: Part) -> str:
    try:
        import datasets  # pyright: ignore[reportMissingImports] -- an extra
    except ImportError:
        raise InputError(
            f"text '{name}' needs the datasets package: pip install 'mobiquant[datasets]', or use builtin"
        ) from None
    try:
        if name == "wikitext2":
            split = {"calibrate": "train", "measure": "test"}[part]
            return _wikitext(datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"])
        if name == "ptb":
            split = {"calibrate": "train", "measure": "test"}[part]
            rows = datasets.load_dataset("ptb-text-only/ptb_text_only", revision="refs/convert/parquet", split=split)
            return " ".join(rows["sentence"])
        split = {"calibrate": "train", "measure": "validation"}[part]
        stream = datasets.load_dataset("allenai/c4", "en", split=split, streaming=True)
        return "\n\n".join(row["text"] for row in stream.take(4000))
    # the package raises what its network and file layers raise; no narrower class covers them
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"text '{name}' could not be fetched ({reason}): check the network, or use builtin or a file"
        ) from error


def windows(text: str, tokenizer: Any, length: int, name: str) -> Int[Tensor, "S L"]:
    """All non-overlapping windows of `length` tokens; the rest of the text is dropped."""
    if length < 1:
        raise InputError(f"windows of {length} tokens cannot be made: give a --sequence-length of 2 or more")
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    count = ids.numel() // length
    if not count:
        raise InputError(
            f"text '{name}' has {ids.numel()} tokens, fewer than one window of {length}: "
            f"give a longer text or a shorter --sequence-length"
        )
    return ids[: count * length].view(count, length)


def windows_of_all(texts: dict[str, str], tokenizer: Any, length: int) -> Int[Tensor, "S L"]:
    """The windows of several texts by name, one text after the other."""
    return torch.cat([windows(text, tokenizer, length, name) for name, text in texts.items()])


def sample(every: Int[Tensor, "S L"], samples: int, seed: int) -> Int[Tensor, "M L"]:
    """Windows drawn without replacement in the order of the text; all of them where there are not more than asked for."""
    if every.shape[0] <= samples:
        return every
    generator = torch.Generator().manual_seed(seed)
    return every[torch.randperm(every.shape[0], generator=generator)[:samples].sort().values]
