"""Other ways to run a server, each alone on the machine: compiled, and split over two processes."""

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import tiny
from served import PROMPTS, SHAPE, START, Server

from mobiquant.config import Format

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-serving")
pytest_plugins = ["served"]


HOME = Path(__file__).parents[2] / "benchmarks" / "serving"
SPLIT = ["--tensor-parallel-size", "2", "--enforce-eager"]
ON_A_CORE_EACH = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture(scope="module")
def split(folder):
    """Two processes that share each layer, with the first slices alone."""
    made = Server(folder, "--max-bits", "4", *SPLIT, **ON_A_CORE_EACH)
    yield made
    made.stop()


def check(server, wanted):
    assert server.call("/v1/mobiquant/precision")[1]["widths"] == [2, 3, 4]
    for (prompt, budget), tokens in wanted.items():
        if json.loads(budget)["bits"] <= 4:
            assert server.tokens(prompt, json.loads(budget)) == tokens


def test_compiled_it_says_the_same_to_whom_has_its_key(folder, wanted):
    made = Server(folder, "--max-bits", "4", "--api-key", "secret")
    try:
        for body, method in ((None, "GET"), ({"bits": 2}, "PUT")):
            assert made.call("/v1/mobiquant/precision", body, method)[0] == 401
        made.key = "secret"
        assert made.call("/v1/mobiquant/precision")[1]["bits"] == 4
        check(made, wanted)
    finally:
        made.stop()


def test_two_processes_say_the_same(split, wanted):
    check(split, wanted)


def test_a_killed_worker_ends_the_server_which_says_so(split):
    workers = [one for one in psutil.Process(split.process.pid).children(recursive=True) if "Worker" in one.name()]
    assert len(workers) == 2
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(split.call, "/v1/completions", {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 50})
        workers[1].kill()
        split.process.wait(START)
        assert re.search(r"Worker proc \S+ died unexpectedly", split.said())
        # whatever became of the request, it does not hang
        assert asked.exception() or asked.result()


def test_columns_that_processes_cannot_share_are_refused_by_the_name_of_the_layer(tmp_path):
    quantised = tiny.quantize(tmp_path, tiny.model(**SHAPE | {"intermediate_size": 96}), format=Format(group_size=64))
    quantised.save_pretrained(tmp_path / "out")
    tiny.tokenizer().save_pretrained(tmp_path / "out")
    made = Server(tmp_path / "out", *SPLIT, wait=False, **ON_A_CORE_EACH)
    try:
        made.process.wait(START)
        assert "layer 'model.layers.0.mlp.down_proj' has 96 inputs, which 2 processes cannot share" in made.said()
    finally:
        made.stop()


def test_the_benchmark_serves_and_measures(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path / "words")
    words = [sys.executable, str(HOME), str(tmp_path / "model"), "--stand-in", "tiny", "--tokenizer", str(tmp_path / "words")]
    words += ["--bits", "2,8", "--rates", "2", "--seconds", "3", "--burst", "0", "--loading", "20", "-o", str(tmp_path / "out")]
    words += ["--output-length", "8", "--server-args", "--max-model-len 64 --dtype float32 --enforce-eager"]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "out" / "serving.json").read_text())["rows"]
    assert [(row["name"], row["failed"]) for row in rows] == [("2 bits", 0), ("8 bits", 0)]
    assert all(row["tokens_per_second"] > 0 for row in rows)
