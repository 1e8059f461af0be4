"""The demonstration model, SmolLM2-135M-Instruct from its wheel, quantised, saved, loaded, measured and heard."""

import os
import subprocess
import sys

import gguf
import pytest
import torch

import mobiquant
from mobiquant import data, evaluate, integration
from mobiquant.generate import generate

BUDGETS = (2.5, 3.0, 4.0)
# cores for this process: threads that share a core with those of another test wait for each other most of the time
CORES = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


@pytest.fixture(scope="module", autouse=True)
def all_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(CORES)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, all_cores):
    """The checkpoint, from as few tokens as still make one."""
    folder = tmp_path_factory.mktemp("smollm2") / "checkpoint"
    # as a user would, and without the type checks of the tests, which double the time of tight loops
    settings = ["--group-size", "64", "--samples", "2", "--sequence-length", "128", "--sweeps", "1", "--device", "cpu"]
    command = [sys.executable, "-m", "mobiquant", "quantize", integration.DEMO_MODEL, "--output", str(folder), *settings]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(CORES)}
    subprocess.run(command, check=True, env=environment)
    return folder


@pytest.fixture(scope="module")
def windows(floating):
    return data.windows(data.load_text("builtin", "measure"), floating[1], 256, "builtin")[:1]


@pytest.fixture(scope="module")
def model(folder):
    return mobiquant.load(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def floating():
    """The float model and its tokenizer; their file is parsed once, and the package that does so is left as it was."""
    parsed, reader = [], gguf.GGUFReader
    with pytest.MonkeyPatch.context() as patch:
        counting = lambda *given: parsed.append(given) or reader(*given)  # noqa: E731
        patch.setattr(gguf, "GGUFReader", counting)
        made = integration.load_float_and_tokenizer(integration.DEMO_MODEL, torch.float32)
        assert len(parsed) == 1 and gguf.GGUFReader is counting
    return made


@pytest.fixture(scope="module")
def reference(floating):
    return floating[0]


def test_the_wheel_of_the_model_is_installed():
    assert integration.demo_file().stat().st_size > 5e7


def test_every_budget_reads_what_it_says_and_predicts_the_better_the_more_it_reads(model, windows, reference):
    (float_row,) = evaluate.evaluate(reference, windows)
    rows = evaluate.evaluate(model, windows, (*BUDGETS, 8.0), reference=reference)
    print(float_row, *rows, sep="\n")
    for row in rows:
        assert row.bits_read == pytest.approx(row.bits, abs=0.3)
    assert rows[0].kl > rows[1].kl > rows[2].kl > rows[3].kl > 0
    assert rows[2].perplexity < 2 * float_row.perplexity
    assert rows[3].perplexity == pytest.approx(float_row.perplexity, rel=0.15)


def test_a_load_of_the_first_bits_predicts_as_the_whole_model_at_those_bits(folder, model, windows):
    first = mobiquant.load(folder, max_bits=4, dtype=torch.float32)
    size = {m: sum(b.numel() * b.element_size() for n, b in m.named_buffers() if ".planes_" in n) for m in (first, model)}
    assert size[first] * 2 == size[model]
    (row,) = evaluate.evaluate(first, windows, [4.0])
    (whole,) = evaluate.evaluate(model, windows, [4.0])
    assert row.perplexity == pytest.approx(whole.perplexity, rel=1e-4)


def test_it_speaks_at_three_bits(folder, model):
    mobiquant.set_precision(model, 3)
    pieces = []
    tokenizer = integration.load_tokenizer(folder)
    text = generate(model, tokenizer, "The capital of France is", max_new_tokens=8, stream=pieces.append)
    assert text.strip() and "".join(pieces) == text
    assert len(tokenizer(text).input_ids) <= 9
