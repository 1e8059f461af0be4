"""The benchmark of the GPU kernels: what it counts, and a run on tiny shapes with emulated kernels."""

import sys
from pathlib import Path

import pytest
import torch
from emulation import emulate, needs_compiler
from helpers import check_short, modules_of

HOME = Path(__file__).parent.parent / "benchmarks" / "kernels"


@pytest.fixture
def bench(monkeypatch):
    """The modules of the benchmark."""
    with modules_of(HOME, ("shapes", "clock", "layers", "whole", "report", "command"), monkeypatch) as command:
        yield command


@needs_compiler
@pytest.mark.parametrize("routers", ["per-block", "per-input"])
def test_a_run_on_tiny_shapes_makes_its_page(bench, tmp_path, monkeypatch, routers):
    emulate(monkeypatch)
    import layers

    # the functions of a run are called once each, whatever they take
    for module in ("clock", "layers", "whole"):
        monkeypatch.setattr(sys.modules[module], "median", lambda work, *_: (work(), 10.0)[1])
    monkeypatch.setattr(layers.Stack, "aim", lambda self, replay, bits: self.tau.fill_(0.0))
    said = []
    found, rows, speeds = bench.run(torch.device("cpu"), "tiny", (1, 20), routers, "tiny", 8, said.append)
    assert {row.name for row in rows} == {"fixed", "all at one width, with routers", "routed", "mixed", "bf16 (torch)"}
    assert [one.name for one in speeds][:3] == ["bf16", "2 bits", "2 bits, with routers"] and len(said) == len(rows) + len(
        speeds
    )
    # 4 bits in groups of 128 with 24 bits for each: 4.19 of 16, and padding of 192 columns to 256 in groups
    assert 0.26 < speeds[1].linears / speeds[0].linears < 0.45
    page = bench.report.write(tmp_path, "tiny", found, rows, speeds, "python benchmarks/kernels").read_text()
    assert "| fixed | 1 | 2.00 | 2.00 | 10 |" in page and (tmp_path / "tiny.png").stat().st_size > 10_000
    assert "Routing, by the same width with routers and without: 2 bits, 1 tokens: +0.0 %" in page


def test_bytes_and_weights_are_those_of_the_shapes(bench):
    from shapes import MODELS

    seven = MODELS["llama-2-7b"]
    assert seven.weights == 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert MODELS["llama-3-8b"].inputs[0].rows == (4096, 1024, 1024)


def test_bad_input_is_one_sentence(bench):
    with pytest.raises(bench.InputError, match="no list of tokens: give whole numbers"):
        bench.numbers("1,x", "tokens", "1,8,512", int)
    with pytest.raises(bench.InputError, match="has no shapes here: choose from llama-2-7b"):
        bench.check("cuda", "gpt-5", None)
    if not torch.cuda.is_available():
        with pytest.raises(bench.InputError, match="there is no such device"):
            bench.check("cuda", "tiny", None)


def test_files_are_short():
    for path in HOME.glob("*.py"):
        check_short(path)
