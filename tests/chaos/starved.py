"""Run pitboss and let some calls of the operating system fail: `starved.py ERRNO HOW N FILE -- ARGUMENTS`.

The N-th call that could fail so fails with ERRNO: HOW is `once`, or `on` for that one and all that follow.
FILE then says how many such calls there were.  No line of pitboss.py is changed.
"""
from __future__ import annotations

import builtins
import errno
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Callable

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from faults import load_pitboss  # noqa: E402


def takes_room(name: str) -> Callable:
    """Whether a call of that name wants space on a disk."""
    def creates(path, flags, *more, **named) -> bool:
        return bool(flags & os.O_CREAT)

    def is_file(fd, *more) -> bool:
        return stat.S_ISREG(os.fstat(fd).st_mode)

    return {"open": creates, "write": is_file, "pwrite": is_file}.get(name, lambda *args, **named: True)


def is_of_disk(name: str) -> Callable:
    """Whether a call of that name goes to a disk."""
    def is_file(fd, *more) -> bool:
        return stat.S_ISREG(os.fstat(fd).st_mode)

    def is_place(path, *more, **named) -> bool:
        return not str(path).startswith(("/proc/", "/dev/"))

    return {"write": is_file, "pwrite": is_file, "fsync": is_file, "open": is_place}.get(name, lambda *args, **named: True)


def always(name: str) -> Callable:
    return lambda *args, **named: True


ROOM = ("open", "write", "pwrite", "fsync", "replace", "rename", "mkdir", "link", "symlink")
CALLS = {       # errno: (calls of os that may fail so, which of them count, whether what opens other things does)
    "ENOSPC": (ROOM, takes_room, False),
    "EDQUOT": (ROOM, takes_room, False),
    "EIO": (("open", "write", "pwrite", "fsync", "replace", "rename", "mkdir"), is_of_disk, False),
    "EMFILE": (("open", "pipe", "posix_spawn", "pidfd_open", "scandir", "listdir"), always, True),
}


class Starver:
    """Counts the calls in all threads; says which of them fail."""

    def __init__(self, name: str, how: str, n: int) -> None:
        self.error, self.how, self.n = getattr(errno, name), how, n
        self.count, self.lock = 0, threading.Lock()

    def fails(self) -> bool:
        with self.lock:
            self.count += 1
            return self.count == self.n or self.how == "on" and self.count > self.n

    def around(self, real: Callable, counts: Callable) -> Callable:
        def call(*args, **named):
            if counts(*args, **named) and self.fails():
                raise OSError(self.error, os.strerror(self.error))
            return real(*args, **named)
        return call

    def starve(self, name: str) -> None:
        calls, counts, opens = CALLS[name]
        for call in calls:
            setattr(os, call, self.around(getattr(os, call), counts(call)))
        if opens:
            builtins.open = self.around(open, always("open"))
            for owner in (subprocess.Popen, socket.socket):
                owner.__init__ = self.around(owner.__init__, always("open"))


def main(arguments: list[str]) -> int:
    name, how, n, out = arguments[:4]
    assert arguments[4] == "--", arguments
    starver, program, write = Starver(name, how, int(n)), load_pitboss(), Path(out).write_text
    real_open = builtins.open
    starver.starve(name)
    try:
        return program.main(arguments[5:])
    finally:
        builtins.open = real_open
        starver.how, starver.n = "once", -1
        write(str(starver.count))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
