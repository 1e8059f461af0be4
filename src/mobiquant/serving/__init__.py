"""Serving by vLLM: the plugin that makes it read mobiquant checkpoints, and precision that is changed while it runs.

`register` is an entry point of the group `vllm.general_plugins`, which vLLM calls in each of its processes. Nothing here is
imported by the rest of the package, and vLLM is imported only from here.
"""


def register() -> None:
    """Make vLLM know the method `mobiquant`; calling it again changes nothing."""
    from vllm.model_executor.layers.quantization import (  # pyright: ignore[reportMissingImports] -- an extra
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    from mobiquant.config import QUANT_METHOD

    if QUANT_METHOD not in QUANTIZATION_METHODS:
        from mobiquant.serving.layers import MobiquantConfig

        register_quantization_config(QUANT_METHOD)(MobiquantConfig)
