"""Other ways to run a server, each alone on the machine: compiled, and split over two processes."""

import json

import pytest
import tiny
from served import SHAPE, START, Server

from mobiquant.config import Format

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-serving")
pytest_plugins = ["served"]


# one worker compiled, two that share each layer, both with the first slices alone
@pytest.mark.parametrize("more", [[], ["--tensor-parallel-size", "2", "--enforce-eager"]], ids=["compiled", "two processes"])
def test_it_says_the_same(folder, wanted, more):
    made = Server(folder, "--max-bits", "4", *more, **({"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if more else {}))
    try:
        assert made.call("/v1/mobiquant/precision")[1]["widths"] == [2, 3, 4]
        for (prompt, budget), tokens in wanted.items():
            if json.loads(budget)["bits"] <= 4:
                assert made.tokens(prompt, json.loads(budget)) == tokens
    finally:
        made.stop()


def test_columns_that_processes_cannot_share_are_refused_by_the_name_of_the_layer(tmp_path):
    quantised = tiny.quantize(tmp_path, tiny.model(**SHAPE | {"intermediate_size": 96}), format=Format(group_size=64))
    quantised.save_pretrained(tmp_path / "out")
    tiny.tokenizer().save_pretrained(tmp_path / "out")
    made = Server(
        tmp_path / "out", "--tensor-parallel-size", "2", "--enforce-eager", wait=False, VLLM_CPU_OMP_THREADS_BIND="0|1"
    )
    try:
        made.process.wait(START)
        assert "layer 'model.layers.0.mlp.down_proj' has 96 inputs, which 2 processes cannot share" in made.said()
    finally:
        made.stop()
