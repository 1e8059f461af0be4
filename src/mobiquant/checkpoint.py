"""The folder on disk: which tensors it holds, checks that they are whole, and writing it whole or not at all.

What: a checkpoint is a Hugging Face folder. `config.json` holds `quantization_config` (`config.Checkpoint`), safetensors files
hold the tensors of `TENSORS` for every quantised layer and all other tensors of the model as they were, `digests.json` a CRC-32
of every tensor, and the tokenizer files lie beside them.

Choice: safetensors alone does not notice a flipped bit in the data. A digest for each tensor rather than for each file lets a
reader who wants the first slices check just what it reads.
"""

import json
import math
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from mobiquant import blocks, pack
from mobiquant.config import QUANT_METHOD, Checkpoint, Format, InputError
from mobiquant.knob import Precision
from mobiquant.linear import MobiLinear, mobilinears

# every tensor of a quantised layer, by the end of its name; e counts slices from 0
TENSORS = {
    "planes_e": "uint8 [b_e, N, ceil(K / 8)], bit planes of slice e, most significant first, eight columns a byte",
    "scale": "float16 [N, G], base step of each group",
    "zero": "uint8 [N, G], zero point in units of 2^(b_1 - 8) base steps",
    "bias": "[N] in the dtype of the model, where the layer has one",
    "router_weight": "int8 [h, K of the input it reads], hidden layer, in the owner of a shared input only, as all of a router",
    "router_next_*": "the same for the router that decides for the first layers of the next block",
    "router_weight_scale": "float16 [h], one step for each row of router_weight",
    "router_rms": "float32 [h], weight of log rms(x)",
    "router_bias": "float32 [h]",
    "router_out": "float32 [E - 1, h]",
    "router_out_bias": "float32 [E - 1]",
}
CONFIG, DIGESTS = "config.json", "digests.json"
_PLANE = re.compile(r"\.planes_(\d+)$")


def build_layers(model: nn.Module, stored: Checkpoint) -> Precision:
    """Put empty quantised layers in the place of the linear layers that the checkpoint lists, wired to one precision."""
    precision, read, form = Precision(stored.format.widths), stored.read_by_routers(), stored.format
    firsts, ahead = stored.firsts, form.routers == "per-block"
    following = dict(zip(firsts, stored.blocks[1:], strict=False))
    columns_of: dict[str, int] = {}
    for place, names in enumerate(stored.inputs):
        for name in names:
            try:
                old = model.get_submodule(name)
            except AttributeError:
                raise InputError(f"the checkpoint lists a layer '{name}' that {type(model).__name__} does not have") from None
            rows, columns = blocks.weight_of(old).shape
            columns_of[name], bias = columns, getattr(old, "bias", None)
            # the router of the first layers of a block lies in the block before, but for the first block
            reads = columns_of[read[name]] if name in read and name not in firsts[1:] else None
            with torch.device(old.weight.device):  # type: ignore[arg-type]
                dtype = None if bias is None else bias.dtype
                layer = MobiLinear(columns, rows, form, reads, dtype, following.get(name))
            blocks.replace(model, name, layer)
            owner: Any = layer if name in read else model.get_submodule(names[0])
            first: Any = model.get_submodule(read[name]) if reads is not None and read[name] != name else None
            layer.attach(precision, owner, place if ahead and place and name in read else None, first)
    return precision


def router_holders(layers: dict[str, MobiLinear], stored: Checkpoint) -> dict[str, tuple[MobiLinear, bool]]:
    """Owner -> the layer that holds its router, and whether as that for the next block."""
    return {
        name: (layers[read], True) if name in stored.firsts[1:] else (layers[name], False)
        for name, read in stored.read_by_routers().items()
    }


def stored_bits(model: nn.Module, form: Format, depth: int | None = None) -> dict[str, float]:
    """Bits in the quantised layers up to a depth: planes, `scale` with zero points, routers, and the number of weights."""
    depth = depth or len(form.slices)
    total = {"weights": 0.0, "planes": 0.0, "scales": 0.0, "routers": 0.0}
    for layer in mobilinears(model).values():
        total["weights"] += layer.in_features * layer.out_features
        for name, tensor in layer.named_buffers():
            plane = _PLANE.search("." + name)
            kind = "planes" if plane else "routers" if name.startswith("router_") else "scales"
            if plane and int(plane.group(1)) < depth:
                # by their shape: on CUDA the layer may hold them in another layout
                shape = pack.plane_shape(layer.out_features, layer.in_features, form.slices[int(plane.group(1))])
                total[kind] += math.prod(shape) * 8
            elif not plane and name != "bias":
                total[kind] += tensor.numel() * tensor.element_size() * 8
    return total


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder; raises InputError where there is none or it is no JSON object."""
    try:
        content = json.loads((folder / CONFIG).read_text())
    except OSError:
        raise InputError(f"folder '{folder}' has no readable {CONFIG}: give the folder of a Hugging Face model") from None
    except ValueError:
        raise InputError(f"'{folder / CONFIG}' is no JSON: the folder is damaged, make or fetch it again") from None
    if not isinstance(content, dict):
        raise InputError(f"'{folder / CONFIG}' is no JSON object: the folder is damaged, make or fetch it again")
    return content


def quantization_of(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The `quantization_config` in the content of a `config.json`; raises InputError where the model is not quantised."""
    found = values.get("quantization_config")
    if not isinstance(found, dict):
        raise InputError(f"'{folder}' is not quantised: make a checkpoint of it with mobiquant quantize")
    return found


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder holds a mobiquant checkpoint of any version."""
    if not (folder / CONFIG).is_file():
        return False
    return (read_config(folder).get("quantization_config") or {}).get("quant_method") == QUANT_METHOD


def truncate(values: dict[str, Any], max_bits: float) -> dict[str, Any]:
    """The `quantization_config` of a load that keeps only the slices of the first `max_bits` bits."""
    stored = Checkpoint.from_dict(values)
    stored.format.check_bits(max_bits)
    return {**values, "slices": list(stored.format.truncated(max_bits).slices)}


def _digest(tensor: torch.Tensor) -> str:
    return f"{zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy()):08x}"


def _tensors(folder: Path, use: Callable[[str], bool]) -> dict[str, str]:
    """Name -> digest of the tensors in the folder for whose names `use` holds; raises InputError on a damaged file."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                found.update({name: _digest(file.get_tensor(name)) for name in file.keys() if use(name)})  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise InputError(f"'{path}' is damaged ({error}): copy or make the checkpoint again") from None
    return found


def write_digests(folder: Path) -> None:
    """Write the digests of all tensors of a finished folder."""
    (folder / DIGESTS).write_text(json.dumps(dict(sorted(_tensors(folder, lambda _: True).items())), indent=1) + "\n")


def verify(folder: Path, depth: int) -> None:
    """Check every tensor that a load of `depth` slices reads; raises InputError naming one that is missing or altered."""

    def wanted(name: str) -> bool:
        plane = _PLANE.search(name)
        return not plane or int(plane.group(1)) < depth

    try:
        expected = json.loads((folder / DIGESTS).read_text())
    except (OSError, ValueError):
        raise InputError(f"'{folder / DIGESTS}' is missing or damaged: copy or make the checkpoint again") from None
    found = _tensors(folder, wanted)
    for name, digest in expected.items():
        if wanted(name) and found.get(name) != digest:
            state = "missing" if name not in found else "not what was written"
            raise InputError(f"tensor '{name}' in '{folder}' is {state}: copy or make the checkpoint again")


def check_output(folder: Path, overwrite: bool) -> None:
    """Raise InputError unless the folder can be written: new, empty, or to be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output '{folder}' is a file: give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise InputError(f"output folder '{folder}' is not empty: give another one, or --overwrite (overwrite=True)")


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Call `write` on a temporary folder beside `folder`, then put it in its place; on any error nothing is changed."""
    folder = folder.absolute()
    missing = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        new = made / "new"
        new.mkdir()
        write(new)
        if folder.exists():
            folder.rename(made / "old")
        try:
            new.rename(folder)
        except BaseException:
            if (made / "old").exists():
                os.rename(made / "old", folder)
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
        if not folder.exists():
            # after a failure, take back the parents made above
            for parent in missing:
                parent.rmdir()
