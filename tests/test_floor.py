"""The floor in a real terminal: tmux types the keys and says what is on the screen.

Each terminal is a window of a private tmux server. What is looked for is waited for, with a deadline.
"""
from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pitboss
from stage import Stage
from tools import processes_with, program, wait_for

pytestmark = pytest.mark.skipif(not shutil.which("tmux"), reason="there is no tmux on PATH")
DEADLINE_S = 30
SPECIAL = {"tab": "Tab", "backtab": "BTab", "enter": "Enter", "esc": "Escape", " ": "Space", "up": "Up",
           "down": "Down", "left": "Left", "right": "Right", "home": "Home", "end": "End", "pgup": "PPage",
           "pgdn": "NPage", "f2": "F2", "ctrl-d": "C-d", "ctrl-u": "C-u", "backspace": "BSpace",
           "delete": "DC"}
RAW = {                            # as terminals send them: kitty's Ctrl-Enter; X10 mouse reports at column 4, row 5
    "ctrl-enter": "\x1b[13;5u", "click": "\x1b[M $%", "right-click": "\x1b[M\"$%",
    "wheel-up": "\x1b[M`$%", "wheel-down": "\x1b[Ma$%"}


class Terminal:
    """A window of a tmux server of its own, with a shell in it."""

    def __init__(self, home, columns: int = 80, rows: int = 24, **env: str) -> None:
        self.home = home
        folder = home.root / "tmp"
        self.sock = folder / f"tmux{len(list(folder.glob('tmux*')))}"
        env = {**home.env, "LC_ALL": "C.UTF-8", "PS1": "READY$ ", "HISTFILE": "/dev/null", **env}
        assigned = [f"{name}={value}" for name, value in env.items()]
        self.tmux("-u", "-f", "/dev/null", "new-session", "-d", "-x", str(columns), "-y", str(rows),
                  "-c", str(home.root), shlex.join(["env", *assigned, "sh"]), ";", "set", "-g", "status", "off",
                  ";", "set", "-g", "window-size", "manual")
        self.tmux("resize-window", "-x", str(columns), "-y", str(rows))
        self.wait("READY")

    def tmux(self, *args: str) -> str:
        done = subprocess.run(["tmux", "-S", str(self.sock), *args], capture_output=True, text=True,
                              env={**self.home.env, "LC_ALL": "C.UTF-8"}, timeout=20)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def screen(self) -> str:
        return self.tmux("capture-pane", "-p")

    def type(self, *keys: str) -> None:
        """Press keys, by the names that the key table has for them."""
        for key in keys:
            if key in RAW:
                self.tmux("send-keys", "-l", RAW[key])
            elif key in SPECIAL:
                self.tmux("send-keys", SPECIAL[key])
            else:
                self.tmux("send-keys", "-l", key)

    def wait(self, *wanted: str, absent: tuple = ()) -> str:
        """The screen once every pattern is on it, and none of `absent`."""
        shown = [""]

        def is_there():
            shown[0] = self.screen()
            return (all(re.search(w, shown[0], re.M) for w in wanted)
                    and not any(re.search(w, shown[0], re.M) for w in absent))

        try:
            wait_for(is_there, DEADLINE_S)
        except AssertionError:
            raise AssertionError(f"no {wanted} (without {absent}) on the screen:\n{shown[0]}") from None
        return shown[0]

    def floor(self, *args: str) -> None:
        """Start the floor, and the shell's word when it is left: `left N`."""
        command = shlex.join(self.home.argv("floor", *args))
        self.type(f"clear; {command}; echo left $?", "enter")
        self.wait(r"help|nothing needs you|needs you")

    def end(self) -> None:
        subprocess.run(["tmux", "-S", str(self.sock), "kill-server"], capture_output=True)


@pytest.fixture
def terminal(home):
    """A function that opens a terminal; all are closed at the end."""
    opened = []

    def open_one(*args, **options) -> Terminal:
        opened.append(Terminal(home, *args, **options))
        return opened[-1]

    yield open_one
    for one in opened:
        one.end()


@pytest.fixture
def stage(home):
    """A function that puts a run on; what it leaves is ended."""
    opened = []

    def put_on(**options) -> Stage:
        opened.append(Stage(home, **options))
        return opened[-1]

    yield put_on
    for one in opened:
        one.end()


def test_a_floor_is_left_with_q_and_the_terminal_is_as_before(stage, terminal):
    run = stage()
    run.spawn(run.lead(), "$ say here I am\n$ hang")
    screen = terminal()
    screen.type("stty -a >before", "enter")
    screen.floor()
    screen.wait("★ boss", "▸ worker-1", "← boss", "Running", "1 worker spawned")
    screen.type("q")
    screen.wait("left 0")
    screen.type("stty -a >after; echo ok", "enter")
    screen.wait("^ok")
    root = run.home.root
    assert (root / "before").read_text() == (root / "after").read_text()
    assert run.process.poll() is None, "the run goes on"


class Press:
    """One key in a view, and what is on the screen after it."""

    def __init__(self, key: str, *wanted: str, no: tuple | str = (), type: str = "") -> None:
        self.key, self.wanted = key, wanted
        self.absent = (no,) if isinstance(no, str) else no
        self.typed = type                # a text that is typed afterwards


BOSS, FIRST, LAST = "┏ ★ boss", "┏ ▸ worker-1", "┏ ▸ worker-3"
BACK = r"\d+ rows back"
ASKS = "─ approvals ─"


def both(one: str, other: str, *wanted: str, no: tuple | str = ()) -> list[Press]:
    """A key that does something and one that takes it back."""
    return [Press(one, *wanted, no=no), Press(other, no=wanted)]


def scrolls(up: tuple, down: tuple) -> list[Press]:
    """Keys that go up in a log, each taken back by one that goes down."""
    return [press for pair in zip(up, down) for press in both(*pair, BACK)]


DRIVEN = {
    # view: the keys that open it, then each of its keys with what is to be seen; a Press of "" is none
    "floor": ((), [
        Press("tab", "┏ ▸ worker-2"), Press("backtab", BOSS), Press("l", FIRST), Press("h", BOSS),
        Press("right", FIRST), Press("left", BOSS), Press("j", "┏ ▸ worker-3"), Press("k", BOSS),
        Press("down", "┏ ▸ worker-3"), Press("up", BOSS), Press("G", "┏ ▸ worker-4"), Press("g", BOSS),
        Press("end", "┏ ▸ worker-4"), Press("home", BOSS),
        Press("G", "▾ ★ sublead-1"), Press(" ", "▹ ★ sublead-1", no="▸ worker-4"), Press(" ", "▾ ★ sublead-1", "▸ worker-4"),
        Press("enter", "▹ ★ sublead-1", no="▸ worker-4"), Press("enter", "▸ worker-4"), Press("g", BOSS), Press("l", FIRST),
        *scrolls(("K", "ctrl-u", "pgup", "wheel-up"), ("J", "ctrl-d", "pgdn", "wheel-down")),
        Press("enter", "who +boss→worker-1"), Press("esc", "╰ ← boss"),
        Press("a", ASKS, "may I"), Press("right-click", no=ASKS),
        Press("p", "worker-1 is paused", "Paused"), Press("c", "worker-1 goes on", "Running"),
        Press("f", "worker-1 is frozen", "Frozen"), Press("c", "worker-1 goes on", no="Frozen"),
        Press("r", "tell worker-1"), Press("esc", no="tell worker-1"),
        Press("x", "Cancel worker-1"), Press("esc", no="Cancel worker-1"), Press("X", "Cancel the whole run"),
        Press("esc", no="Cancel the whole"), Press("P", "approval rules"), Press("esc", no="approval rules"),
        Press("o", "─ runs ─"), Press("esc", no="─ runs ─"), Press("L", "worker-1: log"), Press("esc", no="worker-1: log"),
        Press("/", "show only", type="haiku"), Press("enter", "filter: haiku", "worker-2", no="worker-1"),
        Press("esc", "worker-1", no="filter"), Press("C", "settled ones hidden", no="▸ worker-2"), Press("C", "▸ worker-2"),
        Press("v", "^  ▸ worker-1", no="╭"), Press("v", "╭"), Press("click", "who +boss  lead"), Press("esc", "╰ ← boss"),
        Press("?", "fold or unfold the group"), Press("?", no="fold or unfold"), Press("q", "left 0")]),
    "detail": (("l", "enter"), [
        Press("", "who +boss→worker-1", "task ", "tokens", "changes +it has no worktree"),
        *scrolls(("k", "K", "up", "ctrl-u", "pgup", "wheel-up", "g", "home"),
                 ("j", "J", "down", "ctrl-d", "pgdn", "wheel-down", "G", "end")),
        Press("/", "look in the log", type="line 11"), Press("enter", "/line 11", "line 11$"),
        Press("n", "no other line 11 above"), Press("N", "no other line 11 below"),
        Press("p", "worker-1 is paused"), Press("c", "worker-1 goes on"), Press("f", "worker-1 is frozen"), Press("c", "worker-1 goes on"),
        Press("r", "tell worker-1"), Press("esc", no="tell worker-1"), Press("a", ASKS), Press("esc", no=ASKS),
        Press("x", "Cancel worker-1"), Press("n", no="Cancel worker-1"), Press("X", "Cancel the whole run"), Press("q", no="Cancel the"),
        Press("P", "approval rules"), Press("esc", no="approval rules"), Press("o", "─ runs ─"), Press("esc", no="─ runs ─"),
        Press("L", "worker-1: log"), Press("esc", no="worker-1: log"), Press("?", "one actor"), Press("q", no="one actor"),
        Press("click", "who "), Press("right-click", "╰ ← boss"), Press("enter", "who "), Press("esc", "╰ ← boss"),
        Press("enter", "who "), Press("q", "left 0")]),
    "log": (("l", "L"), [
        Press("", "worker-1: log", "line 59"),
        *scrolls(("k", "K", "up", "ctrl-u", "pgup", "wheel-up", "g", "home"),
                 ("j", "J", "down", "ctrl-d", "pgdn", "wheel-down", "G", "end")),
        Press("/", "look in the log", type="line 2"), Press("enter", "/line 2", "line 29$"), Press("n", "line 28$", BACK),
        Press("N", "line 29$", BACK),
        Press("p", "worker-1 is paused"), Press("c", "worker-1 goes on"), Press("f", "worker-1 is frozen"), Press("c", "worker-1 goes on"),
        Press("r", "tell worker-1"), Press("esc", no="tell worker-1"), Press("a", ASKS), Press("esc", no=ASKS),
        Press("x", "Cancel worker-1"), Press("n", no="Cancel worker-1"), Press("X", "Cancel the whole run"), Press("n", no="Cancel the"),
        Press("P", "approval rules"), Press("esc", no="approval rules"), Press("o", "─ runs ─"), Press("esc", no="─ runs ─"),
        Press("?", "a whole log"), Press("esc", no="a whole log"), Press("click", "worker-1: log"),
        Press("right-click", "╰ ← boss"), Press("L", "worker-1: log"), Press("esc", "╰ ← boss"), Press("L", ": log"), Press("q", "left 0")]),
    "approvals": (("a",), [
        Press("", "may I do this 0", "may I do this 5"),
        *[Press(key, ASKS) for key in ("j", "k", "down", "up", "G", "g", "end", "home", "ctrl-d", "ctrl-u", "pgdn", "pgup",
                                       "wheel-down", "wheel-up")],
        Press("j", ASKS), Press("enter", "IN-FLIGHT ACTION", "may I do this 1"), Press("esc", no="IN-FLIGHT"),
        Press("y", "approved", no="this 0"), Press("j", ASKS), Press("n", "why not"), Press("esc", no="why not"),
        Press("e", "approve this instead", "this"), Press("esc", no="instead"), Press("?", "reject it"), Press("esc", no="reject it"),
        Press("click", ASKS), Press("right-click", "╰ ← boss"), Press("a", ASKS), Press("esc", no=ASKS), Press("a", ASKS),
        Press("q", "left 0")]),
    "ask": (("a", "enter"), [
        Press("", "IN-FLIGHT ACTION", "RISKS", "- it is late", "may I do this 0"),
        *[Press(key, "IN-FLIGHT") for key in ("j", "k", "down", "up", "J", "K", "ctrl-d", "ctrl-u", "pgdn", "pgup",
                                              "wheel-down", "wheel-up", "click")],
        Press("?", "one request"), Press("esc", no="one request"), Press("n", "why not", type="too late"), Press("f2", "rejected", no="this 0"),
        Press("enter", "may I do this 1"), Press("e", "approve this instead", type=" but slowly"), Press("f2", "approved, changed", no="this 1"),
        Press("enter", "may I do this 2"), Press("y", "approved", no="this 2"), Press("enter", "may I do this 3"), Press("esc", no="IN-FLIGHT"),
        Press("enter", "may I do this 3"), Press("right-click", no="IN-FLIGHT"), Press("enter", "may I do this 3"), Press("q", "left 0")]),
    "policy": (("P",), [
        Press("", "no rules; n makes one", "block +whatever no rule matches"), Press("n", "0 block", "changed: s saves"), Press(" ", "0 auto_approve"),
        Press("l", "0 auto_approve"), Press(" ", "0 auto_approve +boss"), Press("right", "boss"), Press("enter", "boss +tool_use"),
        Press("right", "boss"), Press("enter", "tool_name \\(empty", type="Bash"), Press("enter", "tool_use +Bash"), Press("left", "Bash"),
        Press("h", "Bash"), Press("n", "1 block"), *[Press(key, "1 block") for key in ("k", "j", "up", "down", "g", "G", "home", "end",
        "ctrl-u", "ctrl-d", "pgup", "pgdn", "wheel-up", "wheel-down", "click")], Press("G", "1 block"), Press("K", "0 block", "1 auto_approve"),
        Press("J", "0 auto_approve", "1 block"), Press("s", "2 rules are in force", no="changed"), Press("d", "changed", no="1 block"),
        Press("f2", "1 rule is in force", no="changed"), Press("?", "a new rule"), Press("esc", no="a new rule"), Press("esc", no="approval rules"),
        Press("P", "0 auto_approve +boss +tool_use +Bash"), Press("right-click", no="approval rules"), Press("P", "Bash"), Press("q", "left 0")]),
    "runs": (("o",), [
        *[Press(key, "─ runs ─", "▸ [0-9a-f]{8}") for key in ("j", "k", "down", "up", "G", "g", "end", "home", "ctrl-d", "ctrl-u", "pgdn", "pgup",
                                       "wheel-down", "wheel-up", "click")],
        Press("?", "show the picked run"), Press("esc", no="show the picked"), Press("esc", no="─ runs ─"), Press("o", "─ runs ─"),
        Press("right-click", no="─ runs ─"), Press("o", "─ runs ─"), Press("enter", "▸ worker-1"), Press("o", "─ runs ─"), Press("q", "left 0")]),
    "confirm": (("l", "x"), [
        Press("n", no="Cancel worker-1"), Press("x", "Cancel worker-1"), Press("q", no="Cancel worker-1"), Press("x", "Cancel worker-1"),
        Press("esc", no="Cancel worker-1"), Press("x", "Cancel worker-1"), Press("right-click", no="Cancel worker-1"),
        Press("x", "Cancel worker-1"), Press("r", "why is worker-1 cancelled", type="wrong branch"), Press("f2", "Cancelled ⊘"),
        Press("L", "line 59"), Press("esc", BOSS[2:]), Press("X", "Cancel the whole run"), Press("y", "cancelled|Cancelled ⊘", r"\bcomplete\b|cancelling")]),
    "box": (("l", "r"), [
        Press("", "tell worker-1", type="one"), Press("enter", "one", type="two"), Press("esc", no="tell worker-1"),
        Press("r", "tell worker-1", no="one", type="$ say I was told"), Press("enter", "was told", type="$ hang"), Press("f2", r"worker-1 was told \((input|resume)\)", "> I was told"),
        Press("r", "tell worker-1", type="$ say again"), Press("ctrl-enter", r"worker-1 was told", "> again")]),
    "help": (("?",), [
        Press("", "the floor", no="leave the help"), Press("G", "leave the help"), Press("g", no="leave the help"), Press("end", "leave the help"),
        Press("home", no="leave the help"), *[Press(key, "more lines") for key in ("j", "k", "down", "up", "ctrl-d", "ctrl-u", "pgdn", "pgup", "wheel-down",
        "wheel-up", "click")], Press("q", no="the floor"), Press("?", "the floor"), Press("?", no="the floor"), Press("?", "the floor"),
        Press("esc", no="the floor"), Press("?", "the floor"), Press("right-click", no="the floor")]),
}
LINES = "\n".join(f"$ say line {n}" for n in range(60)) + "\n$ hang"
PLAN = {"summary": "x", "risks": ["it is late"]}


def test_every_key_of_the_table_is_pressed_below():
    pressed = {(view, press.key) for view, (_, presses) in DRIVEN.items() for press in presses if press.key}
    assert set(pitboss.KEY_INDEX) - pressed == set()


@pytest.mark.slow
@pytest.mark.parametrize("view", DRIVEN)
def test_every_key_does_what_its_help_says(stage, terminal, view):
    run = stage(lead="allow_subleads = true")
    lead = run.lead()
    run.spawn(lead, LINES)
    run.spawn(lead, "$ fail it broke", model="claude-haiku-4-5")
    run.spawn(lead, "$ hang")
    requests = 6 if view in ("approvals", "ask") else 1
    for n in range(requests):
        lead.start("request_approval", {"summary": f"may I do this {n}", "plan": PLAN})
        wait_for(lambda: len(run.events("approval_asked")) > n, DEADLINE_S, "the request")
    if view == "floor":
        lead.call("spawn_sublead", prompt="$ call spawn_worker {\"prompt\": \"$ hang\"}\n$ hang", model="claude-opus-4-8",
                  budget_usd=9, max_workers=2)
        wait_for(lambda: (run.run / "tasks/worker-4/stdout.log").exists(), DEADLINE_S, "a worker of the sub-lead")
    wait_for(lambda: run.events("closed", actor="worker-2"), DEADLINE_S, "a failure")
    screen = terminal()
    screen.floor()
    screen.wait(BOSS, "worker-3", "✗ 1")
    opens, presses = DRIVEN[view]
    screen.type(*opens)
    for press in presses:
        screen.type(*([press.key] if press.key else []))
        screen.wait(*press.wanted, absent=press.absent)
        if press.typed:
            screen.type(press.typed)
            screen.wait(re.escape(press.typed))
    if view == "confirm":
        run.settle(1)
        assert run.events("stop_decided", actor="worker-1")[0]["reason"] == "wrong branch"
        assert not processes_with(f"PITBOSS_RUN_ID={run.run.name}")
    elif view == "ask":
        answers = [e["answer"] for e in run.events("approval_decided")]
        assert answers == [{"approved": False, "reason": "too late"},
                           {"approved": True, "edited_summary": "may I do this 1 but slowly"}, {"approved": True}]
    elif view == "policy":
        assert [e["rules"] for e in run.events("policy_set")] == [
            [["boss", "tool_use", "Bash", None, "auto_approve"], [None, None, None, None, "block"]],
            [["boss", "tool_use", "Bash", None, "auto_approve"]]]
    elif view == "box":
        assert run.heard("worker-1")[-2:] == ["$ say I was told\n$ hang", "$ say again"]


# ------------------------------------------------------------------ the terminal is given back

def pid_of_floor(run: Stage) -> int:
    """The one process that shows the run."""
    def found():
        return [pid for pid, line in processes_with(f"HOME={run.home.root}/home").items() if " floor" in line
                and "tmux" not in line and not line.startswith("sh")]
    return wait_for(found, DEADLINE_S, "the floor's process")[0]


def settings(screen: Terminal, name: str) -> str:
    """What `stty` says of the terminal."""
    path = screen.home.root / name
    screen.type(f"stty -a >{path}.new; mv {path}.new {path}", "enter")
    wait_for(path.exists, DEADLINE_S, "stty")
    return path.read_text()


@pytest.mark.parametrize("signal_name, code", [("TERM", 143), ("HUP", 129), ("INT", 0)])
def test_a_signal_ends_the_floor_and_the_terminal_is_as_before(stage, terminal, signal_name, code):
    run = stage()
    screen = terminal()
    before = settings(screen, "before")
    screen.floor()
    screen.wait("★ boss")
    os.kill(pid_of_floor(run), getattr(signal, f"SIG{signal_name}"))
    screen.wait(f"left {code}")
    assert settings(screen, "after") == before
    assert run.process.poll() is None


def test_ctrl_c_leaves_the_floor_alone(stage, terminal):
    run = stage()
    screen = terminal()
    screen.floor()
    screen.wait("★ boss")
    screen.tmux("send-keys", "C-c")
    screen.wait("left 0")
    assert run.process.poll() is None


def test_the_floor_can_be_suspended_and_comes_back(stage, terminal):
    stage()
    screen = terminal()
    before = settings(screen, "before")
    screen.type("set -m", "enter")
    screen.floor()
    screen.wait("★ boss")
    screen.tmux("send-keys", "C-z")
    screen.wait(r"READY\$ *$", "Stopped|Suspended")
    assert settings(screen, "after") == before
    screen.type("fg", "enter")
    screen.wait("★ boss", "help", absent=("Stopped",))
    screen.type("?")
    screen.wait("this help")


def test_a_floor_whose_shell_is_killed_ends(stage, terminal):
    run = stage()
    screen = terminal()
    screen.floor()
    screen.wait("★ boss")
    floor = pid_of_floor(run)
    shell = int(screen.tmux("display-message", "-p", "#{pane_pid}"))
    os.kill(shell, signal.SIGKILL)
    wait_for(lambda: floor not in processes_with(f"HOME={run.home.root}/home"), DEADLINE_S, "its end")
    assert run.process.poll() is None


def test_a_terminal_that_goes_without_a_signal_ends_the_floor(stage):
    run = stage()
    ours, theirs = pty.openpty()
    env = {**run.home.env, "TERM": "xterm", "LC_ALL": "C.UTF-8"}
    floor = subprocess.Popen(run.home.argv("floor"), stdin=theirs, stdout=theirs, stderr=theirs, env=env,
                             start_new_session=True)     # in no session of that terminal: nobody sends it HUP
    os.close(theirs)
    shown = b""
    while b"boss" not in shown:
        shown += os.read(ours, 1 << 16)
    os.close(ours)
    assert floor.wait(DEADLINE_S) == -signal.SIGHUP


def test_a_bug_gives_the_terminal_back_too(stage, terminal, home):
    """A floor that breaks in the middle: the frame of a run whose events cannot be drawn."""
    run = stage()
    screen = terminal()
    before = settings(screen, "before")
    screen.floor()
    screen.wait("★ boss")
    with open(run.run / "journal.jsonl", "a") as f:        # no event of ours looks like this
        f.write('{"seq": 9999, "at": 1.0, "kind": "closed", "actor": "nobody"}\n')
    screen.wait("this is a bug in pitboss", "left 70")
    assert settings(screen, "after") == before


@pytest.mark.parametrize("columns, rows", [(40, 12), (120, 40), (20, 5)])
def test_a_terminal_that_changes_its_size(stage, terminal, columns, rows):
    run = stage()
    run.spawn(run.lead(), "$ hang")
    screen = terminal()
    screen.floor()
    screen.wait("▸ worker-1")
    screen.tmux("resize-window", "-x", str(columns), "-y", str(rows))
    run_id = run.run.name[:8]
    frame = screen.wait(f"^ {run_id}" if rows > 7 else "boss")
    wait_for(lambda: len(screen.screen().splitlines()) <= rows and "boss" in screen.screen(), DEADLINE_S)
    assert all(len(line) <= columns for line in frame.splitlines())
    screen.tmux("resize-window", "-x", "80", "-y", "24")
    screen.wait("╭|┏", "▸ worker-1", "help")


# ------------------------------------------------------------------ what is shown

def test_a_dispatcher_that_dies_is_told_of_and_the_floor_goes_on(stage, terminal):
    run = stage()
    lead = run.lead()
    run.spawn(lead, "$ say still here\n$ hang")
    screen = terminal()
    screen.floor()
    screen.wait("▸ worker-1", "running")
    run.process.kill()
    run.process.wait()
    screen.wait("pitboss resume [0-9a-f-]+: its dispatcher died; 2 agents", "stale")
    screen.type("l", "p")
    screen.wait("pitboss resume [0-9a-f-]+ goes on, pitboss cancel")
    run.process = run.home.start("resume", run.run.name, stdout=run.log, stderr=run.log)
    screen.wait("running", absent=("2 agents",))
    screen.type("f")
    screen.wait("worker-1 is frozen")


def test_a_run_that_ends_stays_on_the_screen(stage, terminal):
    run = stage()
    screen = terminal()
    screen.floor()
    screen.wait("★ boss", "running")
    run.finish()
    screen.wait("complete", "Success ✓")
    screen.type("x", "y")
    screen.wait("this run has settled")


def test_two_floors_show_what_one_of_them_did(stage, terminal):
    run = stage()
    run.spawn(run.lead(), "$ hang")
    one, other = terminal(), terminal()
    for screen in (one, other):
        screen.floor()
        screen.wait("▸ worker-1")
    one.type("l", "f")
    other.wait("Frozen")
    other.type("v")
    other.wait("  ▸ worker-1 +Frozen", absent=("╭",))
    other.type("l", "c")
    one.wait("▸ worker-1 ━+ Running")


def test_without_colour_and_utf8(stage, terminal):
    run = stage()
    run.spawn(run.lead(), "$ say na\u00efve \u6f22\u5b57\n$ hang")
    screen = terminal(LC_ALL="C", NO_COLOR="1")
    screen.floor()
    screen.type("l")
    shown = screen.wait(r"\[LEAD\] boss", "# > worker-1", "< boss", "> na\\?ve \\?\\?\\?\\?")
    assert shown.isascii()
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", screen.tmux("capture-pane", "-p", "-e"))


def test_output_of_agents_cannot_write_to_the_terminal(stage, terminal):
    run = stage()
    run.spawn(run.lead(), "$ raw \\x1b]0;owned\\x07\\x1b[2J\\x1b[31mred\n$ hang")
    screen = terminal()
    screen.floor()
    screen.type("l")
    screen.wait("! red|! .*red", "★ boss")
    assert screen.tmux("display-message", "-p", "#{pane_title}").strip() != "owned"


# ------------------------------------------------------------------ logs

def said(text: str) -> bytes:
    return json.dumps({"type": "assistant", "message": {"content": [{"type": "text", "text": text}]}}).encode() + b"\n"


def test_the_end_of_a_log_is_read_and_then_what_is_added(tmp_path):
    path = tmp_path / "stdout.log"
    path.write_bytes(b"".join(said(f"line {n}") for n in range(1000)))
    log = pitboss.LogFeed(str(path), "claude", 2000)
    assert log.read() and 0 < len(log.entries) < 30 and log.entries[-1] == (">", "line 999")
    assert log.cut > 0 and path.read_bytes()[log.cut - 1:log.cut] == b"\n"
    assert not log.read()
    with open(path, "ab") as f:
        f.write(said("one more")[:20])
        f.flush()
        assert not log.read(), "half a line"
        f.write(said("one more")[20:])
    assert log.read() and log.entries[-1] == (">", "one more")
    path.write_bytes(said("anew"))
    assert log.read() and [*log.entries] == [(">", "anew")]
    log.close()


def test_a_line_of_4_mb_is_shown_by_its_beginning(tmp_path):
    path = tmp_path / "stdout.log"
    path.write_bytes(said("short") + said("x" * (4 << 20)))
    log = pitboss.LogFeed(str(path), "claude", pitboss.LOG_WINDOW)
    assert log.read() and len(log.entries[-1][1]) == pitboss.LOG_WORDS
    log.close()


def test_a_log_that_is_not_there_yet(tmp_path):
    log = pitboss.LogFeed(str(tmp_path / "stdout.log"), "claude", 2000)
    assert not log.read()
    (tmp_path / "stdout.log").write_bytes(said("here"))
    assert log.read() and [*log.entries] == [(">", "here")]
    log.close()


# ------------------------------------------------------------------ the command line

def test_a_screenshot_is_one_frame_of_the_size_that_was_asked_for(stage, home):
    run = stage()
    run.spawn(run.lead(), "$ hang")
    lines = home.pitboss("floor", "screenshot", run.run.name[:13], "--cols", "60", "--rows", "20", check=0).stdout.splitlines()
    assert len(lines) == 20 and max(map(len, lines)) <= 60 and any("▸ worker-1" in line for line in lines)
    assert "\x1b" not in "".join(lines)
    svg = home.pitboss("floor", "screenshot", "--run", run.run.name[:13], "--svg", check=0).stdout
    assert svg.startswith("<svg") and "worker-1" in svg


@pytest.mark.parametrize("args, code, words", [
    (("floor",), 3, "no runs in"), (("floor", "screenshot"), 3, "pitboss demo"), (("floor", "zzz"), 3, "is not a run id"),
    (("floor", "list", "0192"), 2, "unknown argument"), (("floor", "0192", "0193"), 2, "unknown argument"),
    (("floor", "screenshot", "0192", "--run", "0193"), 2, "given twice"), (("floor", "screenshot", "--cols", "0"), 2, "1 to 1000"),
    (("floor", "screenshot", "--rows", "x"), 2, "--rows")])
def test_bad_words_on_the_command_line(home, args, code, words):
    done = home.pitboss(*args)
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr


def test_a_floor_without_a_terminal_says_what_to_do(stage, home):
    stage()
    done = home.pitboss("floor")
    assert done.returncode == 2 and "needs a terminal" in done.stderr and "screenshot" in done.stderr


def test_a_terminal_that_nobody_knows(stage, terminal):
    stage()
    screen = terminal(TERM="no-such-terminal")
    screen.type(f"{shlex.join(screen.home.argv('floor'))}; echo left $?", "enter")
    screen.wait("does not know the terminal", "left 2")


def test_the_other_name_of_the_floor(stage, home):
    run = stage()
    link = home.root / "pitboss-tui"
    shutil.copyfile(program(), link)

    def call(*args):
        return subprocess.run([sys.executable, str(link), *args], env=home.env, capture_output=True, text=True, timeout=60)

    assert call("--version").stdout.startswith("pitboss-tui ")
    assert run.run.name in call("list").stdout
    assert "★ boss" in call("screenshot", run.run.name[:13]).stdout
    assert "pitboss-tui" in call("completions", "bash").stdout


def test_a_run_of_another_tool_is_shown(home):
    folder = home.runs / "0192f3a0-1111-7222-8333-444455556666"
    folder.mkdir(parents=True)
    record = {"task_id": "hello", "status": "Success", "started_at": "2026-01-01T00:00:00Z", "ended_at": "2026-01-01T00:00:09Z",
              "token_usage": {"input": 1200, "output": 30}, "model": "claude-haiku-4-5"}
    (folder / "summary.json").write_text(json.dumps({"run_id": folder.name, "manifest_name": "old", "tasks_total": 1,
                                                     "tasks_failed": 0, "tasks": [record]}))
    (folder / "meta.json").write_text(json.dumps({"manifest_name": "old"}))
    shown = home.pitboss("floor", "screenshot", check=0).stdout
    assert "▸ hello" in shown and "Success ✓" in shown and "1.2k" in shown and "only read here" in shown and "complete" in shown
