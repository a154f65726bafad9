"""Run pitboss and stop it at one exact moment: `python faults.py POINT.WHEN N -- ARGUMENTS OF PITBOSS`.

At the N-th call of the kind POINT the program stops itself with SIGSTOP, `before` or `after` the call, or
(writes) with `half` of its bytes written. Whoever started it sees the state T in /proc and sends SIGKILL:
the death comes from outside, at a known instruction. A run with fewer such calls ends as it always does.

POINT: journal (a write to journal.jsonl), journal:TEXT (one that holds TEXT), record (a write of
summary.jsonl or summary.json), fsync, replace, spawn (an agent's start), git (a command of git that changes
something; `after` means that git has ended).
"""
from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

GIT_CHANGES = {"worktree", "branch", "update-ref", "commit-tree", "add"}


def main(arguments: list[str]) -> int:
    point, _, when = arguments[0].rpartition(".")
    point, _, text = point.partition(":")
    FAULTS[point](Moment(int(arguments[1]), when), text.encode())
    assert arguments[2] == "--", arguments
    return load_pitboss().main(arguments[3:])


def load_pitboss():
    """pitboss.py as a module, without a word of its file changed."""
    path = Path(__file__).resolve().parent.parent / "pitboss.py"
    spec = importlib.util.spec_from_file_location("pitboss", path)
    module = sys.modules["pitboss"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Moment:
    """Counts the calls of one kind in all threads, and knows which of them is the one to stop at."""

    def __init__(self, n: int, when: str) -> None:
        self.left, self.when, self.lock = n, when, threading.Lock()

    def is_now(self) -> bool:
        with self.lock:
            self.left -= 1
            return self.left == 0

    def around(self, call, half=None):
        """Make the call; if its moment has come, stop before it, after it, or after `half` of it."""
        if not self.is_now():
            return call()
        if self.when == "before":
            stop_here()
        result = half() if self.when == "half" else call()
        stop_here()
        return result


def stop_here() -> None:
    """Stop this thread at this line, and the whole process with it."""
    signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)


def at_writes(moment: Moment, is_meant, text: bytes) -> None:
    real = os.write

    def write(fd, data):
        if text not in bytes(data) or not is_meant(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))):
            return real(fd, data)
        return moment.around(lambda: real(fd, data), lambda: real(fd, bytes(data)[:len(data) // 2]))
    os.write = write


def at_calls(moment: Moment, name: str) -> None:
    real = getattr(os, name)
    setattr(os, name, lambda *args, **named: moment.around(lambda: real(*args, **named)))


def at_git(moment: Moment) -> None:
    """Popen is where asyncio's subprocesses and the subprocess module's meet."""
    real = subprocess.Popen.__init__

    def start_and_wait(self, args, *more, **named):
        real(self, args, *more, **named)
        if moment.left == 0:
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def start(self, args, *more, **named):
        words = [os.fsdecode(a) for a in args] if isinstance(args, (list, tuple)) else []
        if not words or os.path.basename(words[0]) != "git" or not GIT_CHANGES & set(words):
            return real(self, args, *more, **named)
        return moment.around(lambda: start_and_wait(self, args, *more, **named))
    subprocess.Popen.__init__ = start


FAULTS = {
    "journal": lambda moment, text: at_writes(moment, lambda name: name == "journal.jsonl", text),
    "record": lambda moment, text: at_writes(moment, lambda name: "summary" in name, text),
    "fsync": lambda moment, text: at_calls(moment, "fsync"),
    "replace": lambda moment, text: at_calls(moment, "replace"),
    "spawn": lambda moment, text: at_calls(moment, "posix_spawn"),
    "git": lambda moment, text: at_git(moment),
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
