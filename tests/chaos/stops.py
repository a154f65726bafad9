"""R5, R9, R23, R24: what is stopped, what hangs, what clocks do, and signals in every phase of a run."""
from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import random
import signal
import subprocess
import termios
from pathlib import Path
from typing import NamedTuple

from trial import STRIDE, Outcome, Trial, all_of, home_in, let_pass

import checker
import test_stop
from test_crash import SHELL, is_finished, kinds, make_crew, state_of
from test_stop import NASTY
from tools import PITBOSS, PYTHON, Home, processes_with, read_events, read_records, wait_for


# ---- R5: nothing survives

def cancel_one(home: Home, scripts: dict) -> None:
    """An operator cancels the actors one by one; then nothing is left to run."""
    run = test_stop.start_all(home, scripts)
    for name in run.ids:
        home.pitboss("cancel", run.folder.name, name, check=0)
    assert run.end() == 1 and test_stop.all_are(run, "Cancelled")


WAYS = {
    "cancel": lambda home, scripts: test_stop.cancel_run(home, scripts, 1),
    "cancel of a dead run": lambda home, scripts: test_stop.cancel_dead_run(home, scripts, 1),
    "cancel of each": cancel_one,
    "timeout": lambda home, scripts: test_stop.time_out(home, scripts, 1, 8),
    "second Ctrl-C": lambda home, scripts: test_stop.interrupt_twice(home, scripts, 1),
}


def stop_nasty(root: Path, number: int) -> None:
    """Two agents that do not want to end are ended; not one process of this machine is left after 10 s."""
    home, chance = home_in(root), random.Random(number)
    way = list(WAYS)[number % len(WAYS)]
    scripts = {name: NASTY[name] for name in chance.sample(sorted(NASTY), 2)}
    try:
        WAYS[way](home, scripts)
        wait_for(lambda: not processes_with(f"XDG_DATA_HOME={home.root}"), 10, "the last process to go")
    except AssertionError as error:
        left = processes_with(f"XDG_DATA_HOME={home.root}")
        raise AssertionError(f"{way} of {', '.join(scripts)}: {error}; alive: {left}") from error
    finally:
        home.end_everything()


def nothing_survives(trial: Trial) -> Outcome:
    count = trial.count(500, 5)
    good = trial.rounds(count, stop_nasty, wide=4)
    return all_of(trial, good, count, " rounds, 0 processes after 10 s")


# ---- R9: hangs end

LIMIT_S, GRACE_S, LINGER_S = 3, 5, 10      # of the task; the stop ladder's; from a result to its agent's exit
MUTE = '[agent.mute]\ncommand = ["sleep", "1000"]\nformat = "claude"\n' \
       '[agent.deaf]\ncommand = ["sh", "-c", "trap \'\' INT TERM HUP; sleep 1000; sleep 1000"]\nformat = "claude"\n'


class Hang(NamedTuple):
    """Where an agent hangs; it must have ended `within_s`, with this status."""
    agent: str
    prompt: str
    within_s: float
    status: str = "TimedOut"


HANGS = {
    "before init": Hang("mute", "say nothing", LIMIT_S + GRACE_S),
    "deaf before init": Hang("deaf", "say nothing", LIMIT_S + GRACE_S),
    "in a tool": Hang("demo", "$ run sleep 1000", LIMIT_S + GRACE_S),
    "deaf in a tool": Hang("demo", "$ ignore\n$ run sleep 1000", LIMIT_S + GRACE_S),
    "stdin full": Hang("mute", "x" * 3_000_000, LIMIT_S + GRACE_S),
    "after result": Hang("demo", "$ say done\n$ linger", LINGER_S + GRACE_S, "Success"),
}


def hang_everywhere(root: Path, number: int) -> float:
    """One agent hangs at each place; by how much the slowest end came after its limit and the grace, in s."""
    home, late = home_in(root), []
    tasks = "".join(
        f"[[task]]\nid = 't{n}'\nagent = '{hang.agent}'\ndirectory = '{home.root}'\nuse_worktree = false\n"
        f"timeout_secs = {LIMIT_S if hang.status == 'TimedOut' else 600}\nprompt = '''\n{hang.prompt}\n'''\n"
        for n, hang in enumerate(HANGS.values()))
    try:
        home.pitboss("dispatch", "-q", home.manifest(f"[run]\nmax_parallel = {len(HANGS)}\n{MUTE}{tasks}"),
                     timeout=120, check=1)
        run_dir = home.run_dir()
        records = {r["task_id"]: r for r in read_records(run_dir)}
        for n, (where, hang) in enumerate(HANGS.items()):
            record = records[f"t{n}"]
            over_s = record["duration_ms"] / 1000 - hang.within_s
            assert record["status"] == hang.status, f"{where}: {record['status']} {record['failure_reason']}"
            assert over_s < 1, f"{where}: it ended {over_s:.1f} s after its limit and the grace"
            late.append(over_s)
        assert not (wrong := checker.check_processes(run_dir.name)), wrong
        return max(late)
    finally:
        home.end_everything()


def hangs_end(trial: Trial) -> Outcome:
    count = trial.count(17)
    late = trial.rounds(count, hang_everywhere, wide=2)
    return Outcome(f"{len(late) * len(HANGS)} of {count * len(HANGS)} ended, the last "
                   f"{max(late, default=0):+.1f} s after limit and grace", len(late) == count)


# ---- R23: clocks

SHIFTED = """import os, sys, time
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import pitboss
real, path = time.time, sys.argv[2]
def shifted():
    try:
        with open(path) as f: return real() + float(f.read() or 0)
    except OSError: return real()
time.time = shifted
sys.exit(pitboss.main(sys.argv[3:]))
"""


def start_shifted(home: Home, *args) -> subprocess.Popen:
    """The program with a wall clock that the number in the file `shift` is added to."""
    script = home.root / "shifted.py"
    script.write_text(SHIFTED)
    return subprocess.Popen(
        [PYTHON, str(script), str(PITBOSS), str(home.root / "shift"), *map(str, args)], env=home.env,
        cwd=home.root, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def timed_tasks(home: Home, work_s: float, timeout_s: int) -> Path:
    """Four tasks, two at a time, that need `work_s` and have `timeout_s`."""
    return home.manifest(f"[run]\nmax_parallel = 2\n{SHELL}" + "".join(
        f"[[task]]\nid = 't{n}'\nagent = 'shell'\ndirectory = '{home.root}'\nuse_worktree = false\n"
        f"timeout_secs = {timeout_s}\nprompt = 'touch ready.$PITBOSS_TASK_ID; sleep {work_s}'\n" for n in range(4)))


def jump(root: Path, number: int) -> int:
    """The wall clock goes a day forwards and back while tasks run, and once more over a death; its tasks."""
    home, chance = home_in(root), random.Random(number)
    shift = home.root / "shift"
    shift.write_text("0")
    try:
        dispatcher = start_shifted(home, "dispatch", timed_tasks(home, 1.5, 6))
        wait_for(lambda: (home.root / "ready.t0").exists() or dispatcher.poll() is not None, 30)
        days = chance.choice(((86400, -86400), (-86400, 86400), (86400, 0), (-86400, 0)))
        shift.write_text(str(days[0]))
        let_pass(chance.uniform(0.1, 0.8))
        if number % 2:
            dispatcher.kill()
            dispatcher.communicate()
            dispatcher = start_shifted(home, "resume", home.run_dir().name)
            let_pass(chance.uniform(0, 0.8))
        shift.write_text(str(days[1]))
        _, said = dispatcher.communicate(timeout=60)
        statuses = [r["status"] for r in read_records(home.run_dir())]
        assert dispatcher.returncode == 0 and statuses == ["Success"] * 4, f"{days}: {statuses} {said}"
        moments = [e["at"] for e in read_events(home.run_dir())]
        assert moments == sorted(moments), "the journal's time goes back"
        return len(statuses)
    finally:
        home.end_everything()


def sleep_over(root: Path, number: int, stopped_s: float) -> int:
    """The dispatcher is stopped for longer than its tasks have; they finish in time meanwhile."""
    home = home_in(root)
    try:
        manifest = timed_tasks(home, 0.5, 2)
        home.manifest(manifest.read_text().replace("max_parallel = 2", "max_parallel = 4"))
        dispatcher = home.start("dispatch", manifest)
        wait_for(lambda: len(list(home.root.glob("ready.*"))) == 4, 30, "all tasks to begin")
        dispatcher.send_signal(signal.SIGSTOP)
        wait_for(lambda: state_of(dispatcher.pid) == "T", 10)
        let_pass(stopped_s)
        dispatcher.send_signal(signal.SIGCONT)
        _, said = dispatcher.communicate(timeout=60)
        statuses = [r["status"] for r in read_records(home.run_dir())]
        assert dispatcher.returncode == 0 and statuses == ["Success"] * 4, f"{statuses} {said}"
        return len(statuses)
    finally:
        home.end_everything()


def clocks_fool_nobody(trial: Trial) -> Outcome:
    count, stopped_s = trial.count(40, 4), max(3.0, 60 * trial.scale)
    done = trial.rounds(count, lambda root, n: sleep_over(root, n, stopped_s) if n % 4 == 3 else jump(root, n),
                        wide=2)
    return Outcome(f"{sum(done)} tasks, clock a day off and dispatcher stopped {stopped_s:.0f} s, "
                   f"{len(trial.faults)} false timeouts", not trial.faults and bool(done))


# ---- R24: signals in every phase, on a terminal

class Seat:
    """A terminal with the program as its foreground job, and what it showed."""

    def __init__(self, home: Home, *args) -> None:
        self.ours, self.theirs = pty.openpty()
        self.before = self.settings()
        self.process = subprocess.Popen(
            home.argv(*args), env={**home.env, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"},
            cwd=home.root, stdin=self.theirs, stdout=self.theirs, stderr=self.theirs, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.set_blocking(self.ours, False)
        self.shown = b""

    def settings(self) -> str:
        """What `stty -g` says."""
        return subprocess.run(["stty", "-g"], stdin=self.theirs, check=True, text=True, capture_output=True).stdout

    def read(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            while data := os.read(self.ours, 1 << 16):
                self.shown += data

    def until(self, predicate, what: str, deadline_s: float = 60) -> None:
        """Wait for something, with the terminal read meanwhile."""
        def holds() -> bool:
            self.read()
            return self.process.poll() is not None or predicate()

        wait_for(holds, deadline_s, what)

    def end(self, deadline_s: float = 60) -> int:
        """The exit code, when it has left."""
        self.until(lambda: False, "the program's end", deadline_s)
        return self.process.returncode

    def faults(self) -> list[str]:
        """What of the terminal is not as it was."""
        self.read()
        wrong = [] if self.settings() == self.before else [f"stty: {self.before} became {self.settings()}"]
        for name, on, off in (("the cursor", b"\x1b[?25h", b"\x1b[?25l"),
                              ("the screen", b"\x1b[?1049l", b"\x1b[?1049h")):
            if self.shown.rfind(off) > self.shown.rfind(on):
                wrong.append(f"{name} was not given back")
        return wrong

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)


def has_begun(home: Home) -> bool:
    """Whether some run of this home has its first event."""
    return any(p.stat().st_size for p in home.runs.glob("[!.]*/journal.jsonl"))


def journal_has(home: Home, kind: str, count: int = 1) -> bool:
    return has_begun(home) and kinds(home.run_dir())[kind] >= count


PHASES = {       # name: (whether it has come, signals that bring it about)
    "starting": (lambda home: True, ()),
    "opened": (has_begun, ()),
    "running": (lambda home: journal_has(home, "hand_started", 2), ()),
    "draining": (lambda home: journal_has(home, "drained"), (signal.SIGINT,)),
    "cancelling": (lambda home: journal_has(home, "cancelled"), (signal.SIGINT, signal.SIGINT)),
    "ending": (lambda home: journal_has(home, "closed", 4), ()),
}
SIGNALS = {signal.SIGINT: (0, 130, 1), signal.SIGTERM: (0, 143, 130, 1), signal.SIGHUP: (0, 130, 1),
           signal.SIGWINCH: (0, 130, 1), signal.SIGTSTP: (0, 130, 1)}
OF_START = {signal.SIGINT: -signal.SIGINT, signal.SIGTERM: -signal.SIGTERM, signal.SIGHUP: -signal.SIGHUP}
CASES = [(phase, number) for phase in PHASES for number in SIGNALS]


def bring_about(home: Home, seat: Seat, phase: str, chance: random.Random) -> None:
    """Wait for a phase, with the signals that it needs."""
    has_come, needs = PHASES[phase]
    if phase == "starting":
        let_pass(chance.uniform(0, 0.6))
        return
    for nth, number in enumerate(needs):
        seat.until(lambda nth=nth: journal_has(home, ("hand_started", "drained")[nth], 1 + (nth == 0)), "its time")
        seat.process.send_signal(number)
    seat.until(lambda: has_come(home), phase)


def signal_in_phase(root: Path, number: int) -> str:
    """One signal in one phase of a dispatch on a terminal, and a resume where something is left to do."""
    phase, what = CASES[number * STRIDE % len(CASES)]
    chance = random.Random(number)
    crew = make_crew(root / "h", chance, 4, ("demo", "shell"), longest_s=1.0, parallel=2)
    home, seat = crew.home, None
    try:
        seat = Seat(home, "dispatch", crew.manifest)
        bring_about(home, seat, phase, chance)
        seat.process.send_signal(what)
        if what == signal.SIGTSTP:
            let_pass(0.3)
            seat.process.send_signal(signal.SIGCONT)
        code, finished = seat.end(), has_begun(home) and is_finished(home.run_dir())
        allowed = SIGNALS[what] + ((OF_START.get(what, 0),) if not finished else ())
        assert code in allowed, f"exit {code}, not one of {allowed}: {seat.shown[-800:]!r}"
        assert not (wrong := seat.faults()), wrong
        assert b"Traceback" not in seat.shown or is_before_main(seat, home), f"{seat.shown[-800:]!r}"
        if has_begun(home):
            first = (*PHASES[phase][1], what)[0]
            if finished and was_drained(home.run_dir()):
                want = 143 if first == signal.SIGTERM else 130
                assert code == want, f"exit {code}, not {want}, though a signal came before the last actor settled"
            check_what_is_left(crew, finished, phase, what)
        return phase
    except AssertionError as error:
        raise AssertionError(f"{what.name} while {phase}: {error}") from error
    finally:
        if seat:
            seat.close()
        home.end_everything()


def was_drained(run_dir: Path) -> bool:
    """Whether a signal was written down before some actor settled, or one never began."""
    seq = {e["kind"]: e["seq"] for e in read_events(run_dir)}      # of the last event of each kind
    return "drained" in seq and (seq["drained"] < seq.get("closed", 0) or len(read_records(run_dir)) < 4)


def is_before_main(seat: Seat, home: Home) -> bool:
    """Python itself was still reading the program: it says so in its own way, and there is no run yet."""
    return seat.shown.rstrip().endswith(b"KeyboardInterrupt") and b" in main" not in seat.shown and \
        not has_begun(home)


def check_what_is_left(crew, finished: bool, phase: str, what: signal.Signals) -> None:
    """A run that ended says so whole; one whose dispatcher went is gone on with."""
    run_dir = crew.run_dir()
    if not finished:
        assert phase in ("starting", "opened", "ending"), "the run did not come to its end"
        crew.home.pitboss("resume", run_dir.name, timeout=120, check=0)
    ids = [r["task_id"] for r in read_records(run_dir)]
    wrong = checker.check_records(run_dir, ids) + checker.check_journal(run_dir)
    assert not wrong, wrong
    assert not (alive := processes_with(f"PITBOSS_RUN_ID={run_dir.name}")), alive
    if what in (signal.SIGHUP, signal.SIGWINCH, signal.SIGTSTP) and phase not in ("draining", "cancelling"):
        statuses = {r["status"] for r in read_records(run_dir)}
        assert len(ids) == 4 and statuses == {"Success"}, f"{len(ids)} of 4, {statuses}"


def signals_do_as_documented(trial: Trial) -> Outcome:
    count = trial.count(10 * len(CASES), 5)
    good = trial.rounds(count, signal_in_phase, wide=2)
    return all_of(trial, good, count, f" signals in {len(set(good))} phases as documented, terminal restored")
