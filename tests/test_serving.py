"""The parts of serving that need no server: budgets of tokens, what requests carry, refusals, the command line."""

import asyncio
import json
import math
from types import SimpleNamespace

import pytest
import torch

from mobiquant import InputError
from mobiquant.config import Checkpoint, Format
from mobiquant.serving import command, http, worker
from mobiquant.serving.state import SHUT, Budget, State

FORM = Format(group_size=64)
TABLE = tuple({"avg_bits": bits, "tau": -float(bits), "cap": 5} for bits in (2, 3, 4, 6, 8))


@pytest.fixture
def state(monkeypatch):
    from mobiquant import budget

    # thresholds that say which budget they are of
    monkeypatch.setattr(budget, "threshold", lambda bits, form, table: (-float(bits), 5))
    return State(Checkpoint(FORM, ()), 8, torch.device("cpu"), Budget(4.0, routed=False))


def test_a_budget_travels_as_text():
    for budget in (Budget(3.0), Budget(2.5), Budget(4.0, routed=False)):
        assert worker.read(worker.write(budget)) == budget
    with pytest.raises(InputError, match="'abc' is no budget"):
        worker.read("abc")


def test_each_token_has_the_threshold_and_cap_of_its_request(state):
    before = state.tau.data_ptr(), state.cap.data_ptr()
    assert state.fixed == 3 and state.cap.tolist() == [3] * 8
    requests = worker.Requests(state)
    new = [
        SimpleNamespace(req_id=name, sampling_params=SimpleNamespace(extra_args=extra))
        for name, extra in (("a", {"mobiquant": "2.5"}), ("b", None), ("c", {"mobiquant": "=8"}))
    ]
    requests.follow(SimpleNamespace(scheduled_new_reqs=new, finished_req_ids=[]))
    requests.lay_out(["c", "a", "b"], [1, 3, 2])
    assert state.fixed is None
    assert state.tau[:6].tolist() == [SHUT, -2.5, -2.5, -2.5, SHUT, SHUT] and state.cap[:6].tolist() == [5, 5, 5, 5, 3, 3]
    # one budget for all, and still the routers' to decide
    requests.lay_out(["a"], [3])
    assert state.fixed is None and state.tau.tolist() == [-2.5] * 8
    state.set_default(Budget(2.0, routed=False))
    requests.follow(SimpleNamespace(scheduled_new_reqs=[], finished_req_ids=["a", "c"]))
    requests.lay_out(["b"], [2])
    assert state.fixed == 1 and list(requests.budgets) == ["b"]
    assert (state.tau.data_ptr(), state.cap.data_ptr()) == before


def test_what_tokens_read_is_counted_by_weight_and_by_token(state):
    state.weights = 30
    state.fill([(1, Budget(2.5)), (2, Budget(8.0, routed=False))])
    state.record(torch.tensor([1, 5, 5]), 3, 10)
    state.record(torch.tensor([2, 5, 5]), 3, 20)
    state.fill([(1, Budget(2.0, routed=False))])
    told = state.counts()
    assert told["weights"] == [10, 20, 0, 0, 60]
    assert {place * 0.25: count for place, count in enumerate(told["tokens"]) if count} == {2.75: 1, 8.0: 2}
    with pytest.raises(InputError, match="bits cannot be read: this model reads from 2 to 8"):
        state.set_default(Budget(9.0, routed=False))


@pytest.fixture
def server(monkeypatch):
    made = http.Server()
    made.widths, made.default = (2, 3, 4, 6, 8), Budget(4.0)
    monkeypatch.setattr(http, "SERVER", made)
    return made


def test_a_request_is_stamped_with_its_budget_and_the_cache_is_kept_apart(server):
    body = {"prompt": "x", "mobiquant": {"bits": 3}, "cache_salt": "mine", "vllm_xargs": {"other": 1}}
    server.stamp(body)
    assert body == {"prompt": "x", "vllm_xargs": {"other": 1, "mobiquant": "3"}, "cache_salt": "mine|mobiquant:3"}
    plain = {"prompt": "x"}
    server.stamp(plain)
    assert plain["vllm_xargs"] == {"mobiquant": "4"} and plain["cache_salt"] == "|mobiquant:4"
    server.follow, plain = True, {"prompt": "x"}
    server.stamp(plain)
    assert plain == {"prompt": "x"}


def test_the_middleware_hands_on_what_it_stamped_and_refuses_the_rest(server):
    seen, sent = [], []

    async def app(scope, receive, send):
        seen.append((dict(scope["headers"]), await receive()))

    def post(body, path="/v1/completions"):
        parts = [{"body": body[:5], "more_body": True}, {"body": body[5:], "more_body": False}]

        async def receive():
            return parts.pop(0)

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"content-length", b"1"), (b"a", b"b")]}
        asyncio.run(http.Middleware(app)(scope, receive, send))

    post(b'{"mobiquant": {"bits": 2}}')
    headers, message = seen.pop()
    assert json.loads(message["body"])["vllm_xargs"] == {"mobiquant": "2"} and headers[b"a"] == b"b"
    assert int(headers[b"content-length"]) == len(message["body"])
    post(b'{"mobiquant": {"bits": 99}}')
    assert not seen and sent[0]["status"] == 400 and b"99 bits cannot be read" in sent[1]["body"]
    post(b"no json at all")
    assert seen.pop()[1]["body"] == b"no json at all"
    post(b'{"mobiquant": 1}', path="/v1/models")
    assert seen.pop()[1]["body"] == b'{"mob'


def test_the_number_observed_tells_idle_from_busy():
    look = http.Observed("per_token")
    name = look.HISTOGRAMS["per_token"]
    assert look.look(0.0, {}) is None
    assert look.look(1.0, {f"{name}_sum": 2.0, f"{name}_count": 4.0, "vllm:generation_tokens_total": 4.0}) == 0.5
    busy = {f"{name}_sum": 2.0, f"{name}_count": 4.0, "vllm:generation_tokens_total": 4.0}
    assert math.isnan(look.look(1.5, busy)) and look.look(1.0 + http.IDLE, busy) is None
    queue = http.Observed("queue")
    assert queue.look(0.0, {queue.WAITING: 3.0, "vllm:prompt_tokens_total": 5.0}) == 3.0
    with pytest.raises(InputError, match="no range of this model: it reads from 2 to 8"):
        http.goal_of({"goal": "queue", "target": 4, "ceiling": 9}, (2, 3, 4, 6, 8))


def test_the_command_line_is_vllms():
    none = dict.fromkeys(command.GOALS)
    given = command.settings(3.0, True, 4.0, False, none, None, None)
    assert given == {"bits": 3.0, "max_bits": 4.0, "routed": False}
    words = command.words("m", "localhost", 8000, given, ["--dtype", "float32"])
    assert words[-2:] == ["--dtype", "float32"] and json.loads(words[words.index("--additional-config") + 1]) == {
        "mobiquant": given
    }
    led = command.settings(None, False, None, False, none | {"queue": 4.0}, 2.0, None)
    assert led == {"floor": 2.0, "goal": "queue", "target": 4.0, "follow": True}
    with pytest.raises(InputError, match="give one of --target-per-token"):
        command.settings(None, False, None, False, none | {"queue": 4.0, "per_token": 0.1}, None, None)
    with pytest.raises(InputError, match="follows a target"):
        command.settings(None, False, None, False, none, 2.0, None)
    assert command.environment({})["VLLM_PLUGINS"] == "mobiquant"
    assert command.environment({"VLLM_PLUGINS": "a"})["VLLM_PLUGINS"] == "a,mobiquant"
