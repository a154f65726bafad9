"""Whatever is stopped is stopped whole: no process of a cancelled, timed-out or drained run outlives it.

Agents that ignore signals, that stop themselves, that fork and that leave daemons in sessions of their own
run side by side, several of each kind in one run; the processes are counted in /proc by their mark.
`PITBOSS_TEST_ROUNDS` sets how many of each kind there are in the slow tests: a fiftieth of it.
"""
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

import checker
from tools import PITBOSS, PYTHON, Home, processes_with, read_events, read_records, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the verdict reads /proc")

COPIES = max(1, int(os.environ.get("PITBOSS_TEST_ROUNDS", "200")) // 50)
SHELL = '[agent.shell]\ncommand = ["sh"]\nformat = "text"\n'     # its prompt is a shell script

# Each script says that it is ready with READY, and then never ends by itself.
NASTY = {
    "hangs": ("demo", "READY\n$ hang"),
    "ignores": ("demo", "$ ignore\nREADY\n$ hang"),
    "daemon": ("demo", "$ daemon 1000\nREADY\n$ hang"),
    "stops": ("demo", "READY\n$ kill STOP\n$ hang"),
    "twice": ("demo", "$ run (setsid sh -c 'sleep 1000 & sleep 1000' &) >/dev/null 2>&1\nREADY\n$ hang"),
    "forks": ("shell", "sleep 1000 &\n(sleep 1000; true) &\nREADY\nsleep 1000"),
    "deaf": ("shell", "trap '' INT TERM HUP\n(sleep 1000; sleep 1000) &\nREADY\nsleep 1000; sleep 1000"),
    "holds": ("shell", "setsid sleep 1000 &\n(trap '' TERM; exec setsid sleep 1000) &\nREADY\nwait"),
    "breeds": ("shell", "trap '' INT TERM\nREADY\nwhile :; do sleep 0.3 & sleep 0.2; done"),
}
MEEK = {
    "demo": ("demo", "READY\n$ hang"),
    "shell": ("shell", "READY\nexec sleep 1000"),
    "forks": ("shell", "sleep 1000 &\nREADY\nsleep 1000"),
}


class Run(NamedTuple):
    """A run under way: its home, its dispatcher, its folder, the ids of its tasks."""
    home: Home
    dispatcher: subprocess.Popen
    folder: Path
    ids: list[str]

    def records(self) -> dict[str, str]:
        return {r["task_id"]: r["status"] for r in read_records(self.folder)}

    def alive(self) -> dict[int, str]:
        return processes_with(f"PITBOSS_RUN_ID={self.folder.name}")

    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_bytes())

    def signal(self, number: int) -> None:
        self.dispatcher.send_signal(number)

    def end(self, deadline_s: float = 40) -> int:
        """Wait for the dispatcher; its exit code."""
        out, err = self.dispatcher.communicate(timeout=deadline_s)
        assert "Traceback" not in err, err
        return self.dispatcher.returncode


def task(home: Home, name: str, agent: str, script: str, more: str = "") -> str:
    touch = f"touch {home.root}/ready.{name}"
    script = script.replace("READY", f"$ run {touch}" if agent == "demo" else touch)
    return (f"[[task]]\nid = '{name}'\nagent = '{agent}'\ndirectory = '{home.root}'\nuse_worktree = false\n"
            f"{more}\nprompt = '''\n{script}\n'''\n")


def start_tasks(home: Home, tasks: list[str], run: str = "") -> subprocess.Popen:
    manifest = home.manifest(f"[run]\nmax_parallel = {len(tasks)}\n{run}\n{SHELL}" + "".join(tasks))
    return home.start("dispatch", manifest)


def is_ready(home: Home, name: str) -> bool:
    return (home.root / f"ready.{name}").exists()


def start_all(home: Home, scripts: dict, copies: int = 1, more: str = "", run: str = "") -> Run:
    """Start `copies` of every script side by side; all are ready, and known to the journal, on return."""
    chosen = {f"{name}{n}": script for n in range(copies) for name, script in scripts.items()}
    dispatcher = start_tasks(home, [task(home, name, *script, more) for name, script in chosen.items()], run)
    wait_for(lambda: all(is_ready(home, name) for name in chosen) or dispatcher.poll() is not None, 120)
    assert dispatcher.poll() is None, dispatcher.communicate()
    folder = home.run_dir()
    wait_for(lambda: hands(folder, "hand_started") == len(chosen), 30, "every hand_started")
    return Run(home, dispatcher, folder, sorted(chosen))


def hands(folder: Path, kind: str) -> int:
    return sum(event["kind"] == kind for event in read_events(folder))


def all_are(run: Run, status: str) -> bool:
    """One record a task with this status in both files, and no living process."""
    assert checker.check_records(run.folder, run.ids) == []
    assert checker.check_processes(run.folder.name) == []
    assert run.records() == dict.fromkeys(run.ids, status)
    return True


# ---- cancel ----

def cancel_run(home: Home, scripts: dict, copies: int) -> None:
    """`cancel` returns when it has happened."""
    run = start_all(home, scripts, copies)
    assert len(run.alive()) >= len(run.ids)
    home.pitboss("cancel", run.folder.name, check=0)
    assert run.alive() == {}
    assert run.end() == 1
    assert all_are(run, "Cancelled")
    assert run.summary()["was_interrupted"] is True


def test_a_cancelled_run_leaves_nothing(home):
    cancel_run(home, MEEK, 1)


@pytest.mark.slow
def test_a_cancelled_run_of_nasty_agents_leaves_nothing(home):
    cancel_run(home, NASTY, COPIES)


def test_cancel_of_what_is_settled_is_refused(home):
    run = start_all(home, {"shell": MEEK["shell"]})
    home.pitboss("cancel", run.folder.name, check=0)
    assert run.end() == 1
    home.pitboss("cancel", run.folder.name, check=4)
    home.pitboss("cancel", "ffffffff", check=3)
    assert all_are(run, "Cancelled")


def cancel_dead_run(home: Home, scripts: dict, copies: int) -> None:
    run = start_all(home, scripts, copies)
    run.signal(signal.SIGKILL)
    run.dispatcher.wait(30)
    assert len(run.alive()) >= len(run.ids)
    home.pitboss("cancel", run.folder.name, check=0)
    assert all_are(run, "Cancelled")
    assert run.summary()["was_interrupted"] is True


def test_cancel_takes_over_a_run_whose_dispatcher_died(home):
    cancel_dead_run(home, MEEK, 1)


def test_wrong_prices_keep_nobody_from_cancelling(home):
    run = start_all(home, {"shell": MEEK["shell"]}, 1)
    run.signal(signal.SIGKILL)
    run.dispatcher.wait(30)
    prices = home.root / "home" / ".config" / "pitboss" / "prices.toml"
    prices.parent.mkdir(parents=True)
    prices.write_text("[model")
    refused = home.pitboss("resume", run.folder.name, check=2)
    assert str(prices) in refused.stderr and len(run.alive()) >= 1
    home.pitboss("cancel", run.folder.name, check=0)
    assert all_are(run, "Cancelled")


@pytest.mark.slow
def test_cancel_takes_over_a_dead_run_of_nasty_agents(home):
    cancel_dead_run(home, NASTY, COPIES)


def test_cancel_settles_what_waits_too(home):
    """Nothing new is started by a cancel: the waiting task never runs."""
    tasks = [task(home, "runs", *MEEK["shell"]), task(home, "waits", *MEEK["shell"])]
    manifest = home.manifest(f"[run]\nmax_parallel = 1\n{SHELL}" + "".join(tasks))
    dispatcher = home.start("dispatch", manifest)
    wait_for(lambda: is_ready(home, "runs"), 30)
    run = Run(home, dispatcher, home.run_dir(), ["runs", "waits"])
    home.pitboss("cancel", run.folder.name, check=0)
    assert run.end() == 1
    assert run.records()["runs"] == "Cancelled"
    assert run.records().get("waits", "Cancelled") == "Cancelled"
    assert len(run.records()) + run.summary()["tasks_not_started"] == 2
    assert not is_ready(home, "waits")
    assert run.alive() == {}


# ---- signals to the dispatcher ----

def drain_crew(home: Home) -> Run:
    """Two tasks run until the file `go` is there, two wait for their turn."""
    script = f"READY\nuntil [ -e {home.root}/go ]; do sleep 0.05; done"
    names = ["a", "b", "c", "d"]
    tasks = [task(home, name, "shell", script) for name in names]
    manifest = home.manifest(f"[run]\nmax_parallel = 2\n{SHELL}" + "".join(tasks))
    dispatcher = home.start("dispatch", manifest)
    wait_for(lambda: is_ready(home, "a") and is_ready(home, "b"), 30)
    run = Run(home, dispatcher, home.run_dir(), names)
    wait_for(lambda: hands(run.folder, "hand_started") == 2, 30)
    return run


def signal_and_see(run: Run, number: int, kind: str) -> None:
    run.signal(number)
    wait_for(lambda: hands(run.folder, kind), 30, kind)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_first_signal_drains(home, number, code):
    run = drain_crew(home)
    signal_and_see(run, number, "drained")
    (home.root / "go").touch()
    assert run.end() == code
    assert run.records() == {"a": "Success", "b": "Success"}
    assert run.summary()["tasks_not_started"] == 2
    assert run.summary()["was_interrupted"] is True
    assert not is_ready(home, "c") and not is_ready(home, "d")
    assert checker.check_processes(run.folder.name) == []


def test_resume_lifts_a_drain(home):
    run = drain_crew(home)
    signal_and_see(run, signal.SIGINT, "drained")
    run.signal(signal.SIGKILL)
    run.dispatcher.wait(30)
    (home.root / "go").touch()
    home.pitboss("resume", run.folder.name, check=0)
    assert all_are(run, "Success")


def test_the_first_signal_after_a_lifted_drain_drains_again(home):
    run = drain_crew(home)
    signal_and_see(run, signal.SIGINT, "drained")
    run.signal(signal.SIGKILL)
    run.dispatcher.wait(30)
    resumed = run._replace(dispatcher=home.start("resume", run.folder.name))
    wait_for(lambda: hands(run.folder, "dispatcher_started") == 2, 30)
    resumed.signal(signal.SIGINT)
    wait_for(lambda: hands(run.folder, "drained") == 2, 10, "a second drain")
    (home.root / "go").touch()
    assert resumed.end() == 130
    assert run.records() == {"a": "Success", "b": "Success"}


def interrupt_twice(home: Home, scripts: dict, copies: int) -> None:
    run = start_all(home, scripts, copies)
    signal_and_see(run, signal.SIGINT, "drained")
    run.signal(signal.SIGINT)
    assert run.end() == 130
    assert all_are(run, "Cancelled")
    assert run.summary()["was_interrupted"] is True


def test_a_second_signal_cancels(home):
    interrupt_twice(home, MEEK, 1)


@pytest.mark.slow
def test_a_second_signal_cancels_nasty_agents(home):
    interrupt_twice(home, NASTY, COPIES)


def test_two_signals_at_once_are_two(home):
    """The kernel may merge two of the same kind, so they are of two kinds; the first says the exit code."""
    run = start_all(home, MEEK)
    run.signal(signal.SIGTERM)
    run.signal(signal.SIGINT)
    assert run.end() in (130, 143)
    assert all_are(run, "Cancelled")


def test_a_third_signal_kills_at_once(home):
    deaf = {"deaf": NASTY["deaf"], "ignores": NASTY["ignores"]}
    run = start_all(home, deaf)
    signal_and_see(run, signal.SIGINT, "drained")
    signal_and_see(run, signal.SIGINT, "cancelled")
    at = time.monotonic()
    run.signal(signal.SIGINT)
    assert run.end() == 130
    assert time.monotonic() - at < 4, "the ladder was walked to its end"
    assert all_are(run, "Cancelled")


def test_a_hangup_changes_nothing(home):
    run = drain_crew(home)
    run.signal(signal.SIGHUP)
    (home.root / "go").touch()
    assert run.end() == 0
    assert all_are(run, "Success")


def test_the_signal_of_a_terminal_does_not_reach_the_agents(home):
    """Ctrl-C goes to the whole foreground group: agents are in sessions of their own."""
    names = ["a"]
    script = f"READY\nuntil [ -e {home.root}/go ]; do sleep 0.05; done"
    manifest = home.manifest(SHELL + task(home, "a", "shell", script))
    dispatcher = home.start("dispatch", manifest, start_new_session=True)
    wait_for(lambda: is_ready(home, "a"), 30)
    run = Run(home, dispatcher, home.run_dir(), names)
    os.killpg(dispatcher.pid, signal.SIGINT)
    wait_for(lambda: hands(run.folder, "drained"), 30)
    (home.root / "go").touch()
    assert run.end() == 130
    assert all_are(run, "Success")


# ---- timeouts ----

def time_out(home: Home, scripts: dict, copies: int, seconds: int) -> None:
    run = start_all(home, scripts, copies, more=f"timeout_secs = {seconds}")
    assert run.end(60) == 1
    assert all_are(run, "TimedOut")
    assert run.summary()["was_interrupted"] is False


def test_a_timed_out_agent_leaves_nothing(home):
    time_out(home, {"shell": MEEK["shell"]}, 2, 2)


@pytest.mark.slow
def test_timed_out_nasty_agents_leave_nothing(home):
    time_out(home, NASTY, COPIES, 20)


# ---- what a successful agent leaves running ----

LEAVERS = {
    "daemon": ("demo", "$ daemon 1000\nREADY"),
    "child": ("shell", "setsid sleep 1000 >/dev/null 2>&1 &\nREADY"),
    "stdout": ("shell", "sleep 1000 &\nREADY"),
}


@pytest.mark.slow
def test_what_a_successful_agent_leaves_running_is_ended(home):
    """`$ daemon` ignores TERM, so that the ladder is walked to its end; none of it changes the status."""
    dispatcher = start_tasks(home, [task(home, name, *script) for name, script in LEAVERS.items()])
    _, err = dispatcher.communicate(timeout=60)
    assert dispatcher.returncode == 0, err
    assert all_are(Run(home, dispatcher, home.run_dir(), sorted(LEAVERS)), "Success")


def test_a_child_left_behind_is_ended(home):
    """Also one that holds the agent's standard output: nobody waits for that."""
    scripts = {name: LEAVERS[name] for name in ("child", "stdout")}
    dispatcher = start_tasks(home, [task(home, name, *script) for name, script in scripts.items()])
    _, err = dispatcher.communicate(timeout=60)
    assert dispatcher.returncode == 0, err
    assert all_are(Run(home, dispatcher, home.run_dir(), sorted(scripts)), "Success")


def test_keep_children_leaves_them_alone_and_lists_them(home):
    dispatcher = start_tasks(home, [task(home, name, *script) for name, script in LEAVERS.items()],
                             "keep_children = true")
    out, err = dispatcher.communicate(timeout=60)
    assert dispatcher.returncode == 0, err
    run = Run(home, dispatcher, home.run_dir(), sorted(LEAVERS))
    alive = run.alive()
    assert len(alive) >= len(LEAVERS), alive
    assert [pid for pid in alive if str(pid) not in out + err] == [], (alive, out, err)
    assert set(run.records().values()) == {"Success"}


def test_keep_children_does_not_spare_the_cancelled(home):
    run = start_all(home, {"forks": MEEK["forks"]}, run="keep_children = true")
    home.pitboss("cancel", run.folder.name, check=0)
    assert run.end() == 1
    assert all_are(run, "Cancelled")


@pytest.mark.slow
def test_an_agent_that_lingers_after_its_result_is_stopped_and_successful(home):
    """Ten seconds after its input was closed it is stopped; the record is what the result said."""
    dispatcher = start_tasks(home, [task(home, "lingers", "demo", "$ linger")])
    _, err = dispatcher.communicate(timeout=60)
    assert dispatcher.returncode == 0, err
    assert all_are(Run(home, dispatcher, home.run_dir(), ["lingers"]), "Success")


# ------------------------------------------------------------------ a hand younger than the process table

SLOW_TABLE = """import os, sys
sys.path.insert(0, os.path.dirname(sys.argv[1]))
import pitboss
pitboss.POLL_S = 0.5        # the table of processes is read again after a quarter of a second at the earliest
sys.exit(pitboss.main(sys.argv[2:]))
"""
YOUNG = """[run]
max_workers = 1
budget_usd = 10.0
[defaults]
agent = "demo"
use_worktree = false
[lead]
id = "boss"
directory = "repo"
prompt = '''
$ call spawn_worker {"prompt": "$ hang"}
$ call pause_worker {"task_id": "<1.task_id>"}
$ call continue_worker {"task_id": "<1.task_id>"}
$ call cancel_worker {"task_id": "<1.task_id>"}
$ call wait_for_worker {"task_id": "<1.task_id>"}
'''
"""


@pytest.mark.slow
def test_a_hand_that_began_after_the_last_look_at_processes_is_stopped_too(home):
    (home.root / "repo").mkdir()
    (home.root / "slow.py").write_text(SLOW_TABLE)
    done = subprocess.run([PYTHON, home.root / "slow.py", PITBOSS, "dispatch", "-q", home.manifest(YOUNG)],
                          env=home.env, cwd=home.root, text=True, capture_output=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    records = {r["task_id"]: r for r in read_records(home.run_dir())}
    assert records["worker-1"]["status"] == "Cancelled" and records["worker-1"]["hands"] == 2


def start_the_file(home: Home, *args: object, program: Path = PITBOSS) -> subprocess.Popen:
    """The file itself, which Python compiles at every start, and not the compiled copy of most tests."""
    return subprocess.Popen([PYTHON, str(program), *map(str, args)], env=home.env, cwd=home.root, text=True,
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def arguments_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def resident_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def one_task(home: Home, script: str) -> Path:
    return home.manifest(f'{SHELL}[[task]]\nid = "a"\ndirectory = "{home.repo()}"\nuse_worktree = false\n'
                         f'agent = "shell"\nprompt = "{script}"\n')


def test_a_dispatcher_does_not_keep_what_compiling_the_file_took(home):
    dispatcher = start_the_file(home, "dispatch", one_task(home, "touch ../ready; sleep 1000"))
    wait_for((home.root / "ready").exists, 30)
    assert arguments_of(dispatcher.pid)[3] == f"{home.run_dir()}/self/start"
    assert resident_mb(dispatcher.pid) < 45           # 26 here; a process that compiled the file: 67
    dispatcher.send_signal(signal.SIGINT)
    dispatcher.send_signal(signal.SIGTERM)
    assert dispatcher.wait(30) in (130, 143)


def test_a_signal_on_the_way_to_the_pinned_copy_drains(home):
    dispatcher = start_the_file(home, "dispatch", one_task(home, "exit 0"))
    wait_for(lambda: "deal" in arguments_of(dispatcher.pid), 30)
    dispatcher.send_signal(signal.SIGINT)
    out, err = dispatcher.communicate(timeout=30)
    assert dispatcher.returncode == 130 and "Traceback" not in err, err
    assert hands(home.run_dir(), "drained") == 1 and (home.run_dir() / "summary.json").exists()


def test_a_newer_file_does_not_resume_through_an_older_copy(home):
    run = Run(home, start_the_file(home, "dispatch", one_task(home, "touch ../ready; while [ ! -e ../go ]; do sleep 0.1; done")),
              Path(), ["a"])
    wait_for((home.root / "ready").exists, 30)
    run.signal(signal.SIGKILL)
    run.dispatcher.wait(30)
    newer = home.root / "pitboss.py"
    newer.write_text(PITBOSS.read_text() + "# newer\n")
    resumed = start_the_file(home, "resume", home.run_dir().name, program=newer)
    wait_for(lambda: hands(home.run_dir(), "dispatcher_started") == 2, 30)
    assert str(newer) in arguments_of(resumed.pid)
    (home.root / "go").touch()
    assert resumed.wait(30) == 0


def test_a_signal_after_the_end_leaves_the_exit_code_alone(home):
    """From its summary on a dispatcher only reports."""
    for delay in range(12):
        dispatcher = home.start("dispatch", one_task(home, "exit 0") if delay == 0 else home.root / "m.toml")
        known = set(home.runs.glob("*/summary.json")) if home.runs.exists() else set()
        wait_for(lambda: set(home.runs.glob("*/summary.json")) - known, 30)
        time.sleep(delay * 0.003)          # somewhere between the summary and the end
        dispatcher.send_signal(signal.SIGTERM)
        assert dispatcher.wait(30) in (0, 143), dispatcher.stderr.read()
