"""The shape of the package: what an import costs, which module may import which, and how long files and functions are."""

import ast
import importlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import check_short

import mobiquant

HOME = Path(mobiquant.__file__).parent
FILES = sorted(HOME.rglob("*.py"))
# a module imports only those to its left; names on one level do not import each other
ORDER = (
    "_register|slices|progress|knob|kernels|kernels.cpu|kernels.cuda",
    "kernels.descent|kernels.grid|kernels.divergence|kernels.cpu.library",
    "kernels.operators|kernels.cpu.product|kernels.cpu.descent",
    "pack|clip|compensate|config",
    "router|console|kernels.cuda.compiler|serving.controller",
    "kernels.cuda.tiles",
    "kernels.cuda.few|kernels.cuda.many|kernels.cuda.block",
    "kernels.cuda.product",
    "matmul",
    "linear",
    "blocks",
    "checkpoint|budget",
    "serving.state",
    "serving.worker",
    "serving.layers|serving.http",
    "quantizer",
    "integration|data",
    "calibrate.streams|calibrate.routers|calibrate.latent|calibrate.work",
    "calibrate.fast|calibrate.nested|calibrate.passes",
    "calibrate.paper|calibrate.thresholds|calibrate.distill|calibrate.sensitivity|calibrate.gates",
    "calibrate.routing",
    "calibrate.full",
    "calibrate",
    "evaluate|analysis|decoder",
    "captured",
    "estimate|generate|report|tasks|page",
    "demo|bench|serving|serving.command",
    "cli",
    "__main__",
)
LEVELS = {name: level for level, names in enumerate(ORDER) for name in names.split("|")}
# the package itself hands names of all modules on, when they are asked for
HANDED_ON = {name: home for name, home in mobiquant._HOMES.items()}


def module_name(path):
    """Name inside the package; empty for the package itself."""
    parts = path.relative_to(HOME).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path):
    """Modules of the package that a file imports anywhere, each with its line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} is a relative import"
            inside = (node.module or "").split(".")[0] == "mobiquant"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if inside else []
        else:
            continue
        for name in names:
            head, _, rest = name.partition(".")
            if head == "mobiquant" and rest:
                found.append((owner(rest), node.lineno))
    return found


def owner(name):
    """The longest known module that a dotted name begins with."""
    name = HANDED_ON.get(name, name)
    while name not in LEVELS:
        assert "." in name, f"'{name}' is no module of the order"
        name = name.rpartition(".")[0]
    return name


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HOME.parent, timeout=60)


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, mobiquant; print(*{name.partition('.')[0] for name in sys.modules})"
    ran = python(code)
    assert ran.returncode == 0, ran.stderr
    names = set(ran.stdout.split())
    assert "mobiquant" in names
    assert not names & {"torch", "transformers", "triton", "matplotlib", "typer", "rich", "numpy", "datasets", "safetensors"}


def test_the_help_of_the_command_imports_nothing_heavy():
    code = "import sys; from mobiquant import cli; print(*{name.partition('.')[0] for name in sys.modules})"
    ran = python(code)
    assert ran.returncode == 0, ran.stderr
    names = set(ran.stdout.split())
    assert "typer" in names
    assert not names & {"torch", "transformers", "triton", "matplotlib"}


@pytest.mark.parametrize("leader", ["mobiquant", "transformers"])
def test_whichever_comes_first_transformers_knows_the_method(leader):
    other = {"mobiquant": "transformers", "transformers": "mobiquant"}[leader]
    # transformers itself imports its parts when they are asked for
    code = f"import {leader}, {other}; transformers.AutoModelForCausalLM.from_pretrained; import transformers.modeling_utils\n"
    code += "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; print('mobiquant' in known)"
    ran = python(code)
    assert ran.stdout == "True\n", ran.stderr


def test_public_names_are_the_objects_of_their_homes():
    assert set(mobiquant.__all__) == set(mobiquant._HOMES)
    for name, home in mobiquant._HOMES.items():
        assert getattr(mobiquant, name) is getattr(importlib.import_module(f"mobiquant.{home}"), name)
    assert issubclass(mobiquant.InputError, ValueError)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        mobiquant.quantise  # noqa: B018


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path) or "mobiquant")
def test_every_module_imports(path):
    name = module_name(path)
    # kernels need what comes with CUDA builds of torch only, layers of a server need vLLM
    missing = "triton" if name.startswith("kernels.") else "vllm" if name == "serving.layers" else None
    if name != "__main__" and (missing is None or find_spec(missing) is not None):
        importlib.import_module(f"mobiquant.{name}".rstrip("."))
    else:
        compile(path.read_text(), path, "exec")


def test_the_order_names_every_module_and_no_other():
    assert {module_name(path) for path in FILES} - {""} == set(LEVELS)


@pytest.mark.parametrize("path", [path for path in FILES if module_name(path)], ids=module_name)
def test_imports_point_downwards(path):
    level = LEVELS[module_name(path)]
    upwards = [f"{path.name}:{line} imports {name}" for name, line in imported(path) if LEVELS[name] >= level]
    assert not upwards


def test_a_module_that_needs_torch_only_knows_nothing_of_the_package_but_slices_and_kernels():
    known = {"slices", "kernels", "kernels.descent", "kernels.cpu.descent"}
    for name in ("slices", "pack", "clip", "compensate"):
        assert {found for found, _ in imported(HOME / f"{name}.py")} <= known


@pytest.mark.parametrize("path", FILES, ids=lambda path: module_name(path) or "mobiquant")
def test_files_and_functions_are_short(path):
    check_short(path)
