"""Deprecated: `hal compare` is the package `hal_compare` of the distribution hal-compare.

This module and its submodules give the modules of the new package, so that both names mean the same objects.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_NEW = "hal_compare"

__path__: list[str] = []  # makes this module a package: its submodules are found by `_Moved`


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports `hal_nn.compare.x` as the module `hal_compare.x` itself, not as a second copy of it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        old, _, name = fullname.rpartition(".")
        if old != __name__ or importlib.util.find_spec(f"{_NEW}.{name}") is None:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"{_NEW}.{spec.name.rpartition('.')[2]}")
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has replaced it by the old name's


def _new_package() -> ModuleType:
    try:
        return importlib.import_module(_NEW)
    except ModuleNotFoundError as error:
        if error.name != _NEW:
            raise
        raise ModuleNotFoundError(
            "hal_nn.compare is now hal_compare, which is not installed: pip install hal-compare", name=_NEW
        ) from None


def __getattr__(name: str) -> Any:
    return getattr(_new_package(), name)


_new_package()
warnings.warn("hal_nn.compare is now hal_compare: import it from there", DeprecationWarning, stacklevel=2)
sys.meta_path.append(_Moved())
