"""Zero-shot tasks at each budget; what needs lm-eval is left out where it is not installed."""

import json
import sys
from importlib.util import find_spec

import pytest
import tiny
from typer.testing import CliRunner

from mobiquant import InputError, tasks
from mobiquant.cli import app

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is an extra")
YAML = """task: two_ways
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {file}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{[good, bad]}}}}"
doc_to_target: 0
metric_list:
  - metric: acc
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a checkpoint, and a task whose right answer is the one that the float model finds likelier."""
    home = tmp_path_factory.mktemp("tasks")
    tiny.quantize(home).save_pretrained(home / "made")
    model, tokenizer = tiny.model(), tiny.tokenizer()
    lines = []
    for row in tiny.tokens(12, 6).tolist():
        last = tiny.logits(model, tiny.torch.tensor([row]))[0, -1]
        best, worst = (tokenizer.convert_ids_to_tokens(int(i)) for i in (last[4:].argmax() + 4, last[4:].argmin() + 4))
        lines.append(json.dumps({"start": tokenizer.decode(row), "good": best, "bad": worst}))
    (home / "items.json").write_text("\n".join(lines))
    (home / "tasks").mkdir()
    (home / "tasks" / "two_ways.yaml").write_text(YAML.format(file=home / "items.json"))
    return home


@needs_lm_eval
def test_accuracy_of_each_budget(home):
    command = ["eval", str(home / "made"), "--bits", "2,3.5,8", "--tasks", "two_ways", "--task-folder", str(home / "tasks")]
    done = CliRunner().invoke(app, [*command, "--json", "--limit", "10"], catch_exceptions=False)
    rows = json.loads(done.stdout)["rows"]
    assert [row["bits"] for row in rows] == [2, 3.5, 8]
    assert rows[0]["bits_read"] == 2 and rows[2]["bits_read"] == 8
    # what the float model finds by far the likeliest, the same weights at 8 bits find too
    assert rows[2]["two_ways"] == rows[2]["mean"] == 100


@needs_lm_eval
@pytest.mark.parametrize(
    ("name", "folder", "said"),
    [
        ("three_ways", "tasks", "three_ways.* is not known among the yaml"),
        ("two_ways", "none", "does not exist"),
        ("", "tasks", "not known"),
    ],
)
def test_what_cannot_be_run_is_said(home, name, folder, said):
    with pytest.raises(InputError, match=said):
        tasks.measure(tiny.model(), tiny.tokenizer(), [name], folder=home / folder)
    (home / "items.json").rename(home / "away.json")
    try:
        with pytest.raises(InputError, match=r"could not be run|not known|does not exist"):
            tasks.measure(tiny.model(), tiny.tokenizer(), [name], folder=home / folder)
    finally:
        (home / "away.json").rename(home / "items.json")


def test_without_lm_eval_the_way_to_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install 'mobiquant.tasks.'"):
        tasks.measure(tiny.model(), tiny.tokenizer(), ["piqa"])
