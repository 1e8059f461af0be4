"""The analysis of single tokens against plain computations, and its page in a browser."""

import json
import re
import shutil
import subprocess

import pytest
import small
import tiny
import torch
from small import run

import mobiquant
from mobiquant import analysis, page
from mobiquant.budget import checkpoint_of

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(quantised model, float model, windows, analysis)"""
    made, original = tiny.quantize(tmp_path_factory.mktemp("case")), tiny.model()
    windows = tiny.tokens(3, 20)
    return made, original, windows, analysis.analyze(made, original, windows, 3.3)


def test_errors_of_tokens_are_the_plain_ones(case):
    made, original, windows, found = case
    wanted = tiny.logits(original, windows).double().log_softmax(-1)
    for row, width in zip(found.divergence, (2, 3, 4, 6, 8), strict=True):
        with mobiquant.precision(made, width, routed=False):
            plain = (wanted.exp() * (wanted - tiny.logits(made, windows).double().log_softmax(-1))).sum(-1)[:, :-1]
        assert torch.allclose(row.double(), plain.flatten(), rtol=1e-2, atol=1e-5)
    assert found.tokens.tolist() == windows[:, :-1].flatten().tolist()


def test_bits_of_tokens_and_layers_are_those_that_were_read(case):
    made, _, windows, found = case
    layers = dict(made.named_modules())
    sizes = {name: layers[name].in_features * layers[name].out_features for name in found.routed.by_layer}
    by_layer = sum(bits * sizes[name] for name, bits in found.routed.by_layer.items()) / sum(sizes.values())
    with mobiquant.precision(made, 3.3):
        mobiquant.bits_read(made, reset=True)
        for window in windows:
            tiny.logits(made, window[None])
        assert by_layer == pytest.approx(mobiquant.bits_read(made, reset=True), rel=1e-5)
    # of each window but its last token
    assert len(found.routed.by_token) == 57 and 2 <= found.routed.by_token.min() <= found.routed.by_token.max() <= 8


def test_nothing_is_changed_by_looking(case):
    made, original, windows, found = case
    again = analysis.analyze(made, original, windows, 3.3)
    assert torch.equal(again.divergence, found.divergence) and torch.equal(again.crossed, found.crossed)
    assert torch.equal(tiny.logits(original, windows), tiny.logits(tiny.model(), windows))


def test_windows_do_not_disturb_each_other(case):
    made, original, windows, found = case
    alone = [analysis.analyze(made, original, window[None], 3.3) for window in windows]
    assert torch.allclose(torch.stack([one.crossed for one in alone]).mean(0), found.crossed, rtol=1e-5)
    assert torch.equal(torch.cat([one.routed.by_token for one in alone]), found.routed.by_token)


def test_ranges_for_two_bits_cap_what_eight_bits_reach(case):
    crossed = case[3].crossed
    assert crossed[0, -1] > 2 * crossed[-1, -1] and (crossed > 0).all()
    assert crossed[-1, 0] > crossed[-1, -1]


def test_overlap_and_ranks_by_hand():
    divergence = torch.tensor(
        [[9.0, 1, 2, 3, 4, 5, 6, 7, 8, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9.0], [9, 0, 1, 2, 3, 4, 5, 6, 7, 8.0]]
    )
    bits = torch.tensor([4.0, 2, 2, 2, 2, 2, 2, 2, 2, 3])
    routed = analysis.Routed(3, bits, {}, divergence[0])
    found = analysis.Analysis((2, 4, 8), torch.arange(10), divergence, routed, torch.zeros(3, 3))
    assert found.overlap().tolist() == [[1, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert found.bits_of_worst()[0] == [4, 3, 4]
    assert found.share_of_worst()[0] == pytest.approx(0.2)
    # ties share a rank: bits rank as 9, eight times 3.5, 8
    ranks = torch.tensor([9, 3.5, 3.5, 3.5, 3.5, 3.5, 3.5, 3.5, 3.5, 8])
    wanted = float(torch.corrcoef(torch.stack([divergence[0], ranks]))[0, 1])
    assert found.rank_correlation()[0] == pytest.approx(wanted, rel=1e-5)


def test_the_page_stands_alone_and_shows_text_as_text(case):
    pieces = ["<script>alert(1)</script>", " & so on"]
    text = page.render(case[3], pieces, {"model": "<b>x</b>"})
    assert "<script" not in text and "&lt;script&gt;" in text and "&lt;b&gt;x" in text
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", text) and "@import" not in text
    assert text.count("<svg") == 4 and text.count('title="') == 2
    assert page.render(case[3], pieces, {"model": "<b>x</b>"}) == text


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_page_renders_in_a_browser(case, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page.render(case[3], [f"word{i} " for i in range(57)], {}), encoding="utf-8")
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'home'}",
    ]
    made = subprocess.run([*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=60)
    assert made.returncode == 0 and "CONSOLE" not in made.stderr
    assert made.stdout.count("<svg") == 4 and "word56" in made.stdout
    shot = tmp_path / "shot.png"
    subprocess.run([*command, f"--screenshot={shot}", path.as_uri()], capture_output=True, timeout=60, check=True)
    assert shot.stat().st_size > 10_000


def test_the_command_writes_a_page_once(tmp_path):
    output = tmp_path / "page.html"
    command = ["analyze", small.quantised(), "--reference", small.plain(), "--text", small.text(), "--output", output]
    command += ["--sequence-length", 32, "--max-windows", 2]
    done = run(*command, "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["rows"]
    assert [row["bits"] for row in rows] == [2, 3, 4, 6, 8] and rows[0]["kl"] > rows[-1]["kl"]
    before = output.read_bytes()
    again = run(*command)
    assert again.code == 2 and "is there already" in again.err and output.read_bytes() == before
    assert run(*command, "--overwrite", "--bits", 9).code == 2 and output.read_bytes() == before
    assert "is not a folder" in run(*command[:-6], "--output", tmp_path / "none" / "page.html", *command[-4:]).err


def test_the_analysis_reads_what_the_checkpoint_says(case):
    assert case[3].widths == checkpoint_of(case[0]).format.widths
