"""Imports one module as soon as another has been imported, so that `import mobiquant` need not import transformers.

transformers has no entry points for quantisers: one exists once it has registered itself. A user who imports mobiquant and
then calls `AutoModelForCausalLM.from_pretrained` on a mobiquant folder must get the quantised model, whichever of the two
packages was imported first.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Follower(MetaPathFinder):
    """Finds nothing itself; adds to the loader of `leader` the import of `follower`."""

    def __init__(self, leader: str, follower: str):
        self.leader, self.follower = leader, follower

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self.leader:
            return None
        # ask the other finders, without this one
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            import_module(self.follower)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def when_imported(leader: str, follower: str) -> None:
    """Import `follower` right after `leader`, or now if `leader` has been imported."""
    if leader in sys.modules:
        import_module(follower)
    else:
        sys.meta_path.insert(0, _Follower(leader, follower))
