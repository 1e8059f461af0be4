"""Settings of all tests: examples of property tests are few, always the same, and never timed."""

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

# checks annotations where pytest is told `--jaxtyping-packages=mobiquant,conftest.checked`: an int is a float, as PEP 484 says
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))

# tensors here are small: on a busy machine threads that wait for each other make the tests ten times slower
torch.set_num_threads(1)

# files that take longest, begun first: with files spread over processes, one of them last would be waited for alone
LONGEST = ("test_real_model", "test_full", "test_quality", "test_routing")


@pytest.fixture(autouse=True)
def exact(request):
    """Products by torch operators, unless a test is about another backend (`@pytest.mark.backend`)."""
    from mobiquant import matmul

    if request.node.get_closest_marker("backend"):
        yield
    else:
        with matmul.exact():
            yield


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
