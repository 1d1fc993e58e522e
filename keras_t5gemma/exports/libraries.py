"""The optional libraries of exports, and the names that CTranslate2 has for quantizations. Imports no Keras."""

from __future__ import annotations

import importlib
from types import ModuleType

# CTranslate2's names, and the bytes per weight.
QUANTIZATIONS = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int16": 2,
    "int8": 1,
    "int8_float32": 1,
    "int8_float16": 1,
    "int8_bfloat16": 1,
}


def imported(module: str, function: str, extra: str) -> ModuleType:
    """Imports an optional library.

    Raises:
        ImportError: if it is missing; the message names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"`{function}` needs the extra `{extra}`: `pip install 'keras-t5gemma[{extra}]'`. Importing {module} "
            f"failed: {error}"
        ) from error
