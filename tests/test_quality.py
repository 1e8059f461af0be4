"""The comparison of quantisers: the real command on a tiny model, and its parts where no package of others is installed."""

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import tiny
import torch
from helpers import check_short
from rich.console import Console

from mobiquant import InputError, evaluate, tasks

HOME = Path(__file__).parents[1] / "benchmarks" / "quality"
FILES = sorted(HOME.glob("*.py"))
sys.path.insert(0, str(HOME))

import command  # noqa: E402
import methods  # noqa: E402
import ours  # noqa: E402
import peers  # noqa: E402
import picture  # noqa: E402
import plan  # noqa: E402
import schedule  # noqa: E402
import table  # noqa: E402
import zero_shot  # noqa: E402

FEW = "--samples 4 --sequence-length 16 --window 16 --max-windows 2 --group-size 16 --devices cpu,cpu --fixed 2,4 --routed 2.5"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a float model and a text."""
    home = tmp_path_factory.mktemp("quality")
    tiny.model().save_pretrained(home / "model")
    tiny.tokenizer().save_pretrained(home / "model")
    tiny.text_file(home)
    return home


@dataclass
class Ran:
    """How a call ended and what it printed."""

    code: int
    out: str
    err: str


def call(home, *words):
    """Run the command on the tiny model, its jobs in processes of their own; later options win."""
    texts = ["--calibration", str(home / "text.txt"), "--text", str(home / "text.txt")]
    places = ["--work", str(home / "work"), "-o", str(home / "out")]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["quality", str(home / "model"), *FEW.split(), *texts, *places, *words]),
        mock.patch.object(command, "out", Console(file=out)),
        mock.patch.object(command, "err", Console(file=err)),
    ):
        try:
            command.main()
        except SystemExit as stop:
            code = stop.code or 0
    return Ran(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def ran(home):
    """One run: the float model, a baseline at two widths, and ours."""
    done = call(home, "--methods", "float,rtn,fast", "--bits", "2,4")
    assert done.code == 0, done.err
    return done


def results(home):
    return json.loads((home / "out" / "quality.json").read_text())["results"]


def test_one_run_gives_a_table_a_picture_and_a_file(home, ran):
    found = {(r["job"]["method"], r["job"]["bits"], r["job"]["seed"]): r for r in results(home)}
    assert set(found) == {("float", None, 0), ("rtn", 2, 0), ("rtn", 4, 0), ("fast", None, 0)}
    assert found["float", None, 0]["rows"][0]["scores"]["text"]["kl"] is None
    rough, fine = (found["rtn", b, 0] for b in (2, 4))
    assert rough["rows"][0]["scores"]["text"]["kl"] > fine["rows"][0]["scores"]["text"]["kl"] > 0
    # tiny layers have 48 or 80 inputs, whole groups of 16
    assert rough["stored_bits"] == pytest.approx(2 + (16 + 2) / 16)
    own = found["fast", None, 0]["rows"]
    assert [(row["bits"], row["routed"]) for row in own] == [(2, False), (4, False), (2.5, True)]
    assert own[0]["bits_read"] == 2 and 2 <= own[2]["bits_read"] <= 8
    assert found["fast", None, 0]["calibration"]["tokens"] == 64
    assert (home / "out" / "quality.png").stat().st_size > 1000
    page = (home / "out" / "quality.md").read_text()
    assert "mobiquant fast, routed | 2.5 |" in page and "mobiquant fast, fixed | 2 |" in page
    assert str(home) not in page + (home / "out" / "quality.json").read_text()


def test_a_peer_that_is_not_installed_is_a_failed_row(home, tmp_path):
    if find_spec("hqq") is not None:
        pytest.skip("hqq is installed")
    done = call(home, "--methods", "hqq", "--bits", "2", "--output", str(tmp_path), "--name", "alone")
    failed = json.loads((tmp_path / "alone.json").read_text())["results"]
    # nothing was measured: that is told by the exit code too
    assert done.code == 1 and [r["error"] for r in failed] == ["hqq is not installed: pip install 'mobiquant[peers]'"]
    assert (tmp_path / "alone.md").read_text().count("failed: hqq is not installed") == 1


def test_what_was_measured_is_not_measured_again_until_settings_change(home, ran):
    file = home / "work" / "results" / "peer-rtn-2.json"
    before = file.stat().st_mtime_ns
    again = call(home, "--methods", "float,rtn", "--bits", "2")
    assert again.code == 0 and "2 of 2 jobs are done already" in again.err
    assert file.stat().st_mtime_ns == before and len(results(home)) == 2
    other = call(home, "--methods", "rtn", "--bits", "2", "--max-windows", "1")
    assert "starts on cpu" in other.err and file.stat().st_mtime_ns != before


def test_a_checkpoint_is_measured_under_its_name(home, ran):
    made = home / "work" / "checkpoints" / "recipe-fast-seed0"
    done = call(home, "--methods", "", "--checkpoint", f"kept={made}", "--output", str(home / "other"))
    assert done.code == 0, done.err
    page = (home / "other" / "quality.md").read_text()
    assert "kept, fixed | 2 |" in page and "kept, routed | 2.5 |" in page and str(home) not in page


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--methods", "rtn,magic"], "method 'magic' is unknown"),
        (["--bits", "1"], "1 bits cannot"),
        (["--bits", "two"], "'two' is no list of bits"),
        (["--seeds", ""], "no seed"),
        (["--samples", "0"], "samples of 0"),
        (["--text", "gone.txt"], "'gone.txt' cannot be read"),
        (["--devices", "cuda:99"], "device 'cuda:99'"),
        (["--checkpoint", "here"], "checkpoint 'here' is not usable"),
        (["--tasks", "piqa", "--task-data", "nowhere"], "piqa|lm-eval"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(home, words, named, tmp_path):
    done = call(home, "--work", str(tmp_path / "work"), "-o", str(tmp_path / "out"), *words)
    assert done.code == 2 and done.out == ""
    lines = done.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("quality: ") and any(word in lines[0] for word in named.split("|"))
    assert not list(tmp_path.iterdir())


def result(method, bits=None, kind="peer", error=None, seed=0, **row):
    """A result as a job writes it."""
    job = plan.Job(kind, method, bits, seed)
    made = {"settings": {}, "job": {"kind": kind, "method": method, "bits": bits, "seed": seed, "arguments": []}}
    row = {
        "bits": bits,
        "bits_read": bits,
        "routed": False,
        "scores": {"t": {"perplexity": 20.0, "kl": 0.5, "windows": 1}},
    } | row
    filled = {"rows": [row], "seconds": 1.0, "stored_bits": 4.5, "machine": "cpu", "versions": {}} if not error else {}
    return {"made": made, "label": job.label, "error": error, **filled}


def test_a_page_of_failures_has_a_row_for_each():
    found = [result("gptq", 2, error="RuntimeError: a | b"), result("fast", kind="recipe", error="it broke")]
    page = table.markdown(found, {"model": "m", "command": "c"}, [2, 3], "p.png")
    assert "| GPTQ (llm-compressor) | 2 | - | - | failed: RuntimeError: a / b |" in page
    assert "| mobiquant fast | - | - | - | failed: it broke |" in page


def test_numbers_of_seeds_and_of_disasters():
    assert table.shown((2.0, 4.0)) == "3.00 (2.00 to 4.00)"
    assert table.shown((2.0, 2.0)) == table.shown((2.0,)) == "2.00"
    assert table.shown((959966.25,)) == "9.60e+05" and table.shown(()) == "-"


def test_a_routed_line_is_compared_with_the_fixed_depths_of_its_checkpoint():
    def one(bits, perplexity, routed=False):
        scores = {"t": {"perplexity": perplexity, "kl": 0.1, "windows": 1}}
        return result("full", bits, "recipe", routed=routed, scores=scores)

    found = table.lines([one(2, 40.0), one(4, 10.0), one(3, 19.0, True), one(5, 9.0, True)])
    gains = {(line.bits, line.routed): table.gain(line, found, "t") for line in found}
    # half way between 40 and 10 in the logarithm is 20
    assert gains[3, True] == pytest.approx(-5) and gains[5, True] is None and gains[2, False] is None
    assert "| -5.0 % |" in table.everything(found)


def test_the_page_says_who_trained_on_more_than_the_calibration_tokens():
    def made(kind, method, **tokens):
        job = {"kind": kind, "method": method, "bits": None, "seed": 0}
        return {"made": {"job": job}, "label": method, "calibration": {"tokens": 10, "crc32": "ab", **tokens}}

    (line,) = table._calibration(
        [made("peer", "gptq"), made("recipe", "full", trained_on=70), made("recipe", "alone", trained_on=10)]
    )
    assert line == (
        "- 10 calibration tokens with CRC-32 ab: gptq, full (seed 0), then trained on windows of all 70 tokens of the text, "
        "alone (seed 0)."
    )


def test_ablations_are_the_recipe_with_one_thing_changed():
    found = plan.jobs(["full"], [2], [3], {}, {"full": ("--distill-steps", "80")}, command.variants("--distill-steps 80", 16))
    assert len({job.key for job in found}) == len(methods.ABLATIONS) + 1 and {job.seed for job in found} == {3}
    by_name = {job.variant: job.arguments for job in found}
    assert by_name[""] == ("--distill-steps", "80")
    assert by_name["routers per linear"] == ("--distill-steps", "80", "--routers", "per-linear")
    assert by_name["a quarter of the tokens"][2:] == ("--samples", "4", "--distill-steps", "20")
    labels = [job.label for job in found]
    assert "mobiquant full" in labels and "mobiquant full, slices 2,2,2,2" in labels


def test_a_picture_of_every_kind_of_line(tmp_path):
    found = [result("rtn", 2), result("rtn", 3), result("float", kind="float")]
    found += [result("full", 2.5, "recipe", seed=seed, routed=True) for seed in (0, 1)]
    picture.draw(table.lines(found), tmp_path / "p.png", "m")
    picture.draw([], tmp_path / "empty.png", "m")
    assert (tmp_path / "p.png").stat().st_size > (tmp_path / "empty.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("model", "known"),
    [
        ("meta-llama/Llama-2-7b-hf", 5.47),
        ("meta-llama/Meta-Llama-3-8B", 6.14),
        ("meta-llama/Llama-3.1-8B", 6.24),
        ("meta-llama/Llama-3.2-1B-Instruct", 9.75),
        ("smollm2-135m", None),
    ],
)
def test_published_figures_go_by_the_name_of_the_model(model, known):
    entry = table.published(model)
    assert (entry and entry["float"]) == known
    assert not entry or all(row["source"] and set(row) & {"2", "3", "4"} for row in entry["rows"])


def test_a_layer_that_was_left_out_is_found():
    made = tiny.model()
    evaluate.round_to_nearest(made, 3, 16)
    peers.check_grid("rtn", made, 3, 16)
    with torch.no_grad():
        made.model.layers[1].mlp.up_proj.weight += torch.linspace(0, 1, 48)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj' was left with 16 values"):
        peers.check_grid("rtn", made, 3, 16)


def test_each_process_sees_its_own_device():
    assert schedule.visible("cpu", {})[0] == "cpu"
    assert schedule.visible("cuda:2", {})[1]["CUDA_VISIBLE_DEVICES"] == "2"
    assert schedule.visible("cuda:1", {"CUDA_VISIBLE_DEVICES": "4,7"}) == (
        "cuda:0", {"CUDA_VISIBLE_DEVICES": "7", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip


def test_the_folder_runs_as_a_command():
    done = subprocess.run([sys.executable, str(HOME), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Example: python benchmarks/quality" in done.stdout


def test_what_a_recipe_says_goes_to_the_log_while_it_runs(tmp_path):
    # ends once it has read back what it said
    log = tmp_path / "log"
    program = (
        "import sys, time, pathlib; print('3/30 done', file=sys.stderr, flush=True)\n"
        f"while '3/30' not in pathlib.Path({str(log)!r}).read_text(): time.sleep(0.05)\n"
        "sys.exit('the last line')"
    )
    with log.open("w") as file, contextlib.redirect_stderr(file):
        _, said, code = ours._timed([sys.executable, "-c", program], None)
    assert code == 1 and said.splitlines() == ["3/30 done", "the last line"] == log.read_text().splitlines()


def test_seconds_of_a_run_that_was_killed_count(tmp_path):
    clock = tmp_path / "clock"
    clock.write_text("100.0")
    seconds, said, code = ours._timed([sys.executable, "-c", "import sys; sys.exit('no')"], clock)
    assert 100 < seconds == pytest.approx(float(clock.read_text()), abs=1e-3) and (said, code) == ("no\n", 1)


def test_a_process_that_dies_or_hangs_is_a_failed_row(home, tmp_path, monkeypatch):
    settings = plan.Settings(
        str(home / "model"), ("builtin",), 1, 8, 0, 16, ("builtin",), 8, 1, (2.0,), (), (), (), None, None
    )  # fmt: skip
    jobs = [plan.Job("float", methods.FLOAT)]
    hangs = schedule.Schedule(settings, tmp_path / "hangs", 0.01, print)
    assert hangs.run(jobs, ["cpu"])[0]["error"] == "took more than 0.01 minutes"
    monkeypatch.setattr(sys, "executable", "/bin/false")
    dies = schedule.Schedule(settings, tmp_path / "dies", 1, print)
    assert dies.run(jobs, ["cpu"])[0]["error"] == "its process ended with code 1"


def items(folder):
    """Two items of each task, as they are published."""
    piqa = [{"goal": "Open a jar", "sol1": "Turn the lid", "sol2": "Turn the jar inside out"}] * 2
    arc = {"question": "What is wet?", "choices": {"text": ["water", "sand"], "label": ["A", "B"]}, "answerKey": "A"}
    folder.mkdir()
    (folder / "piqa-valid.jsonl").write_text("\n".join(map(json.dumps, piqa)))
    (folder / "piqa-valid-labels.lst").write_text("0\n0\n")
    (folder / "arc-easy-test.jsonl").write_text(json.dumps(arc))
    return folder


def test_tasks_from_local_files(tmp_path):
    data = items(tmp_path / "data")
    zero_shot.prepare(("piqa", "arc_easy"), data, tmp_path / "made")
    joined = [json.loads(line) for line in (tmp_path / "made" / "piqa.jsonl").read_text().splitlines()]
    assert [item["label"] for item in joined] == [0, 0] and joined[0]["sol1"] == "Turn the lid"
    assert str(tmp_path / "made" / "arc_easy.jsonl") in (tmp_path / "made" / "arc_easy.yaml").read_text()
    (data / "piqa-valid-labels.lst").write_text("0\n")
    with pytest.raises(InputError, match="2 items of PIQA but 1 labels"):
        zero_shot.prepare(("piqa",), data, tmp_path / "wrong")
    with pytest.raises(InputError, match="'mmlu' has no local form"):
        zero_shot.prepare(("mmlu",), data, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is an extra")
def test_lm_eval_reads_them_and_asks_as_its_own_tasks_do(tmp_path):
    import lm_eval
    import yaml

    zero_shot.prepare(("piqa", "arc_easy"), items(tmp_path / "data"), tmp_path / "made")
    found = tasks.measure(tiny.model(), tiny.tokenizer(), ["piqa", "arc_easy"], folder=tmp_path / "made")
    assert set(found[0].accuracy) == {"piqa", "arc_easy"}
    for name, path in (("piqa", "piqa/piqa.yaml"), ("arc_easy", "arc/arc_easy.yaml")):
        theirs = Path(lm_eval.__file__).parent / "tasks" / path
        if not theirs.is_file():
            pytest.skip("this lm-eval came without its tasks")
        ours, known = (yaml.safe_load(file.read_text()) for file in (zero_shot.YAML / f"{name}.yaml", theirs))
        for key in ("output_type", "doc_to_text", "doc_to_choice", "doc_to_target", "metric_list", "metadata"):
            assert ours[key] == known[key], (name, key)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_and_functions_are_short(path):
    check_short(path)
