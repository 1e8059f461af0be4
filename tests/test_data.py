"""Text: names and files, how they are joined, and the windows cut from them."""

import json
import sys
from pydoc_data.topics import topics
from types import SimpleNamespace

import pytest
import small
import torch

from mobiquant import data
from mobiquant.config import InputError


def write(folder, name, content):
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return str(path)


def paragraphs(text):
    """Of any length that says something; documents quote each other by the paragraph."""
    return {paragraph.strip() for paragraph in text.split("\n\n") if len(paragraph.strip()) > 40}


def test_parts_of_the_builtin_text_share_nothing_and_leave_nothing_out():
    parts = {part: data.load_text("builtin", part) for part in ("calibrate", "measure")}
    assert len(parts["calibrate"]) > 100_000 and len(parts["measure"]) > 50_000
    calibrate, measure = map(paragraphs, parts.values())
    assert not calibrate & measure
    assert calibrate | measure == paragraphs("\n\n".join(topics.values()))


def test_a_text_file_is_the_same_for_both_parts(tmp_path):
    name = write(tmp_path, "a.txt", "some words\n\nmore words")
    assert data.load_text(name, "calibrate") == data.load_text(name, "measure") == "some words\n\nmore words"


def test_jsonl_documents_are_joined_by_two_newlines_and_blank_lines_skipped(tmp_path):
    name = write(tmp_path, "a.jsonl", '{"text": "one", "id": 3}\n\n{"text": "two\\nlines"}\n')
    assert data.load_text(name, "calibrate") == "one\n\ntwo\nlines"


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0c"])
def test_a_separator_inside_a_jsonl_string_does_not_end_its_line(tmp_path, separator):
    text = f"a{separator}b"
    line = json.dumps({"text": text}, ensure_ascii=separator == "\x0c")
    assert data.load_text(write(tmp_path, "a.jsonl", line + "\n"), "calibrate") == text


@pytest.mark.parametrize("bad", ["{", "[1]", '"text"', "3", "null", '{"words": "x"}', '{"text": null}', '{"text": 5}'])
def test_a_bad_jsonl_line_is_named_by_its_number(tmp_path, bad):
    name = write(tmp_path, "a.jsonl", f'{{"text": "fine"}}\n\n{bad}\n')
    with pytest.raises(InputError, match=r"^line 3 of .*a.jsonl"):
        data.load_text(name, "calibrate")


def test_wikitext_lines_keep_their_newline_and_blank_lines_become_empty(tmp_path):
    path = write(tmp_path, "wiki.test.raw", " \n = Title = \n \n A line . \n")
    assert data.load_text(f"wikitext2:{path}", "measure") == "\n\n = Title = \n\n\n\n\n A line . \n"


def test_wikitext_lines_end_at_newlines_only(tmp_path):
    path = write(tmp_path, "wiki.test.raw", "a\u2028b\nc\n")
    assert data.load_text(f"wikitext2:{path}", "measure") == "a\u2028b\n\n\nc\n"


def test_downloaded_wikitext_is_joined_as_the_file_is_and_parts_are_splits(tmp_path, monkeypatch):
    lines = {"train": ["", " = T = \n"], "test": ["", " = Title = \n", "", " A line . \n"]}
    calls = []

    def load_dataset(*names, split):
        calls.append((*names, split))
        return {"text": lines[split]}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert data.load_text("wikitext2", "calibrate") == "\n\n = T = \n"
    path = write(tmp_path, "wiki.test.raw", "\n = Title = \n\n A line . \n")
    assert data.load_text("wikitext2", "measure") == data.load_text(f"wikitext2:{path}", "measure")
    assert [call[-1] for call in calls] == ["train", "test"]


@pytest.mark.parametrize("name", ["wikitext2", "c4", "ptb"])
def test_without_the_datasets_package_the_sentence_says_what_to_install(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=rf"^text '{name}' needs .*pip install 'mobiquant\[datasets\]'"):
        data.load_text(name, "calibrate")


def test_a_failed_download_gives_the_first_line_of_its_reason(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route to host\nand a long tale")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(InputError, match="no route to host") as caught:
        data.load_text("wikitext2", "measure")
    assert "tale" not in str(caught.value) and "network" in str(caught.value)


def test_unusable_texts_are_named(tmp_path):
    for name, why in {
        "shakespeare": "text 'shakespeare' is unknown",
        str(tmp_path / "none.txt"): "none.txt' cannot be read",
        f"wikitext2:{tmp_path / 'none.raw'}": "none.raw' cannot be read",
        write(tmp_path, "empty.txt", " \n\t\n"): "empty.txt' is empty",
        write(tmp_path, "empty.jsonl", "\n"): "empty.jsonl' is empty",
    }.items():
        with pytest.raises(InputError, match=why):
            data.load_text(name, "calibrate")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin.txt' is not UTF-8"):
        data.load_text(str(tmp_path / "latin.txt"), "calibrate")


def test_windows_do_not_overlap_and_the_rest_is_dropped():
    tokenizer, text = small.tokenizer(), "abcdefghijklmnopqrstuvw"
    made = data.windows(text, tokenizer, 5, "text")
    assert made.shape == (4, 5)
    assert tokenizer.decode(made.flatten()) == text[:20]


def test_a_text_of_exactly_one_window_is_enough_and_one_token_less_is_not():
    tokenizer = small.tokenizer()
    assert data.windows("abcde", tokenizer, 5, "x").shape == (1, 5)
    with pytest.raises(InputError, match="text 'x' has 4 tokens, fewer than one window of 5"):
        data.windows("abcd", tokenizer, 5, "x")


@pytest.mark.parametrize("length", [0, -3])
def test_windows_without_tokens_are_refused(length):
    with pytest.raises(InputError, match=f"windows of {length} tokens"):
        data.windows("abcde", small.tokenizer(), length, "x")


def test_samples_are_deterministic_in_order_and_never_drawn_twice():
    every = torch.arange(100)[:, None].expand(100, 3)
    drawn = data.sample(every, 40, seed=1)
    assert drawn.shape == (40, 3)
    assert (drawn[1:, 0] > drawn[:-1, 0]).all()
    assert torch.equal(drawn, data.sample(every, 40, seed=1))
    assert not torch.equal(drawn, data.sample(every, 40, seed=2))
    # not only the beginning of the text
    assert drawn[-1, 0] > 60


@pytest.mark.parametrize("samples", [4, 5, 100])
def test_all_windows_are_taken_where_there_are_not_more_than_asked_for(samples):
    every = torch.arange(12).view(4, 3)
    assert torch.equal(data.sample(every, samples, seed=0), every)
