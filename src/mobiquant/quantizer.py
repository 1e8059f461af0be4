"""The quantiser that transformers calls for a mobiquant folder, and the saving of a quantised model.

Registered as soon as both packages are imported (`_register.py`). Only those hooks of transformers' quantiser are used that
kept their signature from 5.17 to 5.23; a saved model is written whole or not at all, its tokenizer beside it.
"""

import json
import shutil
from copy import copy
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mobiquant import blocks, checkpoint
from mobiquant.config import QUANT_METHOD, Checkpoint, InputError
from mobiquant.linear import mobilinears
from mobiquant.slices import MAX_BITS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINING_LOG = "training_log.json"
LOADING = ("is_local", "local_files_only")


@register_quantization_config(QUANT_METHOD)
class MobiquantConfig(QuantizationConfigMixin):
    """`config.Checkpoint` in the dress that transformers wants."""

    def __init__(self, **values: Any):
        self.quant_method = QUANT_METHOD
        self.stored = Checkpoint.from_dict({"quant_method": QUANT_METHOD, **values})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON for `config.json`."""
        return self.stored.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as `to_dict`: nothing is left to defaults."""
        return self.to_dict()


@register_quantizer(QUANT_METHOD)
class MobiquantQuantizer(HfQuantizer):
    """Builds quantised layers before transformers loads the tensors of a mobiquant folder."""

    # quantising needs calibration text: a float model with this config is refused by transformers
    requires_calibration = True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is needed but torch."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        stored = self.quantization_config.stored  # type: ignore[attr-defined]
        checkpoint.build_layers(model, stored)
        for layer in mobilinears(model).values():
            # GPT-2 sets the weights of some layers anew unless they are marked as loaded, and so needs one to look at
            layer.weight = torch.empty(0)  # type: ignore[assignment]
            layer.weight._is_hf_initialized = True  # type: ignore[attr-defined]
        # planes of slices that are not loaded stay on the disk without a warning
        skipped = {rf"\.planes_{e}$" for e in range(len(stored.format.slices), MAX_BITS)}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *skipped}  # type: ignore

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for layer in mobilinears(model).values():
            del layer.weight
        _adopt(model, self)
        return model

    def is_serializable(self) -> bool:
        """Saved as it is loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes cannot be trained."""
        return False

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, layer in mobilinears(model).items():
            dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, layer.scale.device, dtype)
            weight = layer.packed().read(len(layer.format.slices))
            dense.load_state_dict({"weight": weight} | ({} if layer.bias is None else {"bias": layer.bias}))
            blocks.replace(model, name, dense)
        model.__dict__.pop("save_pretrained", None)
        return model


def _adopt(model: nn.Module, quantizer: MobiquantQuantizer, tokenizer: Any = None) -> None:
    """Make `save_pretrained` of this model write a whole checkpoint, the tokenizer of its source included."""
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    model._mobiquant_tokenizer = tokenizer  # type: ignore[assignment]
    model.save_pretrained = MethodType(save_pretrained, model)  # type: ignore[assignment]


def make_quantized(model: "PreTrainedModel", stored: Checkpoint, tokenizer: Any, log: list[dict[str, Any]]) -> None:
    """Turn a model whose layers were replaced in memory into what loading its checkpoint would give."""
    config = MobiquantConfig(**stored.to_dict())
    quantizer = MobiquantQuantizer(config)
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method = True, QUANT_METHOD  # type: ignore[assignment]
    model._mobiquant_log = log  # type: ignore[assignment]
    _adopt(model, quantizer, tokenizer)


def save_pretrained(self: "PreTrainedModel", save_directory: str | Path, overwrite: bool = False, **kwargs: Any) -> None:
    """Write the checkpoint, whole or not at all; keywords such as `max_shard_size` go to transformers.

    An older mobiquant checkpoint in the folder is replaced; any other content needs `overwrite=True`. Raises InputError.
    """
    folder = Path(save_directory)
    if self.hf_quantizer is None:  # type: ignore[attr-defined]
        raise InputError("the model is no longer quantised: save it with type(model).save_pretrained(model, folder)")
    checkpoint.check_output(folder, overwrite or (folder.is_dir() and checkpoint.is_checkpoint(folder)))
    source, tokenizer = Path(self.name_or_path), getattr(self, "_mobiquant_tokenizer", None)
    if tokenizer is None and checkpoint.is_checkpoint(source):
        tokenizer = tokenizer_of(source)
    log = getattr(self, "_mobiquant_log", None)

    def write(new: Path) -> None:
        type(self).save_pretrained(self, new, **kwargs)
        if tokenizer is not None:
            _save_tokenizer(tokenizer, new)
        if log:
            (new / TRAINING_LOG).write_text(json.dumps(log, indent=1) + "\n")
        elif (source / TRAINING_LOG).is_file() and checkpoint.is_checkpoint(source):
            shutil.copyfile(source / TRAINING_LOG, new / TRAINING_LOG)
        checkpoint.write_digests(new)

    checkpoint.write_whole(folder, write)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the files of a tokenizer without what transformers notes of the place it was loaded from."""
    plain = copy(tokenizer)
    plain.init_kwargs = {name: value for name, value in tokenizer.init_kwargs.items() if name not in LOADING}
    plain.save_pretrained(folder)


def tokenizer_of(source: str | Path, **kwargs: Any) -> Any:
    """The tokenizer of a folder; raises InputError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, **kwargs)
    # transformers raises many classes here, for one cause: no usable tokenizer files
    except Exception as error:
        raise InputError(
            f"'{source}' has no tokenizer that transformers can load ({first_line(error)}): add its files"
        ) from error


def first_line(error: BaseException) -> str:
    """First line of an error message, for a sentence."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
