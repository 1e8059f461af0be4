"""The benchmark of serving: what it makes of a client's notes, its page, and the checkpoint of random weights."""

from pathlib import Path

import pytest
import tiny
import torch
from helpers import check_short, modules_of

import mobiquant

HOME = Path(__file__).parent.parent / "benchmarks" / "serving"


@pytest.fixture
def bench(monkeypatch):
    """The modules of the benchmark."""
    with modules_of(HOME, ("load", "server", "report", "stand_in", "command"), monkeypatch) as command:
        yield command


def notes(start, gap, count=4, error=""):
    return {"start_times": [start], "ttfts": [0.5], "itls": [[gap] * count], "errors": [error]}


def test_what_the_client_noted_becomes_requests_and_figures(bench):
    import load

    (one,) = load.requests(notes(10.0, 0.1))
    assert one.per_token == pytest.approx(0.1) and one.end == pytest.approx(10.9) and not one.error
    slow, lost = *load.requests(notes(11.0, 0.3)), *load.requests(notes(12.0, 9.0, error="gone"))
    row = bench.row("3 bits", 2.0, [one, slow, lost])
    # ten tokens from 10 to 12.7 s; what failed is counted as that and nothing else
    assert row.failed == 1 and row.tokens_per_second == pytest.approx(10 / 2.7)
    assert row.per_token == (pytest.approx(0.2), pytest.approx(0.298)) and row.first == (0.5, 0.5)


def test_the_page_has_all_rows_and_a_picture_of_the_burst(bench, tmp_path):
    import load

    requests = [load.Request(at, 0.4, (0.1,) * 20) for at in range(10)] + [load.Request(3.0, 0.1, (), "refused")]
    bursts = [
        bench.Burst("8 bits, fixed", requests, [(0.0, 8.0), (12.0, 8.0)], 2.0, 11.0, 0.31, 0.5),
        bench.Burst("with the controller", requests, [(0.0, 8.0), (3.0, 2.0)], 2.0, 11.0, 0.14, None),
    ]
    about = {"unloaded": 0.1, "sustainable": 1.0, "calm": 0.1, "burst": 4.0, "target": 0.14, "promise": 1.5}
    found = {"command": "python benchmarks/serving x", "machine": "here", "lengths": [16, 48], "about": about}
    rows = [bench.row("8 bits", 0.5, requests)]
    page = bench.report.write(tmp_path, "serving", found, rows, bursts).read_text()
    assert "| 8 bits | 0.5 |" in page and "| 8 bits, fixed | 310 | 3.10 | 9 | 0 | 1 |" in page
    assert "| with the controller | 140 | 1.40 | 9 | - | 1 |" in page
    assert (tmp_path / "serving.png").stat().st_size > 10_000


def test_a_stand_in_reads_what_its_table_says(bench, tmp_path):
    import stand_in

    tiny.tokenizer().save_pretrained(tmp_path / "words")
    stand_in.make("tiny", str(tmp_path / "words"), tmp_path / "out", tmp_path / "float")
    model, plain = mobiquant.load(tmp_path / "out"), mobiquant.integration.load_float(tmp_path / "float")
    assert plain.config.hidden_size == model.config.hidden_size == 128
    tokens = torch.arange(4, 20)[None]
    for bits in (2, 3, 4, 6, 8):
        with mobiquant.precision(model, bits):
            mobiquant.bits_read(model, reset=True)
            assert model(tokens).logits.isfinite().all() and mobiquant.bits_read(model) == pytest.approx(bits, abs=0.01)
    with mobiquant.precision(model, 5):
        mobiquant.bits_read(model, reset=True)
        model(tokens)
        assert 4 < mobiquant.bits_read(model) < 6
    with pytest.raises(mobiquant.InputError, match="has no shapes here: choose from llama-1b"):
        stand_in.make("gpt-5", str(tmp_path / "words"), tmp_path / "other")


def test_bad_input_is_one_sentence(bench):
    for text in ("", "1,x", "0"):
        with pytest.raises(bench.InputError, match="no list of rates"):
            bench.above_zero(text, "rates", "1,2")


def test_files_are_short():
    for path in HOME.glob("*.py"):
        check_short(path)
