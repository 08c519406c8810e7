"""A module that takes seconds to import, and that most workers do without."""

from __future__ import annotations

import importlib
from typing import Any


class Lazily:
    """The module of this name, imported when something in it is first asked for.

    For timm, and what imports it: test_promises.py imports every test file for its entries.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name), name)
