"""The user's own functions, which --reward and --features name as module:function."""

import importlib
import os
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from workbench.errors import InputError, is_out_of_memory


def names_function(name: str) -> bool:
    """Whether `name` has the form module:function."""
    module, _, function = name.partition(":")
    return function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def named_function(option: str, name: str) -> Callable:
    """The function that an option names as module:function; prints the file that was read.

    InputError if there is no such function, or if its module cannot be imported."""
    module, function = name.split(":")
    try:
        imported = import_first_from_here(module)
    except SystemExit:  # argparse, for one, which does not know our options
        raise InputError(
            f"{option} {name}: {module} exits when it is imported: move its program, such as "
            'parsing arguments, under if __name__ == "__main__"'
        ) from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise InputError(f"{option} {name}: {type(error).__name__}: {error}") from None
    file = getattr(imported, "__file__", None) or "a module without a file"
    found = getattr(imported, function, None)
    if not callable(found):
        what = f"{function} is a {type(found).__name__}" if found is not None else "there is none"
        raise InputError(f"{option} {name}: {what}, not a function, in {file}")
    print(f"{option} {name}: from {file}")
    return found


def import_first_from_here(name: str) -> ModuleType:
    """The module in the current folder, as its file is now; else the installed one of that name.

    A file there called code.py or sample.py is not hidden by Python's or our own, nor hides it from
    anything else. What it imports itself may lie in the current folder, too."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    file = Path(*name.split(".")).with_suffix(".py").absolute()
    if not file.is_file():
        return importlib.import_module(name)
    spec = spec_from_file_location(name, file)
    module = module_from_spec(spec)
    if name not in sys.modules and name.partition(".")[0] not in sys.stdlib_module_names:
        sys.modules[name] = module  # where pickle and dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if sys.modules.get(name) is module:
            del sys.modules[name]
        raise
    return module
