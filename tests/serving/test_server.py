"""A real vLLM server of a tiny checkpoint: tokens of transformers at every precision, requests of several in one batch."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from served import BUDGETS, PROMPTS, Server

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-serving")
pytest_plugins = ["served"]


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


def test_a_thousand_switches_under_load_make_no_error_and_no_wrong_token(server, wanted):
    ended = threading.Event()

    def ask_on(prompt, budget, tokens):
        while not ended.is_set():
            assert server.tokens(prompt, json.loads(budget)) == tokens
        return True

    with ThreadPoolExecutor(5) as pool:
        jobs = [pool.submit(ask_on, *case, tokens) for case, tokens in list(wanted.items())[:5]]
        try:
            for i in range(1000):
                assert server.call("/v1/mobiquant/precision", BUDGETS[i % len(BUDGETS)], "PUT")[0] == 200
        finally:
            ended.set()
        assert all(job.result() for job in jobs)
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
