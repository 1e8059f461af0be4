"""A real vLLM server of a tiny checkpoint: tokens of transformers at every precision, requests of several in one batch."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch

import mobiquant
from mobiquant import matmul
from mobiquant.config import Format

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-serving")

PROMPTS = ([7, 8, 9, 10, 11], [20, 21, 22], [30, 31, 32, 33, 34, 35, 36])
BUDGETS = [{"bits": bits, "routed": False} for bits in (2, 3, 4, 8)] + [{"bits": 3}, {"bits": 2.5}]
COUNT, START = 12, 240
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("served")
    made = tiny.quantize(home, tiny.model(**SHAPE), format=Format(group_size=32))
    made.generation_config.eos_token_id = None
    made.save_pretrained(home / "checkpoint")
    tiny.tokenizer().save_pretrained(home / "checkpoint")
    return home / "checkpoint"


@pytest.fixture(scope="session")
def wanted(folder):
    """Greedy tokens of transformers by prompt and budget."""
    model, found = mobiquant.load(folder, dtype=torch.float32), {}
    for budget in BUDGETS:
        mobiquant.set_precision(model, budget["bits"], routed=budget.get("routed", True))
        for prompt in PROMPTS:
            with matmul.exact(), torch.inference_mode():
                ids = torch.tensor([prompt])
                made = model.generate(ids, max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False, pad_token_id=1)
            found[tuple(prompt), json.dumps(budget)] = made[0, len(prompt) :].tolist()
    return found


class Server:
    """`mobiquant serve` in a process of its own."""

    def __init__(self, folder, *more, wait=True, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        words = [sys.executable, "-m", "mobiquant", "serve", str(folder), "--port", str(self.port), "--exact"]
        words += ["--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "64", "--max-num-seqs", "8"]
        env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **environment}
        self.log = open(f"{folder}-{self.port}.log", "w+")  # noqa: SIM115 -- open as long as the server
        self.process = subprocess.Popen([*words, *more], stdout=self.log, stderr=self.log, env=env, start_new_session=True)
        deadline = time.monotonic() + START
        while wait and time.monotonic() < deadline:
            assert self.process.poll() is None, self.said()[-3000:]
            try:
                self.call("/health")
                return
            except OSError:
                time.sleep(1)
        assert not wait, self.said()[-3000:]

    def said(self):
        self.log.flush()
        with open(self.log.name) as file:
            return file.read()

    def stop(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        self.log.close()

    def call(self, path, body=None, method=None):
        """Status and what was answered, parsed where it is JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        asked = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data=data, headers={"content-type": "application/json"}, method=method
        )
        try:
            with urllib.request.urlopen(asked, timeout=120) as answer:
                code, text = answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            code, text = error.code, error.read().decode()
        try:
            return code, json.loads(text)
        except ValueError:
            return code, text

    def tokens(self, prompt, budget=None, **more):
        body = {"model": "tiny", "prompt": list(prompt), "max_tokens": COUNT, "temperature": 0, "ignore_eos": True}
        body |= {"return_token_ids": True, **more} | ({} if budget is None else {"mobiquant": budget})
        code, answer = self.call("/v1/completions", body)
        assert code == 200, answer
        return answer["choices"][0]["token_ids"]


@pytest.fixture(scope="module")
def server(folder):
    made = Server(folder, "--bits", "4", "--fixed", "--enforce-eager")
    yield made
    made.stop()


def test_each_budget_says_what_transformers_says(server, wanted):
    for (prompt, budget), tokens in wanted.items():
        assert server.tokens(prompt, json.loads(budget)) == tokens


def test_requests_of_several_budgets_share_a_batch(server, wanted):
    jobs = list(wanted) * 3
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda job: server.tokens(job[0], json.loads(job[1])), jobs))
    assert made == [wanted[job] for job in jobs]
    assert len({tuple(tokens) for tokens in made}) > len(PROMPTS)


def test_the_budget_of_the_server_is_changed_and_counted(server, wanted):
    assert server.call("/v1/mobiquant/precision") == (200, {"bits": 4.0, "routed": False, "widths": [2, 3, 4, 6, 8]})
    for budget in (BUDGETS[0], BUDGETS[3], BUDGETS[2]):
        code, told = server.call("/v1/mobiquant/precision", budget, "PUT")
        assert code == 200 and told["bits"] == budget["bits"]
        assert server.tokens(PROMPTS[0]) == wanted[tuple(PROMPTS[0]), json.dumps(budget)]
    time.sleep(2.5)
    _, metrics = server.call("/metrics")
    assert 'mobiquant_tokens_total{bits="2"}' in metrics and "mobiquant_budget_bits 4.0" in metrics
    assert "mobiquant_switches_total 3.0" in metrics


def test_switches_under_load_make_no_error(server, wanted):
    with ThreadPoolExecutor(5) as pool:
        jobs = [pool.submit(server.tokens, prompt, json.loads(budget)) for prompt, budget in wanted]
        for i in range(100):
            assert server.call("/v1/mobiquant/precision", BUDGETS[i % 2], "PUT")[0] == 200
        assert [job.result() for job in jobs] == list(wanted.values())
    assert server.call("/v1/mobiquant/precision", BUDGETS[2], "PUT")[0] == 200


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"bits": 9}, "9 bits cannot be read: this model reads from 2 to 8 bits"),
        ({"bits": "x"}, "bits of 'x' are no number"),
        ({"bits": 3, "routed": 1}, "routed is 1: give true or false"),
        ({"bits": 5, "routed": False}, "fixed widths are 2, 3, 4, 6, 8"),
        ({"bitz": 3}, "the field 'bitz' is unknown: give bits, routed"),
        ([3], "is no object"),
    ],
)
def test_a_budget_that_cannot_be_read_is_refused_in_one_sentence(server, body, named):
    code, told = server.call("/v1/mobiquant/precision", body, "PUT")
    assert code == 400 and named in told["error"]["message"]
    code, told = server.call("/v1/completions", {"model": "tiny", "prompt": [5], "mobiquant": body})
    assert code == 400 and named in told["error"]["message"]


def test_a_body_that_is_no_json_is_refused(server):
    code, told = server.call("/v1/mobiquant/precision", b"{x", "PUT")
    assert code == 400 and "no JSON" in told["error"]["message"]
    assert server.call("/v1/completions", b"{x")[0] == 400


def test_a_compiled_server_with_the_first_slices_alone_says_the_same(folder, wanted):
    made = Server(folder, "--max-bits", "4")
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
