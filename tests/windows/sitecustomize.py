"""With this folder in PYTHONPATH, Python on Linux behaves as on Windows where our programs could notice it.

Processes are spawned; what only Unix has is not there; a file that is open or memory-mapped cannot be replaced, renamed
or removed, nor a folder that holds one; and only who may write to a file can have it written out.
"""

import errno
import fcntl
import os

for name in ("fork", "forkpty", "setpgrp", "getpgrp", "setsid", "killpg", "sched_getaffinity"):
    delattr(os, name)


def held_files():
    """The paths that this process has open or mapped."""
    with open("/proc/self/maps") as maps:
        yield from {line[line.index("/") :].rstrip("\n") for line in maps if "/" in line}
    for number in os.listdir("/proc/self/fd"):
        if os.path.exists(path := f"/proc/self/fd/{number}"):
            yield os.readlink(path)


def refusing(call):
    """A function of `os` that refuses paths which are held."""

    def wrapped(*paths, **others):
        for path in map(os.path.realpath, paths):
            if any(held == path or held.startswith(path + os.sep) for held in held_files()):
                raise PermissionError(errno.EACCES, "The process cannot access the file because it is in use", path)
        return call(*paths, **others)

    return wrapped


for name in ("replace", "rename", "unlink", "remove", "rmdir"):
    setattr(os, name, refusing(getattr(os, name)))
fsync = os.fsync


def write_out(file):
    if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    fsync(file)


os.fsync = write_out

import multiprocessing  # noqa: E402  after `os` has changed

multiprocessing.set_start_method("spawn", force=True)
