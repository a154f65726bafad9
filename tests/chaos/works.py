"""R6 and R16: worktrees, whatever was left in them and whoever dies, and many at once."""
from __future__ import annotations

import fcntl
import random
import subprocess
import threading
from pathlib import Path

from trial import TESTS, Outcome, Trial, home_in, let_pass

import checker
import test_worktrees
from test_crash import is_finished, state_of
from test_worktrees import POLICIES, branches, trees_of
from tools import ISOLATED, PYTHON, Home, git, read_records, wait_for
from trees import deal_cases

FAULTS = TESTS / "faults.py"
STATES = 10                 # in a run
KILLS = ("", "git.before", "git.after", "journal.half", "journal.after", "fsync.after")


class DeadlyHome(Home):
    """A home in which a dispatch is killed at one moment, and resumed."""

    moment, n = "", 0

    def pitboss(self, command, *args, **options) -> subprocess.CompletedProcess:
        if command != "dispatch" or not self.moment:
            return super().pitboss(command, *args, **options)
        argv = [PYTHON, *ISOLATED, str(FAULTS), self.moment, str(self.n), "--", command, *map(str, args)]
        with open(self.root / "out.txt", "w+") as out:
            process = subprocess.Popen(argv, env=self.env, cwd=self.root, stdin=subprocess.DEVNULL, stdout=out,
                                       stderr=out)
            wait_for(lambda: process.poll() is not None or state_of(process.pid) == "T", 300, "its moment")
            if process.poll() is None:
                process.kill()
            process.wait()
            out.seek(0)
            said = out.read()
        run_dir = self.run_dir()
        if is_finished(run_dir) and process.returncode >= 0:
            return subprocess.CompletedProcess(argv, process.returncode, said, said)
        return super().pitboss("resume", run_dir.name, **options)


def states_of_trees(root: Path, number: int) -> int:
    """Ten trees, each left in a state of its own, under one policy, with a death at one moment; how many."""
    chance, seed = random.Random(number), 5000 + number
    policy = POLICIES[number % 3 if number % 4 else 0]       # `always` is the dangerous one: more of it
    (root / "h").mkdir()
    home = DeadlyHome(root / "h")
    home.moment, home.n = KILLS[number % len(KILLS)], chance.randint(3, 60)
    cases = deal_cases(seed, STATES, seed % 2 == 0)
    try:
        repo, records, said = test_worktrees.run_cases(home, cases, policy, seed)
        wrong = test_worktrees.judge(home, cases, policy, repo, records, said)
        assert not wrong, f"killed at {home.moment} {home.n}: " + "; ".join(wrong[:4])
        return len(cases)
    finally:
        home.end_everything()


def no_work_is_lost(trial: Trial) -> Outcome:
    count = trial.count(300 // STATES, 2)
    good = trial.rounds(count, states_of_trees)
    return Outcome(f"{sum(good)} of {count * STATES} states × {len(POLICIES)} policies × {len(KILLS)} kill points, "
                   "all reachable" if len(good) == count else f"{sum(good)} of {count * STATES} states are sound",
                   len(good) == count)


def start_many(root: Path, number: int) -> int:
    """32 worktrees at once, while another process holds the lock, and makes worktrees of its own."""
    home = home_in(root)
    repo, ended = home.repo(), threading.Event()

    def compete() -> None:
        for n in range(1000):
            if ended.is_set():
                return
            git(repo, "worktree", "add", "-q", "--detach", str(home.root / f"by-hand{n}"), check=False)
            git(repo, "worktree", "remove", "--force", str(home.root / f"by-hand{n}"), check=False)

    (repo / ".git" / "pitboss").mkdir()
    other = threading.Thread(target=compete)
    try:
        with open(repo / ".git" / "pitboss" / "worktree.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tasks = [test_worktrees.task(repo, "true", f"t{n:02}") for n in range(32)]
            dispatcher = home.start("dispatch", test_worktrees.manifest(home, tasks, max_parallel=32))
            other.start()
            let_pass(2)
        said, err = dispatcher.communicate(timeout=120)
        ended.set()
        other.join(60)
        for tree in [t for t in trees_of(repo) if "by-hand" in t]:     # where the competitor's own removal failed
            git(repo, "worktree", "remove", "--force", "--force", tree)
        statuses = [r["status"] for r in read_records(home.run_dir())]
        assert statuses == ["Success"] * 32 and dispatcher.returncode == 0, f"{statuses} {err[-800:]}"
        assert branches(repo) == {"main"} and trees_of(repo) == [], f"stray: {branches(repo)} {trees_of(repo)}"
        wrong = checker.check_trees(home.run_dir(), repo) + checker.check_processes(home.run_dir().name)
        assert not wrong, wrong
        return len(statuses)
    finally:
        ended.set()
        home.end_everything()


def many_worktrees_start(trial: Trial) -> Outcome:
    count = trial.count(10)
    good = trial.rounds(count, start_many)
    return Outcome(f"{sum(good)} of {32 * count}, 0 stray branches" if len(good) == count else
                   f"{len(good)} of {count} rounds of 32", len(good) == count)
