"""The command as a user calls it: verbs, streams, exit codes, and what bad input leaves behind."""

import ctypes
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import small
import torch
from helpers import unchecked
from small import quantize, run
from transformers import BertConfig, BertModel

import mobiquant
from mobiquant import checkpoint
from mobiquant.calibrate import fast

VERBS = ("quantize", "info", "eval", "analyze", "generate", "demo")
SIZES = ("quantised_weights", "stored_bits_per_weight", "size_gb", "unquantised_gb", "left_as_they_were")


def parsed(ran):
    """The one JSON object on stdout, of a call that went well."""
    assert ran.code == 0, ran.err
    assert ran.out.count("\n") == 1
    return json.loads(ran.out)


def refused(ran, *named):
    """Exit 2, nothing on stdout, one sentence on stderr that holds each of `named`."""
    assert (ran.code, ran.out) == (2, ""), ran
    lines = ran.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("mobiquant: "), ran.err
    assert all(word in lines[0] for word in named), ran.err
    assert "Traceback" not in ran.err and "MOBIQUANT_DEBUG" not in ran.err


def content(folder):
    """Every file below a folder, and its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def evaluate(*arguments, source=None):
    few = ("--text", small.text(), "--sequence-length", 32, "--max-windows", 3)
    return run("eval", source or small.quantised(), *few, *arguments)


def generate(*arguments, source=None):
    return run("generate", source or small.quantised(), "--prompt", "a fox", "--max-new-tokens", 6, *arguments)


@pytest.fixture
def damaged(tmp_path):
    return Path(shutil.copytree(small.quantised(), tmp_path / "damaged"))


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb_shows_an_example(verb):
    ran = run(verb, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"Example: mobiquant {verb}" in ran.out


def test_help_names_every_verb_and_no_arguments_print_it():
    ran, bare = run("--help"), run()
    assert ran.code == 0 and all(f"  {verb} " in ran.out for verb in VERBS)
    assert all(verb in bare.out + bare.err for verb in VERBS)


@pytest.mark.parametrize(
    "arguments", [("quantize",), ("quantize", "x"), ("generate", "x"), ("shrink",), ("info", "x", "--loud"), ("eval",)]
)
def test_wrong_usage_is_told_by_typer_with_exit_2(arguments):
    ran = run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("Usage: ") and "Traceback" not in ran.err


def test_quantize_makes_what_info_describes_and_dry_run_foretold(tmp_path):
    out = tmp_path / "deep" / "out"
    foretold = parsed(quantize("-o", out, "--dry-run", "--json"))
    assert not out.parent.exists()
    made = quantize("-o", out, "--json")
    assert "quantising blocks: 2/2" in made.err
    described = parsed(run("info", out, "--json"))
    assert parsed(made) == {"output": str(out), **described}
    assert {name: foretold[name] for name in SIZES} == {name: described[name] for name in SIZES}
    assert described["reads_at_bits"] == "2,3,4,6,8" and described["calibration"]["tokens"] == 64
    assert list(out.parent.iterdir()) == [out]


def test_tables_and_lines_hold_what_the_json_holds():
    lines = run("info", small.quantised())
    said = {line.split()[0]: line for line in lines.out.splitlines()}
    for name, value in parsed(run("info", small.quantised(), "--json")).items():
        assert all(str(part) in said[name] for part in (value.values() if isinstance(value, dict) else [value]))
    table = evaluate("--bits", "2,4")
    assert table.code == 0 and "perplexity" in table.out and "routed" in table.out and "evaluating: 3/3" in table.err


def test_eval_of_routed_and_fixed_budgets_and_the_float_model():
    routed = parsed(evaluate("--bits", "2,2.5,8", "--reference", small.plain(), "--json"))
    assert (routed["windows"], routed["sequence_length"]) == (3, 32)
    assert [(row["name"], row["bits"]) for row in routed["rows"]] == [("routed", 2.0), ("routed", 2.5), ("routed", 8.0)]
    assert routed["rows"][0]["kl"] > routed["rows"][1]["kl"] > routed["rows"][2]["kl"] > 0
    fixed = parsed(evaluate("--bits", "2,8", "--fixed", "--json"))["rows"]
    assert [(row["name"], row["bits_read"], row["kl"]) for row in fixed] == [("fixed", 2.0, None), ("fixed", 8.0, None)]
    assert fixed[0]["perplexity"] == pytest.approx(routed["rows"][0]["perplexity"])
    (baseline,) = parsed(evaluate("--json", source=small.plain()))["rows"]
    assert baseline["name"] == "float"
    assert baseline["perplexity"] == pytest.approx(fixed[1]["perplexity"], rel=0.05)


def test_generate_prints_the_text_alone_and_repeats_itself_with_a_seed():
    plain, seeded = generate(), [generate("--seed", seed).out for seed in (3, 3, 4)]
    assert plain.code == 0 and plain.err == "read 4.000 bits a token on average\n"
    assert parsed(generate("--json"))["text"] == plain.out[:-1]
    assert seeded[0] == seeded[1] and len({*seeded, plain.out}) == 3
    chat = parsed(generate("--chat", "--json", "--bits", 3, "--fixed"))
    assert set(chat) == {"text", "bits", "bits_read"} and chat["bits_read"] == 3
    assert chat["text"] != plain.out[:-1]


def test_a_load_of_the_first_bits_generates_the_same_as_the_whole():
    assert generate("--max-bits", 4, "--bits", 4).out == generate("--bits", 4).out


def test_the_module_is_the_command(tmp_path):
    def python(*arguments):
        command = [sys.executable, "-m", "mobiquant", *map(str, arguments)]
        home = Path(mobiquant.__file__).parents[1]
        return subprocess.run(command, capture_output=True, text=True, cwd=home, timeout=60)

    ran = python("info", small.quantised(), "--json")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == run("info", small.quantised(), "--json").out
    ran = python("quantize", "x", "-o", tmp_path / "out", "--routers", "none")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "mobiquant: routers 'none' are unknown: choose per-block, per-input or per-linear\n"
    assert list(tmp_path.iterdir()) == []


BAD_SETTINGS = {
    "recipe": (("--recipe", "slow"), ("slow", "fast, paper or full")),
    "sum of slices": (("--slices", "2,2,2,4"), ("2,2,2,4", "8 or less")),
    "letters as slices": (("--slices", "a,b"), ("a,b", "whole numbers")),
    "slice of no bits": (("--slices", "0,2"), ("0,2", "positive")),
    "group size": (("--group-size", "0"), ("group size of 0", "multiple of 8")),
    "device": (("--device", "abacus"), ("abacus", "cpu")),
    "samples": (("--samples", "0"), ("samples of 0", "1 or more")),
    "target bits": (("--recipe", "paper", "--target-bits", "9"), ("9", "from 2 to 8")),
    "unknown text": (("--calibration", "shakespeare"), ("shakespeare", "builtin")),
    "absent text": (("--calibration", "none.txt"), ("none.txt", "builtin")),
    "short text": (("--sequence-length", "5000"), ("fewer than one window of 5000", "--sequence-length")),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_quantize_refuses_a_bad_setting_and_writes_nothing(tmp_path, case):
    arguments, named = BAD_SETTINGS[case]
    refused(quantize("-o", tmp_path / "out", *arguments), *named)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "text", "named"), [("a.txt", " \n", "is empty"), ("a.jsonl", '{"text": "x"}\n{', "line 2")])
def test_quantize_refuses_a_text_without_content(tmp_path, name, text, named):
    (tmp_path / name).write_text(text)
    refused(quantize("-o", tmp_path / "out", "--calibration", tmp_path / name), name, named)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def bad_source(kind, folder):
    """A model that cannot be quantised, and what the sentence about it names."""
    if kind == "absent":
        return folder, ("does not exist",)
    if kind == "quantised":
        return small.quantised(), ("already quantised", "float model")
    if kind == "bert":
        tiny = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        BertModel(BertConfig(**tiny)).save_pretrained(folder)
        return folder, ("BertModel", "not a causal language model")
    if kind == "nan":
        made = small.model()
        made.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
        return small.save(made, folder), ("model.layers.1.mlp.up_proj.weight", "NaN", "repair")
    folder.mkdir()
    return folder, ("config.json",)


@pytest.mark.parametrize("kind", ["absent", "empty", "bert", "quantised", "nan"])
def test_quantize_refuses_what_is_no_float_model(tmp_path, kind):
    source, named = bad_source(kind, tmp_path / "model")
    refused(quantize("-o", tmp_path / "new" / "out", source=source), str(source), *named)
    assert not list(tmp_path.rglob("*out*"))


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_folder_in_use_needs_overwrite_and_keeps_its_content(tmp_path, more):
    (tmp_path / "notes.md").write_text("mine")
    refused(quantize("-o", tmp_path, *more), str(tmp_path), "not empty", "--overwrite")
    refused(run("demo", "-o", tmp_path), str(tmp_path), "--overwrite")
    assert content(tmp_path) == {Path("notes.md"): b"mine"}


def test_overwrite_replaces_the_folder_whole(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.md").write_text("mine")
    assert quantize("-o", tmp_path / "out", "--overwrite").code == 0
    assert set(content(tmp_path / "out")) == set(content(small.quantised()))
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


FULL = OSError(errno.ENOSPC, "No space left on device")
FAILURES = {
    "full disk": (checkpoint, "write_digests", FULL, "No space left on device: nothing was written"),
    "interrupt": (fast, "quantize_block", KeyboardInterrupt, "interrupted: nothing was written"),
    "surprise": (fast, "quantize_block", ArithmeticError("odd"), "ArithmeticError: odd"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_on_the_way_exits_1_and_changes_nothing(tmp_path, case):
    module, name, error, said = FAILURES[case]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.md").write_text("mine")
    for arguments in (("-o", tmp_path / "new"), ("-o", tmp_path / "old", "--overwrite")):
        with mock.patch.object(module, name, side_effect=error):
            ran = quantize(*arguments, "--json")
        assert (ran.code, ran.out) == (1, "")
        assert said in ran.err.splitlines()[-1] and "Traceback" not in ran.err
        assert content(tmp_path) == {Path("old/notes.md"): b"mine"}
        assert list(tmp_path.iterdir()) == [tmp_path / "old"]


@pytest.mark.parametrize("verb", [evaluate, generate], ids=["eval", "generate"])
@pytest.mark.parametrize("bits", ["1.5", "9", "nan"])
def test_bits_out_of_range_are_refused_with_the_range(verb, bits):
    refused(verb("--bits", bits), bits, "from 2 to 8 bits")
    refused(verb("--bits", bits, "--fixed"), bits, "from 2 to 8 bits")


@pytest.mark.parametrize("verb", [evaluate, generate], ids=["eval", "generate"])
def test_a_fixed_width_must_be_one_of_a_prefix(verb):
    refused(verb("--bits", "2.5", "--fixed"), "2.5", "2, 3, 4, 6, 8")
    refused(verb("--bits", "8", "--max-bits", "4"), "8", "from 2 to 4")
    refused(verb("--max-bits", "2"), "max_bits=2", "3 or more")


@pytest.mark.parametrize("bits", ["x", "", "2,", "2;3"])
def test_bits_that_are_no_numbers_are_refused(bits):
    refused(evaluate("--bits", bits), f"'{bits}'", "commas")


def test_eval_and_generate_refuse_other_bad_input(tmp_path):
    refused(evaluate("--max-windows", 0), "0 windows")
    refused(evaluate("--sequence-length", 0), "--sequence-length")
    refused(evaluate("--sequence-length", 1), "--sequence-length")
    refused(evaluate("--text", "shakespeare"), "shakespeare")
    refused(evaluate("--reference", tmp_path / "none"), "none", "does not exist")
    refused(evaluate("--device", "abacus"), "abacus")
    refused(generate("--prompt", " "), "empty", "--prompt")
    refused(generate("--max-new-tokens", 0), "--max-new-tokens")
    refused(generate(source=small.plain()), "not quantised", "mobiquant quantize")
    refused(run("info", small.plain()), "not quantised")
    refused(run("info", tmp_path / "none"), "none", "does not exist")


@pytest.mark.parametrize("verb", [evaluate, generate], ids=["eval", "generate"])
@pytest.mark.parametrize("damage", ["newer", "truncated", "flipped"])
def test_a_damaged_or_newer_checkpoint_is_refused(damaged, verb, damage):
    weights = damaged / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "newer":
        text = (damaged / "config.json").read_text()
        (damaged / "config.json").write_text(text.replace('"format_version": 2', '"format_version": 3'))
    elif damage == "truncated":
        weights.write_bytes(data[:-100])
    else:
        data[-1000] ^= 16
        weights.write_bytes(data)
    named = {"newer": ("version 3", "upgrade"), "truncated": ("damaged",), "flipped": ("tensor", "not what was written")}[
        damage
    ]
    refused(verb(source=damaged), *named)


def test_steps_of_the_full_recipe_are_those_of_its_settings():
    import inspect

    from mobiquant import cli
    from mobiquant.config import Training

    shown = inspect.signature(cli.quantize).parameters
    for name in ("block_steps", "distill_steps", "routing_steps", "budget_minutes", "sensitivity", "whole_text"):
        assert shown[name].default == getattr(Training(), name)


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="no glibc")
def test_what_is_freed_is_kept_for_the_next_large_tensor():
    counts = (
        "import resource\n"
        "from mobiquant.console import keep_freed_memory\n"
        "def pages():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(10): bytearray(2**27)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "first = pages()\nkeep_freed_memory()\nbytearray(2**27)\nprint(first, pages())"
    )
    before, after = map(int, unchecked(counts).stdout.split())
    # 128 MB are 32768 pages, or 64 huge ones
    assert before >= 640 and after < before / 10


def test_a_device_without_memory_left_is_said_in_one_sentence(tmp_path, monkeypatch):
    def fail(*_args, **_settings):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")

    monkeypatch.setattr(fast, "quantize_block", fail)
    ran = quantize("-o", tmp_path / "out")
    said = [line for line in ran.err.splitlines() if "out of memory" in line]
    assert ran.code == 1 and len(said) == 1 and "--sequence-length" in said[0] and "allocate" not in ran.err
    assert not (tmp_path / "out").exists()
