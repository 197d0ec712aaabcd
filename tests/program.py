"""A fixture for tests of a program: it runs inside the test's own process, as its own `__main__` runs it."""

import re
import sys

from cli import run_program

import pytest


def running(main, name):
    """The fixture: main with arguments -> (exit code, lines of stdout, the program's own lines of stderr)."""

    @pytest.fixture
    def program(capsys, monkeypatch):
        def run(*arguments):
            monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
            capsys.readouterr()
            code = 0
            try:
                run_program(main)
            except SystemExit as end:
                code = end.code
            captured = capsys.readouterr()
            own = f"{name}.py", f"mini.{name}"  # a progress bar's line begins otherwise
            errors = [line for line in re.split(r"[\r\n]", captured.err) if line.startswith(own)]
            return code, captured.out.splitlines(), errors

        return run

    return program
