"""The floor in a real terminal: tmux types the keys and says what is on the screen.

Each terminal is a window of a private tmux server. What is looked for is waited for, with a deadline.
"""
from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import select
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
                              env={**self.home.env, "LC_ALL": "C.UTF-8", "SHELL": "/bin/sh"}, timeout=20)
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


PLAIN_CODES = {"", "0", "1", "2", "4", "7", "22", "24", "27", "39", "49"}     # bold, dim, underlined, reversed, and not so


class Press:
    """One key in a view, and what is on the screen after it."""

    def __init__(self, key: str, *wanted: str, no: tuple | str = (), type: str = "") -> None:
        self.key, self.wanted = key, wanted
        self.absent = (no,) if isinstance(no, str) else no
        self.typed = type                # a text that is typed afterwards


TOO_SOON = "has only just come"
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
        Press("D", "worker-1: changes"), Press("esc", no="worker-1: changes"),
        Press("/", "show only", type="haiku"), Press("enter", "filter: haiku", "worker-2", no="worker-1"),
        Press("esc", "worker-1", no="filter"), Press("C", "settled ones hidden", no="▸ worker-2"), Press("C", "▸ worker-2"),
        Press("v", "^   ▸ worker-1", no="╭"), Press("v", "╭"), Press("click", "who +boss  lead"), Press("esc", "╰ ← boss"),
        Press("?", "fold or unfold the group"), Press("?", no="fold or unfold"), Press("q", "left 0")]),
    "detail": (("l", "enter"), [
        Press("", "who +boss→worker-1", "task ", "tokens", "changes +it has no worktree"),
        *scrolls(("k", "K", "up", "ctrl-u", "pgup", "wheel-up", "g", "home"),
                 ("j", "J", "down", "ctrl-d", "pgdn", "wheel-down", "G", "end")),
        Press("/", "look in the log", type="line 11"), Press("enter", "/line 11", "line 11$"),
        Press("n", "line 11: the last one above, of 1"), Press("N", "line 11: the last one below, of 1"),
        *[Press(key, "who ") for key in ("h", "l", "left", "right")],
        Press("D", "worker-1: changes", "no worktree of its own"), Press("esc", no="worker-1: changes"),
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
        Press("/", "look in the log", type="line 2"), Press("enter", "/line 2", "line 2: 1 of 11", "line 29$"), Press("n", "line 28$", "line 2: 2 of 11", BACK),
        Press("N", "line 29$", BACK), Press("D", "worker-1: changes"), Press("esc", no="worker-1: changes"),
        Press("p", "worker-1 is paused"), Press("c", "worker-1 goes on"), Press("f", "worker-1 is frozen"), Press("c", "worker-1 goes on"),
        Press("r", "tell worker-1"), Press("esc", no="tell worker-1"), Press("a", ASKS), Press("esc", no=ASKS),
        Press("x", "Cancel worker-1"), Press("n", no="Cancel worker-1"), Press("X", "Cancel the whole run"), Press("n", no="Cancel the"),
        Press("P", "approval rules"), Press("esc", no="approval rules"), Press("o", "─ runs ─"), Press("esc", no="─ runs ─"),
        Press("?", "a whole log"), Press("esc", no="a whole log"), Press("click", "worker-1: log"),
        Press("right-click", "╰ ← boss"), Press("L", "worker-1: log"), Press("esc", "╰ ← boss"), Press("L", ": log"), Press("q", "left 0")]),
    "diff": (("l", "D"), [
        *[Press(key, "worker-1: changes", "it has no worktree of its own") for key in (
            "j", "k", "down", "up", "J", "K", "g", "G", "home", "end", "ctrl-d", "ctrl-u", "pgdn", "pgup", "wheel-up", "wheel-down",
            "click")],
        Press("?", "what was changed"), Press("esc", no="this help"), Press("right-click", "╰ ← boss"), Press("D", "worker-1: changes"),
        Press("esc", "╰ ← boss"), Press("D", "worker-1: changes"), Press("q", "left 0")]),
    "approvals": (("a",), [
        Press("", "may I do this 0", "may I do this 5"),
        *[Press(key, ASKS) for key in ("j", "k", "down", "up", "G", "g", "end", "home", "ctrl-d", "ctrl-u", "pgdn", "pgup",
                                       "wheel-down", "wheel-up")],
        Press("j", ASKS), Press("enter", "IN-FLIGHT ACTION", "may I do this 1"), Press("esc", no="IN-FLIGHT"),
        Press("y", r"approved: may I do this 1 \(boss\)", no="left  may I do this 1"), Press("j", ASKS), Press("n", "why not"), Press("esc", no="why not"),
        Press("Y", "yes, and say"), Press("esc", no="yes, and say$"),
        Press("e", "approve this instead", "this"), Press("esc", no="instead"), Press("?", "reject it"), Press("esc", no="reject it"),
        Press("click", ASKS), Press("right-click", "╰ ← boss"), Press("a", ASKS), Press("esc", no=ASKS), Press("a", ASKS),
        Press("q", "left 0")]),
    "ask": (("a", "enter"), [
        Press("", "IN-FLIGHT ACTION", "RISKS", "- it is late", "may I do this 0"),
        *[Press(key, "IN-FLIGHT") for key in ("j", "k", "down", "up", "J", "K", "g", "G", "home", "end", "ctrl-d", "ctrl-u", "pgdn", "pgup",
                                              "wheel-down", "wheel-up", "click")],
        Press("?", "one request"), Press("esc", no="one request"), Press("n", "why not", type="too late"), Press("f2", r"rejected: may I do this 0 \(boss\)", no="left  may I do this 0"),
        Press("enter", "may I do this 1"), Press("e", "approve this instead", type=" but slowly"), Press("f2", "approved, changed: may I do this 1", no="left  may I do this 1"),
        Press("enter", "may I do this 2"), Press("Y", "yes, and say", type="but soon"), Press("f2", "approved: may I do this 2", no="left  may I do this 2"),
        Press("enter", "may I do this 3"), Press("y", "approved: may I do this 3", no="left  may I do this 3"), Press("enter", "may I do this 4"), Press("esc", no="IN-FLIGHT"),
        Press("enter", "may I do this 4"), Press("right-click", no="IN-FLIGHT"), Press("enter", "may I do this 4"), Press("q", "left 0")]),
    "policy": (("P",), [
        Press("", "no rules; n makes one", "block: what no rule matches"), Press("n", "0 block", "changed: s saves"), Press(" ", "0 auto_approve"),
        Press("l", "0 auto_approve"), Press(" ", "0 auto_approve +boss"), Press("right", "boss"), Press("enter", "boss +tool_use"),
        Press("right", "boss"), Press("enter", "tool_name \\(empty", type="Bash"), Press("enter", "tool_use +Bash"), Press("left", "Bash"),
        Press("h", "Bash"), Press("n", "1 block"), *[Press(key, "1 block") for key in ("k", "j", "up", "down", "g", "G", "home", "end",
        "ctrl-u", "ctrl-d", "pgup", "pgdn", "wheel-up", "wheel-down", "click")], Press("G", "1 block"), Press("K", "0 block", "1 auto_approve"),
        Press("J", "0 auto_approve", "1 block"), Press("s", "2 rules are in force", no="changed"), Press("d", "changed", no="1 block"),
        Press("f2", "1 rule is in force", no="changed"), Press("?", "a new rule"), Press("esc", no="a new rule"), Press("esc", no="approval rules"),
        Press("P", "0 auto_approve +boss +tool_use +Bash"), Press("right-click", no="approval rules"), Press("P", "Bash"), Press("q", "left 0")]),
    "unsaved": (("P", "n"), [
        Press("esc", "not in force yet"), Press("esc", "0 block", no="not in force"), Press("q", "not in force"), Press("n", no="not in force"),
        Press("q", "not in force"), Press("q", no="not in force"),
        Press("q", "not in force"), Press("click", "not in force"), Press("right-click", no="not in force"),
        Press("esc", "not in force"), Press("d", no="approval rules"), Press("P", "no rules"), Press("n", "0 block"), Press("q", "not in force"),
        Press("s", "left 0")]),
    "runs": (("o",), [
        *[Press(key, "─ runs ─", "▸ [0-9a-f]{8}") for key in ("j", "k", "down", "up", "G", "g", "end", "home", "ctrl-d", "ctrl-u", "pgdn", "pgup",
                                       "wheel-down", "wheel-up", "click")],
        Press("?", "show the picked run"), Press("esc", no="show the picked"), Press("esc", no="─ runs ─"), Press("o", "─ runs ─"),
        Press("right-click", no="─ runs ─"), Press("o", "─ runs ─"), Press("enter", "▸ worker-1"), Press("o", "─ runs ─"), Press("q", "left 0")]),
    "confirm": (("l", "x"), [
        Press("n", no="Cancel worker-1"), Press("x", "Cancel worker-1"), Press("q", no="Cancel worker-1"), Press("x", "Cancel worker-1"),
        Press("esc", no="Cancel worker-1"), Press("x", "Cancel worker-1"), Press("right-click", no="Cancel worker-1"),
        Press("x", "Cancel worker-1"), Press("r", "why is worker-1 cancelled"), Press("esc", "Cancel worker-1"),
        Press("r", "why is worker-1 cancelled", type="wrong branch"), Press("f2", "Cancelled ⊘"),
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
        shown = TOO_SOON
        while TOO_SOON in shown:               # a yes to what has only just come
            screen.type(*([press.key] if press.key else []))
            shown = screen.wait(f"{TOO_SOON}|" + press.wanted[0]) if press.key == "y" and press.wanted else ""
            if TOO_SOON in shown:
                screen.type("z")               # no key at all: what was said goes
                screen.wait(absent=(TOO_SOON,))
        try:
            screen.wait(*press.wanted, absent=press.absent)
        except AssertionError as e:
            raise AssertionError(f"after {press.key!r}: {e}") from None
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
                           {"approved": True, "edited_summary": "may I do this 1 but slowly"},
                           {"approved": True, "comment": "but soon"}, {"approved": True}]
    elif view == "policy":
        assert [e["rules"] for e in run.events("policy_set")] == [
            [["boss", "tool_use", "Bash", None, "auto_approve"], [None, None, None, None, "block"]],
            [["boss", "tool_use", "Bash", None, "auto_approve"]]]
    elif view == "unsaved":
        assert [e["rules"] for e in run.events("policy_set")] == [[[None, None, None, None, "block"]]]
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
    for key in "xXrpfc":
        screen.type(key)
        screen.wait("this run has settled", absent=("sure", "tell boss"))
        screen.type("esc")
        screen.wait("help", absent=("this run has settled",))


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
    for keys, words in ((("L",), "worker-1: log"), (("esc", "P", "n"), "0 block"), (("esc",), "not in force"), (("d", "o"), "- runs -"),
                        (("esc", "enter"), "who +boss"), (("esc", "x"), "Cancel worker-1"), (("n", "?"), "the floor")):
        screen.type(*keys)
        screen.wait(words)
        codes = re.findall(r"\x1b\[([0-9;]*)m", screen.tmux("capture-pane", "-p", "-e"))
        assert {code for some in codes for code in some.split(";")} <= PLAIN_CODES, words


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


@pytest.mark.slow
def test_a_tree_of_twenty_agents_in_the_hands_of_an_operator(stage, terminal):
    """Freeze, pause, redirect, cancel with a reason and cancel the run, by keys alone: nothing is left, records are right."""
    run = stage(lead="allow_subleads = true", workers=16)
    lead = run.lead()
    for _ in range(14):
        lead.call("spawn_worker", prompt="$ say at work\n$ hang")
    below = "\n".join('$ call spawn_worker {"prompt": "$ say deep\\n$ hang"}' for _ in range(4))
    lead.call("spawn_sublead", prompt=f"{below}\n$ hang", model="claude-haiku-4-5", budget_usd=9, max_workers=4)
    screen = terminal(columns=120, rows=40)
    screen.floor()
    screen.wait("18 workers spawned", "20 Running")
    screen.type("/", "worker-18", "enter")
    screen.wait("filter: worker-18", "┏ ▸ worker-18")
    for key, wanted in (("f", "worker-18 is frozen"), ("c", "worker-18 goes on"), ("p", "worker-18 is paused"),
                        ("c", "worker-18 goes on")):
        screen.type(key)
        screen.wait(wanted)
    screen.type("r", "$ say redirected", "enter", "$ hang", "f2")
    screen.wait(r"worker-18 was told \((input|resume)\)", "> redirected")
    screen.type("x", "r", "enough of it", "f2")
    screen.wait("worker-18 ━+ Cancelled ⊘")
    screen.type("esc", "X", "r", "the wrong branch", "f2")
    screen.wait("complete", "⊘ 20")
    screen.type("q")
    screen.wait("left 0")
    records = run.settle(1)
    assert len(records) == 20 and {r["status"] for r in records.values()} == {"Cancelled"}
    one = records["worker-18"]
    assert (one["pause_count"], one["reprompt_count"]) == (2, 1) and "enough of it" in one["failure_reason"]["message"]
    assert "the wrong branch" in records["worker-3"]["failure_reason"]["message"]
    assert any("enough of it" in str(e.get("told")) for e in run.events("stop_decided", actor="worker-18")), "its lead is told"
    assert not processes_with(f"PITBOSS_RUN_ID={run.run.name}")


# ------------------------------------------------------------------ pastes, texts and answers that are not lost

PASTED = "\x1b[200~%s\x1b[201~"


def test_a_paste_is_a_text_and_never_commands(stage, terminal):
    run = stage()
    run.spawn(run.lead(), "$ hang")
    screen = terminal()
    screen.floor()
    screen.wait("▸ worker-1")
    screen.type("l")
    screen.tmux("send-keys", "-l", PASTED % "fXyq")
    screen.wait("a paste does nothing here", "▸ worker-1 .*Running", absent=("Frozen", "sure"))
    screen.type("/")
    screen.wait("show only")
    screen.tmux("send-keys", "-l", PASTED % "worker\r1 q")
    screen.wait("worker 1 q", "show only")
    screen.type("esc", "r")
    screen.wait("tell worker-1")
    screen.tmux("send-keys", "-l", PASTED % "$ say pasted\r$ hang")
    screen.wait("say pasted *│", r"\$ hang *│")
    screen.type("f2")
    screen.wait("> pasted")
    assert not run.events("pause_decided") and not run.events("stop_decided", why="cancel")


def test_pastes_are_marked_while_the_floor_has_the_terminal_and_never_after(stage):
    """What the floor writes to a terminal: bracketed paste on, off for a suspension, on again, off at the end."""
    run = stage()
    ours, theirs = pty.openpty()
    env = {**run.home.env, "TERM": "xterm", "LC_ALL": "C.UTF-8"}
    floor = subprocess.Popen(run.home.argv("floor"), stdin=theirs, stdout=theirs, stderr=theirs, env=env,
                             process_group=0)     # of this session: it can be stopped
    os.close(theirs)
    shown = b""

    def read_until(there):
        nonlocal shown
        end = time.monotonic() + DEADLINE_S
        while not there() and time.monotonic() < end and select.select([ours], [], [], DEADLINE_S)[0]:
            shown += os.read(ours, 1 << 16)
        assert there(), shown[-300:]

    def switches():
        return re.findall(rb"\x1b\[\?2004([hl])", shown)

    read_until(lambda: b"boss" in shown)
    assert switches() == [b"h"]
    os.kill(floor.pid, signal.SIGTSTP)
    read_until(lambda: switches() == [b"h", b"l"])
    wait_for(lambda: Path(f"/proc/{floor.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", DEADLINE_S, "its stop")
    os.kill(floor.pid, signal.SIGCONT)
    read_until(lambda: switches() == [b"h", b"l", b"h"] and shown.rpartition(b"2004h")[2].count(b"boss"))
    os.write(ours, b"q")
    read_until(lambda: switches() == [b"h", b"l", b"h", b"l"])
    assert floor.wait(DEADLINE_S) == 0
    os.close(ours)


def test_a_request_that_has_only_just_come_is_not_approved():
    assert not pitboss.is_seen(None, 100.0) and not pitboss.is_seen(99.5, 100.0) and pitboss.is_seen(99.0, 100.0)


class Silent(pitboss.Phone):
    """A line to nobody: what is asked is kept."""

    def __init__(self) -> None:
        super().__init__("/nowhere")
        self.sent: list = []

    def ask(self, words, op, **fields):
        self.sent.append((op, fields))
        return True

    def connect(self):
        return False


@pytest.fixture
def floor(stage):
    """A floor without a terminal on a run with three requests."""
    run = stage()
    lead = run.lead()
    for n in range(3):
        lead.start("request_approval", {"summary": f"thing {n}"})
        wait_for(lambda: len(run.events("approval_asked")) > n, DEADLINE_S, "the request")
    one = pitboss.Floor(str(run.run), pitboss.Lookout(str(run.home.runs), lambda run_dir: "running", None))
    one.phone = Silent()
    yield one
    one.close()


def test_the_picked_request_stays_picked_and_a_new_one_in_its_place_is_not_approved_at_once(floor):
    asks = [*floor.run.approvals]
    floor.push("approvals", pick=1)
    floor.draw()
    floor.watch_asks(time.monotonic() - 10)
    floor.since = {name: at - 10 for name, at in floor.since.items()}
    del floor.run.approvals[asks[0]]                 # answered elsewhere: the picked one moves up
    floor.draw()
    assert pitboss.picked_ask(floor) == asks[1]
    del floor.run.approvals[asks[1]]                 # and now another one is where it was
    floor.draw()
    floor.press("y")
    assert floor.phone.sent == [] and "only just come" in floor.ui.message
    floor.since = {name: at - 10 for name, at in floor.since.items()}
    floor.press("y")
    assert floor.phone.sent == [("approve", {"request_id": asks[2], "approved": True})]


def test_tab_and_then_enter_opens_the_request(floor):
    floor.press("tab")
    floor.press("enter")
    assert floor.view == "ask" and floor.ui.request == [*floor.run.approvals][0]


def test_a_text_that_could_not_be_sent_is_kept(floor):
    floor.press("r")
    floor.paste("do it otherwise")
    floor.phone.ask = lambda *args, **more: False
    floor.press("f2")
    assert floor.view == "box" and floor.ui.box.text == "do it otherwise" and floor.ui.tone == "red"
    floor.phone.ask = lambda *args, **more: True
    floor.press("f2")
    assert floor.view == "floor"
    floor.phone.hear = lambda: iter([("boss is Frozen: continue it first", True)])
    assert floor.hear()
    floor.press("r")
    assert floor.ui.box.text == "do it otherwise", "a refused one is offered again"


def test_what_was_said_goes_after_four_seconds(floor):
    floor.say("here")
    floor.tick()
    assert floor.ui.message == "here"
    floor.said_at -= pitboss.SAID_S
    floor.tick()
    assert floor.ui.message == "" and pitboss.SAID_S == 4


def test_the_changes_of_an_actor_are_shown_and_cut(tmp_path):
    def git(*args):
        return subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *args], cwd=tmp_path, check=True,
                              capture_output=True, text=True).stdout.strip()

    git("init", "-q", ".")
    (tmp_path / "a.txt").write_text("old\n")
    git("add", ".")
    git("commit", "-qm", "one")
    base = git("rev-parse", "HEAD")
    (tmp_path / "a.txt").write_text("new\n")
    git("commit", "-qam", "two")
    (tmp_path / "b.txt").write_text("not added\n")
    place = {"path": str(tmp_path), "base": base, "repo": str(tmp_path), "branch": git("branch", "--show-current")}
    found = asyncio.run(pitboss.ask_diff(place, None))
    assert "-old\n+new\n" in found["text"] and "+not added\n" in found["text"] and not found["cut"]
    gone = asyncio.run(pitboss.ask_diff({**place, "path": str(tmp_path / "gone")}, None))
    assert "-old\n+new\n" in gone["text"] and "not added" not in gone["text"]
    (tmp_path / "c.txt").write_text("long line\n" * 100_000)
    assert asyncio.run(pitboss.ask_diff(place, None))["cut"]
    assert "no worktree" in asyncio.run(pitboss.ask_diff(None, None))["note"]
