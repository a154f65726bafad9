"""R7: the disk is full, the quota is used up, the disk is broken, there are no descriptors left."""
from __future__ import annotations

import json
import random
import resource
import shutil
import subprocess
from collections import Counter
from pathlib import Path

from deaths import faults_of_prefix
from trial import STRIDE, TESTS, Outcome, Trial

import checker
from test_crash import Crew, is_finished, make_crew, start_with_fault
from tools import ISOLATED, PYTHON, read_records

STARVED = TESTS / "chaos" / "starved.py"
WAYS = (("ENOSPC", "on"), ("EDQUOT", "once"), ("EIO", "once"), ("EMFILE", "once"))
CODES = (0, 1, 2, 5)      # done, something failed, nothing was started, the environment is at fault


def four_tasks(root: Path) -> Crew:
    return make_crew(root / "h", random.Random(5), 4, ("shell", "demo"), longest_s=0.05, parallel=2)


def starved(crew: Crew, name: str, how: str, n: int, *args) -> list[str]:
    """The command line of a starved program."""
    return [PYTHON, *ISOLATED, str(STARVED), name, how, str(n), str(crew.home.root / "count"), "--",
            *map(str, args)]


def count_calls(root: Path, name: str) -> int:
    """How many calls could fail so in a run in which none does."""
    root.mkdir(parents=True)
    crew = four_tasks(root)
    assert crew.start(argv=starved(crew, name, "once", 0, "dispatch", crew.manifest)).wait(120) == 0, crew.said()
    return int((crew.home.root / "count").read_text())


def corrupt_files(run_dir: Path) -> list[str]:
    """Files of a run that are not whole; those that were never published may be anything."""
    wrong = faults_of_prefix(run_dir) if (run_dir / "journal.jsonl").exists() else []
    for path in sorted(run_dir.rglob("*.json")) + sorted(run_dir.rglob("summary.jsonl")):
        if path.parent.name not in ("self", ".sessions") and "worktrees" not in path.parts:
            try:
                lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
                [json.loads(line) for line in lines]
            except ValueError as error:
                wrong.append(f"{path.relative_to(run_dir)} is not whole: {error}")
    return wrong


def check_starved(crew: Crew, code: int) -> None:
    """Whatever was missing: a documented exit code, words, and whole files."""
    said = crew.said()
    assert "Traceback" not in said and "bug in pitboss" not in said, f"exit {code}: {said[-1500:]}"
    assert code in CODES, f"exit {code}: {said[-1500:]}"
    for run_dir in crew.home.runs.glob("[!.]*") if crew.home.runs.exists() else ():
        assert not (wrong := corrupt_files(run_dir)), wrong


def runs_of(crew: Crew) -> list[Path]:
    return sorted(p for p in crew.home.runs.glob("[!.]*") if (p / "journal.jsonl").exists()) \
        if crew.home.runs.exists() else []


def go_on(crew: Crew) -> int:
    """What an operator does when there is room again, until all has succeeded; how many commands it took."""
    for attempt in range(4):
        runs = runs_of(crew)
        args = ("dispatch", crew.manifest) if not runs else ("resume", runs[-1].name)
        if runs and is_finished(runs[-1]):
            if {r["status"] for r in read_records(runs[-1])} == {"Success"}:
                check_work(crew, runs)
                return attempt
            args = (*args, "--failed")
        done = crew.home.pitboss(*args, timeout=120)
        assert done.returncode in (0, 1), f"{args}: exit {done.returncode}: {done.stderr[-1500:]}"
        assert "Traceback" not in done.stderr, done.stderr[-1500:]
    raise AssertionError(f"not all succeeded after four commands: {read_records(runs_of(crew)[-1])}")


def check_work(crew: Crew, runs: list[Path]) -> None:
    """Every line that a task wrote is where the record of its last run says."""
    records = {r["task_id"]: r for run_dir in runs for r in read_records(run_dir)}
    wrong = [fault for promise in crew.promises
             for fault in checker.check_work(records[promise.task], crew.repo, promise, once=False)]
    wrong += [fault for run_dir in runs for fault in checker.check_processes(run_dir.name)]
    assert not wrong, wrong


def starve_call(root: Path, name: str, how: str, n: int, in_resume: bool) -> int:
    """One call fails; then there is room again, and everything is done."""
    crew = four_tasks(root)
    try:
        args = ("dispatch", crew.manifest)
        if in_resume:
            assert start_with_fault(crew, "spawn.after", 2, *args)
            args = ("resume", crew.run_dir().name)
        code = crew.start(argv=starved(crew, name, how, n, *args)).wait(120)
        check_starved(crew, code)
        go_on(crew)
        return code
    except AssertionError as error:
        raise AssertionError(f"{name} {how} at call {n} of {'resume' if in_resume else 'dispatch'}: {error}") from error
    finally:
        crew.home.end_everything()


def small_disk(root: Path, number: int) -> int:
    """All of a home lies on a disk of a few megabytes, which is full at some time; then most of it is free."""
    chance, place = random.Random(number), root / "h"
    place.mkdir()
    size = f"size={chance.randint(900, 5000)}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(place)], check=True, capture_output=True)
    try:
        crew = four_tasks(root)
        code = crew.start("dispatch", crew.manifest).wait(120)
        check_starved(crew, code)
        subprocess.run(["mount", "-o", "remount,size=100m", str(place)], check=True, capture_output=True)
        go_on(crew)
        return code
    except AssertionError as error:
        raise AssertionError(f"a disk of {size}: {error}") from error
    finally:
        crew.home.end_everything()
        subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


def limited(root: Path, number: int) -> int:
    """The program may write files of some size only, or open so many."""
    chance, crew = random.Random(number), four_tasks(root)
    kind, value = chance.choice(((resource.RLIMIT_FSIZE, chance.randint(1, 400) << 10),
                                 (resource.RLIMIT_NOFILE, chance.randint(12, 60))))
    argv = ["prlimit", f"--{'fsize' if kind == resource.RLIMIT_FSIZE else 'nofile'}={value}:{value}",
            *crew.home.argv("dispatch", crew.manifest)]
    try:
        code = crew.start(argv=argv).wait(120)
        check_starved(crew, code)
        go_on(crew)
        return code
    except AssertionError as error:
        raise AssertionError(f"{argv[1]}: {error}") from error
    finally:
        crew.home.end_everything()


def can_mount(root: Path) -> bool:
    place = root / "mount"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(place)], capture_output=True)
    if done.returncode == 0:
        subprocess.run(["umount", str(place)], capture_output=True, check=True)
    return done.returncode == 0


def full_disk_is_survived(trial: Trial) -> Outcome:
    counts = {name: count_calls(trial.root / name, name) for name in {name for name, _ in WAYS}}
    calls = [(name, how, n, n % 3 == 0) for name, how in WAYS for n in range(1, counts[name] + 1)]
    mounts, limits = can_mount(trial.root) and shutil.which("mount"), shutil.which("prlimit")

    kinds = {"call": (len(calls), lambda root, n: starve_call(root, *calls[n * STRIDE % len(calls)])),
             **({"disk": (60, small_disk)} if mounts else {}), **({"limit": (60, limited)} if limits else {})}
    codes = [code for kind, (full, play) in kinds.items()
             for code in trial.rounds(trial.count(full), play, wide=2, kind=kind)]
    count = sum(trial.count(full) for full, _ in kinds.values())
    found = Counter(codes)
    told = ", ".join(f"{found[code]} left with {code}" for code in sorted(found))
    more = "" if mounts else "; no tmpfs can be mounted here"
    return Outcome(f"{len(codes)} of {count} faults ({told}), 0 corrupt files, 0 tracebacks, all resumed{more}"
                   if not trial.faults else f"{len(codes)} of {count} faults survived ({told}){more}",
                   len(codes) == count)
