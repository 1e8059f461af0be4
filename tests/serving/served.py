"""A server for tests: `mobiquant serve` in a process of its own, a tiny checkpoint, and what transformers says of it.

A plugin of its tests rather than a conftest.py: there can be one module of that name only.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import tiny
import torch

import mobiquant
from mobiquant import matmul
from mobiquant.config import Format

PROMPTS = ([7, 8, 9, 10, 11], [20, 21, 22], [30, 31, 32, 33, 34, 35, 36])
BUDGETS = [{"bits": bits, "routed": False} for bits in (2, 3, 4, 8)] + [{"bits": 3}, {"bits": 2.5}]
COUNT, START = 12, 240
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


class Server:
    """`mobiquant serve` in a process of its own; `key` goes with each call."""

    key = None

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
        while wait and not self.ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                said = self.said()[-3000:]
                self.stop()
                pytest.fail(said)
            time.sleep(1)

    def ready(self):
        try:
            return self.call("/health")[0] == 200
        except OSError:
            return False

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
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {self.key}"} if self.key else {})
        asked = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data=data, headers=headers, method=method)
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
