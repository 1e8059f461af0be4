"""One stored checkpoint of a language model that runs at every precision.

Letters used in names, annotations and docs: `N`, `K` output and input features of a linear layer; `g`, `G` group size along K
and number of groups `ceil(K / g)`; `T` tokens; `E` slices; `b_e` width of slice e; `B_e` bits of the first e slices; `B` all
bits; `S`, `L` sequences and their length. *Depth* is how many slices are read, *bits* always a width in bits, *avg_bits* a
mean over tokens weighted by `N K`.

Read the package bottom-up: `slices`, `pack`, `clip`, `compensate`, `router`, `matmul`, `linear`, `checkpoint`, `budget`. The
trace from a weight to a product is five verbs: `slices.encode`, `pack.pack`, `checkpoint.save`, `checkpoint.load`,
`matmul.matmul`.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from mobiquant import _register

if TYPE_CHECKING:
    from mobiquant.budget import bits_read, precision, set_precision
    from mobiquant.calibrate import quantize
    from mobiquant.config import InputError
    from mobiquant.generate import draft
    from mobiquant.integration import load

try:
    __version__ = version("mobiquant")
except PackageNotFoundError:
    # run from a source tree that was never installed
    __version__ = "0.0.0"

__all__ = ["InputError", "bits_read", "draft", "load", "precision", "quantize", "set_precision"]
_HOMES = {
    "InputError": "config",
    "bits_read": "budget",
    "precision": "budget",
    "set_precision": "budget",
    "draft": "generate",
    "load": "integration",
    "quantize": "calibrate",
}

_register.when_imported("transformers.modeling_utils", "mobiquant.quantizer")


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: wait until something is asked for
    if name not in _HOMES:
        raise AttributeError(f"module 'mobiquant' has no attribute '{name}'")
    return getattr(import_module(f"mobiquant.{_HOMES[name]}"), name)
