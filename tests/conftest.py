"""Settings of all tests: examples of property tests are few, always the same, and never timed."""

import functools
import inspect
import operator
import sys

import pytest
import torch
from beartype import BeartypeConf, beartype
from hypothesis import HealthCheck, settings

settings.register_profile(
    "mobiquant",
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("mobiquant")

# an int is a float, as PEP 484 says
annotations = beartype(conf=BeartypeConf(is_pep484_tower=True))
# calls of a function whose annotations are checked in a process: training calls some ten thousand times, all alike
CHECKED_CALLS = 1000


def checked(function):
    """Checks annotations where pytest is told `--jaxtyping-packages=mobiquant,conftest.checked`."""
    checking, left = annotations(function), CHECKED_CALLS

    @functools.wraps(function)
    def call(*args, **kwargs):
        nonlocal left
        left -= 1
        if not left and "<locals>" not in function.__qualname__:
            # jaxtyping asks the function itself at each call; what is wrapped in something else goes on being checked
            found = operator.attrgetter(function.__qualname__)(sys.modules[function.__module__])
            inspect.unwrap(getattr(found, "__func__", getattr(found, "fget", found))).__no_type_check__ = True
        return checking(*args, **kwargs)

    return call


# tensors here are small: on a busy machine threads that wait for each other make the tests ten times slower
torch.set_num_threads(1)

# blocks are compiled on a GPU, and checks of annotations cannot be traced: processes of their own test that (`unchecked`)
if torch.cuda.is_available():
    import torch._dynamo.config

    torch._dynamo.config.disable = True

# files that take longest, begun first: with files spread over processes, one of them last would be waited for alone
LONGEST = ("test_real_model", "test_full", "test_quality", "test_routing")


@pytest.fixture(scope="session", autouse=True)
def exact():
    """Products by torch operators, also in fixtures of whole files."""
    from mobiquant import matmul

    with matmul.exact():
        yield


@pytest.fixture(autouse=True)
def backend(request, monkeypatch):
    """The backend that users get, for tests that are about it (`@pytest.mark.backend`)."""
    if request.node.get_closest_marker("backend"):
        from mobiquant import matmul

        monkeypatch.setattr(matmul, "_only_exact", False)


def pytest_generate_tests(metafunc):
    if "instructions" in metafunc.fixturenames:
        from mobiquant.kernels.cpu import library

        metafunc.parametrize("instructions", library.instructions(), indirect=True)


@pytest.fixture
def instructions(request):
    """Every instruction set of this machine in turn, for the CPU kernels."""
    from mobiquant.kernels.cpu import library

    library.use(request.param)
    yield request.param
    library.use(library.instructions()[-1])


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
