"""Write a function of the method yourself; the project's own tests judge it.

    python -m exercises              # what there is, in reading order
    python -m exercises 7            # begin the seventh, and after that: judge what you wrote
    python -m exercises 7 --hint 1   # help; 2 and 3 say more
"""

import importlib.util
import sys
from pathlib import Path

from cli import Parser, UserError, atomic_write, between, run_program

from exercises.place import emptied, in_place, original
from exercises.stations import STATIONS

MINE, RUNS = Path("exercises/mine"), Path("runs/exercises")


def file_of(number):
    """Where the student writes the function of a station."""
    return MINE / f"{number:02}_{STATIONS[number - 1].function.rpartition('.')[2]}.py"


def begin(number):
    """Write the file of a station: the function, emptied."""
    station, path = STATIONS[number - 1], file_of(number)
    function = original(station)
    text = f"""# {number}. {station.title}: {station.function}. Write the body, then: python -m exercises {number}
# All that {function.__module__} has is at hand; helpers of your own may stand here, too.
from {function.__module__} import *


{emptied(function, path)}"""
    with atomic_write(path) as beside:
        beside.write_text(text, encoding="utf-8")


def judge(station):
    """Do the tests of a station pass? They print what fails."""
    import pytest

    return pytest.main([station.tests, "-k", station.chosen, "-x", "--tb=short", "-p", "no:cacheprovider"]) == 0


def list_stations():
    """Print a line for every station; those that were begun have a star."""
    for number, station in enumerate(STATIONS, 1):
        print(f"{number:3} {'*' if file_of(number).exists() else ' '} {station.title:36} {station.function}")
    print("begin, or judge what you wrote: python -m exercises NUMBER")


def practise(number):
    """Begin a station, or judge the student's function and show what it does. Exit code 1 where the tests fail."""
    station, path = STATIONS[number - 1], file_of(number)
    if not path.exists():
        begin(number)
    print(f"{number}. {station.title}: write {station.function} in {path}")
    print(f"   read:  {station.read}")
    print(f"   tests: python -m pytest {station.tests} -k '{station.chosen}'\n")
    with in_place(original(station), path):
        if not judge(station):
            print(f"\nnot yet: write {path} and run this again; --hint 1 helps, --hint 2 and 3 say more")
            sys.exit(1)
        from exercises import show  # which imports all that there is; a failure need not wait for it

        print("\nit passes; this is made with your function in place:")
        print(getattr(show, f"show_{station.shown}")(RUNS / f"{number:02}"))


def main(arguments=None):
    """List the stations, give a hint, or let one be judged."""
    parser = Parser(prog="python -m exercises", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("number", nargs="?", type=between(1, len(STATIONS)), metavar="N", help="an exercise (default: list them)")
    add("--hint", type=between(1, 3), default=0, metavar="K", help="the first K of three hints, of rising size")
    options = parser.parse_args(arguments)
    if not importlib.util.find_spec("pytest") or not importlib.util.find_spec("diffusers"):
        raise UserError("the packages of the tests are needed; run `make test` once")
    if options.number is None:
        list_stations()
    elif options.hint:
        print("\n".join(STATIONS[options.number - 1].hints[: options.hint]))
    else:
        practise(options.number)


if __name__ == "__main__":
    sys.argv[0] = "exercises"
    run_program(main)
