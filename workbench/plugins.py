"""The user's own functions, which --reward and --features name as module:function."""

import importlib
import os
import sys
from collections.abc import Callable

from workbench.errors import InputError, is_out_of_memory


def names_function(name: str) -> bool:
    """Whether `name` has the form module:function."""
    module, _, function = name.partition(":")
    return function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def named_function(option: str, name: str) -> Callable:
    """The function that an option names as module:function.

    The module is installed, or lies in the current folder. InputError if there is no such
    function."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module, function = name.split(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{option} {name}: {type(error).__name__}: {error}") from None
    if not callable(found):
        raise InputError(f"{option} {name}: {function} is a {type(found).__name__}, not a function")
    return found
