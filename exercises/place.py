"""A student's function in the place of the original, without a change of the sources.

A function that is imported elsewhere, stands in a table or is a default argument is one object, known in many places.
So that object stays, and its code is exchanged.
"""

import ast
import inspect
import pydoc
import sys
import textwrap
from contextlib import contextmanager

from cli import UserError, reported_as


def original(station):
    """The function of a station, without its decorators."""
    return inspect.unwrap(pydoc.locate(station.function))


def definition(function):
    """(a function's source without decorators and indentation, how many of its lines are signature and docstring)."""
    source = textwrap.dedent(inspect.getsource(function))
    node = ast.parse(source).body[0]
    lines = source.splitlines()[node.lineno - 1 :]
    return "\n".join(lines) + "\n", node.body[0].end_lineno - node.lineno + 1


def emptied(function, name):
    """A function's signature and docstring, with a body that says in which file (`name`) it is to be written."""
    source, lines = definition(function)
    head = "\n".join(source.splitlines()[:lines])
    return f'{head}\n    raise NotImplementedError("{name} has no body yet: write it there, in place of this line")\n'


@contextmanager
def in_place(function, path):
    """Within it, `function` does what the function of its name in the file `path` does.

    The file is run as if it stood at the end of the original's module: all names of the module are known to it and keep
    their meaning, and its own helpers are found. Raises UserError where it cannot be run or lacks the function.
    """
    module = vars(sys.modules[function.__module__])
    before, parts = dict(module), ("__code__", "__defaults__", "__kwdefaults__")
    kept = [getattr(function, part) for part in parts]
    try:
        with reported_as(f"{path} cannot be run"):
            exec(compile(path.read_text(encoding="utf-8"), path, "exec"), module)
        theirs = module.get(function.__name__)
        if not inspect.isfunction(theirs) or theirs is before.get(function.__name__):
            raise UserError(f"{path} lacks the function {function.__name__}; remove the file to start anew")
        for part in parts:
            setattr(function, part, getattr(inspect.unwrap(theirs), part))
        module.update(before)
        yield
    finally:
        for part, value in zip(parts, kept, strict=True):
            setattr(function, part, value)
        module.clear()
        module.update(before)
