"""What every row of the proof is made of: how much of it to do, rounds side by side, what went wrong."""
from __future__ import annotations

import os
import random
import shutil
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, NamedTuple

TESTS = Path(__file__).resolve().parent.parent
for folder in (TESTS, TESTS.parent, TESTS / "bench"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from tools import Home  # noqa: E402

LANES = max(2, os.cpu_count() or 2)
STRIDE = 7919        # a prime: rounds 0, 1, 2, ... walk in such steps through all cases of a long list


class CannotRun(Exception):
    """This machine lacks what a row needs; the text says what."""


class Outcome(NamedTuple):
    """What a row measured: the figure as it is printed, and whether that is the one to reach."""
    measured: str
    reached: bool


class Trial:
    """One row under way: how much of the full table to do, a folder of its own, what went wrong so far."""

    def __init__(self, scale: float, root: Path, first: int = 0, lanes: int = LANES) -> None:
        self.scale, self.root, self.first, self.lanes = scale, root, first, lanes
        self.faults: list[str] = []

    def count(self, full: int, least: int = 1) -> int:
        """So many of the `full` table's rounds, and not less than `least`."""
        return max(least, round(full * self.scale))

    def rounds(self, count: int, play: Callable, wide: int = 1, kind: str = "") -> list:
        """Play so many rounds, some side by side; what each one that went well returned.

        `play(root, number)` has a folder of its own, which stays when the round fails, and a number to take
        its chances from.  `wide` is for rounds that mostly wait: so many more run at once; `kind` tells the
        rounds of one row apart.
        """
        with ThreadPoolExecutor(self.lanes * wide) as pool:
            played = list(pool.map(lambda n: self.play(play, n, kind), range(self.first, self.first + count)))
        return [value for went_well, value in played if went_well]

    def play(self, play: Callable, number: int, kind: str) -> tuple[bool, object]:
        """(whether it went well, what it returned) of one round."""
        root = self.root / f"{kind}{number:04}"
        root.mkdir(parents=True)
        try:
            value = play(root, number)
        except Exception as error:     # boundary: one round's failure is its own
            self.faults.append(f"round {number} in {root}: {explain(error)}")
            return False, None
        shutil.rmtree(root, ignore_errors=True)
        return True, value

    def check(self, what: str, wrong: list[str]) -> None:
        """Note what a checker found."""
        self.faults += [f"{what}: {fault}" for fault in wrong]


def explain(error: BaseException) -> str:
    """An error and where it came from, in a few lines."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    words = str(error) or frame.line or ""
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {words}"


def all_of(trial: Trial, good: list, count: int, more: str = "") -> Outcome:
    """The outcome of rounds that all had to go well."""
    return Outcome(f"{len(good)} of {count}{more}", len(good) == count and not trial.faults)


def home_in(root: Path) -> Home:
    """A user's machine in a folder of a round."""
    root = root / "h"
    root.mkdir()
    return Home(root)


def chance_of(number: int) -> random.Random:
    return random.Random(number)


def let_pass(seconds: float) -> None:
    """Let time pass: what is proved here is what happens, or does not, meanwhile."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))
