"""Names of packages that SGLang imports but that a CPU build of it lacks.

A stand-in can be imported and any public name can be taken from it, but calling one raises NotImplementedError, so
that a kernel that was expected never passes for one that ran.  The names are classes, not functions, because they are
also written in type annotations (`X | None`) and read like enums (`InterpolationMode.BICUBIC`) while modules load.
"""

import sys
from collections.abc import Sequence
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn


class _Absent(type):
    """The type of every stand-in name: its public attributes are stand-ins too, and nothing can be called."""

    def __getattr__(cls, attribute: str) -> "_Absent":
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return _absent(f"{cls.__qualname__}.{attribute}", cls.__module__)

    def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{cls.__module__}.{cls.__qualname__} is not in a CPU build of SGLang: kvtuner_sglang put an empty "
            "stand-in in its place, and this server called it; choose options that do without it."
        )


@cache
def _absent(qualname: str, module: str) -> _Absent:
    return _Absent(qualname.rpartition(".")[2], (), {"__module__": module, "__qualname__": qualname})


class AbsentModule(ModuleType):
    """A module that has every public name."""

    def __getattr__(self, name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return _absent(name, self.__name__)


class _SubmoduleFinder(MetaPathFinder, Loader):
    """Makes `import package.anything.below` an AbsentModule too."""

    def __init__(self, package: str) -> None:
        self._prefix = package + "."

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.startswith(self._prefix) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return AbsentModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run: names appear when they are asked for."""


def stand_in_for(package: str) -> None:
    """Turns the module that is being imported as `package` into a stand-in, with all its submodules."""
    sys.modules[package].__class__ = AbsentModule
    sys.meta_path.insert(0, _SubmoduleFinder(package))
