"""Agents in terminals: windows of a private tmux server, prompts by paste, events by hooks.

The agent is mostly the scripted one of the program; the real claude and opencode are in test_terminals.py. What
happened is read from tmux itself, the spool of the hooks and the process table.
"""
from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pitboss
from tmux_desk import Desk, desk, hook_run, needs_tmux, pin  # noqa: F401 (desk is a fixture)
from tools import PYTHON, git, processes_with, wait_for

pytestmark = needs_tmux
UNTOLD = None        # a pane's exit status that tmux 3.3a, once in many times on a busy machine, never tells
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def demo(desk):  # noqa: F811
    """A desk with one scripted agent that waits for a prompt: (desk, row, pane)."""
    row, pane = desk.start()
    return desk, row, pane


def shell(desk, epic: str, script: str, cwd=None, **env):  # noqa: F811
    """A window that runs a line of the shell."""
    return desk.do(desk.tmux.open_window("pit", epic, str(cwd or desk.repo), ["sh", "-c", script],
                                         {**desk.env, **env}))


# ------------------------------------------------------------------ windows

def test_windows_are_found_again_wherever_they_are(tmp_path):
    """By a new daemon, with ids, names and folders that tmux would read as something else."""
    root = tmp_path / "a #{x} b;"
    root.mkdir()
    desk = Desk(root)
    try:
        session = "my #{y} pit;"
        for epic in ("bd-1.2", "e;", "#{pid}"):
            desk.do(desk.tmux.open_window(session, epic, str(desk.repo), ["sleep", "60"], desk.env))
        desk.raw("new-session", "-d", "-s", "other")
        found = desk.do(desk.tmux.panes())
        desk.raw("move-window", "-s", found["bd-1.2"].window_id, "-t", "other:", check=True)
        desk.raw("split-window", "-d", "-t", found["e;"].window_id, "sleep 60", check=True)
        desk.raw("new-window", "-d", "-t", "other:", "-n", "epic-bd-9", check=True)
        again = pitboss.Tmux(desk.socket, desk.session, str(desk.repo), desk.env, 0o022)
        panes = desk.do(again.panes())
        assert set(panes) == {"bd-1.2", "e;", "#{pid}"}
        assert {e: p.pane_id for e, p in panes.items()} == {e: p.pane_id for e, p in found.items()}
        assert not any(p.is_dead for p in panes.values())
        wait_for(lambda: {p.path for p in desk.do(again.panes()).values()} == {str(desk.repo)}, 10, "their folder")
        for epic, pane in panes.items():
            marks = desk.raw("display-message", "-p", "-t", pane.pane_id, "#{@pit-epic}|#{@pit-project}|#{window_name}")
            assert marks == f"{epic}|{desk.repo}|epic-{epic}\n"
            assert desk.raw("display-message", "-p", "-t", pane.pane_id, "#{window_width}x#{window_height}") == "200x50\n"
        assert session in desk.raw("list-sessions", "-F", "#{session_name}").splitlines()
    finally:
        desk.close()


def test_two_projects_on_one_server_do_not_meet(desk, tmp_path):  # noqa: F811
    (tmp_path / "two").mkdir()
    other = Desk(tmp_path / "two")
    other.socket = other.tmux.socket = desk.socket
    mine, theirs = shell(desk, "e", "sleep 60"), shell(other, "e", "sleep 60")
    assert desk.do(desk.tmux.panes())["e"].pane_id == mine.pane_id != theirs.pane_id
    with pytest.raises(pitboss.PaneGone):
        desk.do(desk.tmux.press(theirs.pane_id, "C-c"))
    desk.do(desk.tmux.kill_window(mine))
    assert desk.do(other.tmux.panes()) and not desk.do(desk.tmux.panes())
    assert desk.do(desk.tmux.close_session("pit")) is False, "the other project's window is in it"


@ON_LINUX
def test_environment_and_command_are_in_no_command_line_of_tmux(desk):  # noqa: F811
    """What tmux is called with is written down by a wrapper of it; the file that tells the rest is gone."""
    wrapper, log = desk.root / "bin" / "tmux", desk.root / "calls"
    wrapper.parent.mkdir()
    real = subprocess.check_output(["sh", "-c", "command -v tmux"], text=True).strip()
    wrapper.write_text(f'#!/bin/sh\necho "$*" >>{log}\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    desk.tmux.env["PATH"] = f"{wrapper.parent}:{desk.env['PATH']}"
    shell(desk, "e", "umask; echo $PIT_SECRET >told; ls -la; exec sleep 60 #hidden-word", PIT_SECRET="s3cret\nline")
    wait_for((desk.repo / "told").exists, 10)
    pane = wait_for(lambda: next((p for p in desk.do(desk.tmux.panes()).values() if p.command == "sleep"), None))
    assert "new-window" in log.read_text()
    assert "s3cret" not in log.read_text() and "hidden-word" not in log.read_text()
    assert not list(Path(desk.session).glob("epics/e/launch-*"))
    assert (desk.repo / "told").read_text() == "s3cret line\n"
    assert desk.do(desk.tmux.capture(pane.pane_id, 50)).startswith("0022"), "the caller's umask"
    environ = Path(f"/proc/{pane.pid}/environ").read_bytes().split(b"\0")
    assert f"PITBOSS_LINEAGE={desk.tmux.marker('e')}".encode() in environ
    assert any(v.startswith(b"TMUX_PANE=%") for v in environ)


def test_what_a_window_shall_run_is_for_its_user_alone(desk):  # noqa: F811
    path = desk.tmux.order_path("e")
    desk.tmux.write_order(path, "e", "/", ["true"], {"KEY": "x\udcff"})
    assert os.stat(path).st_mode & 0o777 == 0o600 and os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700
    assert json.loads(Path(path).read_text())["env"]["KEY"] == "x\udcff"


def test_what_is_not_ours_is_left_as_it_is(desk):  # noqa: F811
    desk.raw("-f", "/dev/null", "new-session", "-d", "-s", "mine", "-n", "work", check=True)
    desk.raw("set-option", "-g", "status-right", "mine;", check=True)

    def state() -> tuple:
        return (desk.raw("show-options", "-g"), desk.raw("show-options", "-gw"), desk.raw("list-keys"),
                desk.raw("list-windows", "-t", "mine", "-F", "#{window_id} #{window_name} #{window_width}"),
                desk.raw("show-environment", "-g"))

    before = state()
    pane = shell(desk, "e", "sleep 60")
    desk.do(desk.tmux.paste(pane.pane_id, "text"))
    desk.do(desk.tmux.kill_window(pane))
    assert desk.do(desk.tmux.close_session("pit")) is True
    assert state() == before
    assert desk.raw("list-sessions", "-F", "#{session_name}") == "mine\n" and not desk.raw("list-buffers")


def test_a_session_with_a_foreign_window_stays(desk):  # noqa: F811
    pane = shell(desk, "e", "sleep 60")
    assert desk.do(desk.tmux.close_session("pit")) is False, "an epic's window is in it"
    desk.raw("new-window", "-d", "-t", "pit:", check=True)
    desk.do(desk.tmux.kill_window(pane))
    assert desk.do(desk.tmux.close_session("pit")) is False
    assert desk.do(desk.tmux.session_of("pit"))


def test_the_home_window_keeps_the_session_and_is_closed_only_when_nothing_runs_in_it(desk):  # noqa: F811
    pane = shell(desk, "e", "sleep 60")
    desk.do(desk.tmux.kill_window(pane))
    assert desk.raw("list-windows", "-t", "pit", "-F", "#{window_name}") == "home\n"
    desk.raw("send-keys", "-t", "pit:home", "sleep 61", "Enter")
    wait_for(lambda: desk.raw("list-panes", "-t", "pit:home", "-F", "#{pane_current_command}") == "sleep\n", 10)
    assert desk.do(desk.tmux.close_session("pit")) is False
    desk.raw("send-keys", "-t", "pit:home", "C-c")
    wait_for(lambda: desk.do(desk.tmux.close_session("pit")), 10)
    assert desk.do(desk.tmux.server_pid()) is None


def test_a_server_that_is_gone_is_told_from_one_that_began_anew(desk):  # noqa: F811
    """Ids begin anew with a server: a window of somebody else with the same ids is not touched."""
    first = shell(desk, "e", "sleep 60")
    pid = desk.do(desk.tmux.server_pid())
    desk.raw("kill-server")
    wait_for(lambda: desk.do(desk.tmux.server_pid()) is None, 10)
    for call in (desk.tmux.panes(), desk.tmux.paste(first.pane_id, "x"), desk.tmux.press(first.pane_id, "Enter")):
        with pytest.raises(pitboss.TmuxGone):
            desk.do(call)
    desk.do(desk.tmux.set_status("x"))
    desk.do(desk.tmux.kill_window(first))
    desk.raw("new-session", "-d", "-s", "pit", "-n", "a", "sh", check=True)
    desk.raw("new-window", "-d", "-t", "pit:", "-n", "b", "cat", check=True)
    assert first.pane_id in desk.raw("list-panes", "-a", "-F", "#{pane_id}").split()
    for call in (desk.tmux.paste(first.pane_id, "x"), desk.tmux.press(first.pane_id, "Enter"),
                 desk.tmux.respawn(first.pane_id, "/", ["true"], {})):
        with pytest.raises(pitboss.PaneGone):
            desk.do(call)
    desk.do(desk.tmux.kill_window(first))
    assert desk.raw("list-windows", "-t", "pit", "-F", "#{window_name}") == "a\nb\n"
    assert desk.do(desk.tmux.server_pid()) not in (None, pid)
    assert shell(desk, "e", "sleep 60").epic == "e"


def test_a_window_stays_when_its_agent_ends_and_can_have_a_new_one(desk):  # noqa: F811
    pane = shell(desk, "e", "seq 100; echo last words; exit 7")
    dead = wait_for(lambda: (p := desk.do(desk.tmux.panes())["e"]).is_dead and p, 10)
    assert dead.status in (7, UNTOLD) and (dead.pane_id, dead.path) == (pane.pane_id, "")
    lines = desk.do(desk.tmux.capture(pane.pane_id, 4)).split("\n")
    if dead.status == 7:
        assert lines.pop().startswith("Pane is dead")
    assert lines[-3:] == ["99", "100", "last words"]
    again = desk.do(desk.tmux.respawn(pane.pane_id, str(desk.root), ["sh", "-c", "kill -9 $$"], desk.env))
    assert (again.pane_id, again.epic) == (pane.pane_id, "e") and again.pid != pane.pid
    killed = wait_for(lambda: (p := desk.do(desk.tmux.panes())["e"]).is_dead and p, 10)
    assert killed.status is None


def test_an_agent_that_has_ended_is_told_nothing_and_the_server_lives(desk, monkeypatch):  # noqa: F811
    """A paste into a dead pane ends the server of tmux 3.3a, and with it every window of its user."""
    pane = shell(desk, "e", "exit 3")
    wait_for(lambda: desk.do(desk.tmux.pane(pane.pane_id)).is_dead, 10)
    server = desk.do(desk.tmux.server_pid())
    for call in (desk.tmux.paste(pane.pane_id, "x"), desk.tmux.press(pane.pane_id, "Enter"),
                 desk.tmux.type(pane.pane_id, "x")):
        with pytest.raises(pitboss.PaneGone, match="has ended"):
            desk.do(call)

    async def alive(self, pane_id: str):
        return pane

    monkeypatch.setattr(pitboss.Tmux, "living", alive)       # it ended just after it was looked at
    desk.do(desk.tmux.paste(pane.pane_id, "x"))
    desk.do(desk.tmux.press(pane.pane_id, "Enter"))
    desk.do(desk.tmux.type(pane.pane_id, "x"))
    assert desk.do(desk.tmux.server_pid()) == server and not desk.raw("list-buffers")


@pytest.mark.parametrize("argv, cwd, words", [
    (["no-such-program-x"], "", "no-such-program-x"), (["true"], "/no/such/folder", "/no/such/folder")])
def test_what_cannot_be_started_says_so_in_its_window(desk, argv, cwd, words):  # noqa: F811
    """tmux itself would start in another folder without a word: the worst that can happen."""
    pane = desk.do(desk.tmux.open_window("pit", "e", cwd or str(desk.repo), argv, desk.env))
    dead = wait_for(lambda: (p := desk.do(desk.tmux.panes())["e"]).is_dead and p, 10)
    assert dead.status in (126, UNTOLD) and words in desk.do(desk.tmux.capture(pane.pane_id, 10))


@ON_LINUX
def test_ending_an_agent_ends_what_it_left_and_keeps_its_window(desk):  # noqa: F811
    """A child in a session of its own that ignores HUP and TERM, whose parent is gone."""
    deaf = "trap '' HUP TERM; while :; do sleep 0.2; done"
    pane = shell(desk, "e", f"setsid sh -c \"{deaf}\" & trap '' HUP; while :; do sleep 0.2; done")
    marker = f"PITBOSS_LINEAGE={desk.tmux.marker('e')}"
    wait_for(lambda: len([c for c in processes_with(marker).values() if "sh -c" in c]) >= 2, 10)
    desk.do(desk.tmux.end_agent(desk.do(desk.tmux.pane(pane.pane_id))))
    wait_for(lambda: not processes_with(marker), 10)
    assert desk.do(desk.tmux.pane(pane.pane_id)).is_dead
    desk.do(desk.tmux.kill_window(pane))
    assert desk.do(desk.tmux.panes()) == {}


def test_two_that_start_the_server_at_once_both_get_their_window(desk):  # noqa: F811
    import asyncio

    async def both():
        again = pitboss.Tmux(desk.socket, desk.session, str(desk.repo), desk.env, 0o022)
        async with asyncio.TaskGroup() as group:
            for n, tmux in enumerate((desk.tmux, again, desk.tmux, again)):
                group.create_task(tmux.open_window("pit", f"e.{n}", str(desk.repo), ["sleep", "60"], desk.env))

    desk.do(both())
    assert sorted(desk.do(desk.tmux.panes())) == ["e.0", "e.1", "e.2", "e.3"]
    assert desk.raw("list-sessions", "-F", "#{session_name}") == "pit\n"


def test_a_server_is_started_where_its_folder_is_missing_and_one_that_cannot_be_is_told(desk):  # noqa: F811
    desk.socket = desk.tmux.socket = str(desk.root / "new" / "folder" / "s")
    assert shell(desk, "e", "sleep 60").epic == "e"
    desk.raw("kill-server")
    (desk.root / "file").write_text("")
    desk.socket = desk.tmux.socket = str(desk.root / ("x" * 200))
    with pytest.raises(pitboss.TmuxFailed):
        shell(desk, "e", "sleep 60")
    desk.socket = desk.tmux.socket = str(desk.root / "s")


def test_the_status_text_is_shown_and_taken_away(desk):  # noqa: F811
    shell(desk, "e", "sleep 60")
    desk.do(desk.tmux.set_status("pit 2 running #{pid} 1 paused;"))
    assert desk.raw("display-message", "-p", "#{@pit-status}") == "pit 2 running #{pid} 1 paused;\n"
    desk.do(desk.tmux.set_status(""))
    assert "@pit-status" not in desk.raw("show-options", "-g")


def test_the_server_is_the_one_that_a_plain_tmux_reaches(desk):  # noqa: F811
    shell(desk, "e", "sleep 60")
    told = desk.raw("display-message", "-p", "#{socket_path}").strip()
    assert pitboss.default_socket({"TMUX": f"{told},123,0"}) == told == desk.socket
    env = {"PATH": os.environ["PATH"], "TMUX_TMPDIR": str(desk.root)}
    path = pitboss.default_socket(env)
    done = subprocess.run(["tmux", "list-sessions"], env=env, capture_output=True, text=True)
    assert path in done.stderr and done.returncode == 1
    with pytest.raises(pitboss.InvalidInput, match="tmux"):
        pitboss.find_tmux({"PATH": str(desk.root)})
    assert os.access(pitboss.find_tmux(os.environ), os.X_OK)


# ------------------------------------------------------------------ prompts

LINE = "a line of the prompt, with ümlauts ✓ and `quotes` $HOME #{pid} %d\n"
TEXTS = {
    "a word":            "word",
    "one line":          "Work on ticket e.1 (Title).",
    "ends in ;":         "text;",
    "only ;":            ";",
    "many lines":        "first\n\n  indented\n\tand more\nlast",
    "begins with /":     "/clear is what this is about",
    "begins with !":     "!touch ran-as-shell",
    "begins with -":     "-n is a flag",
    "blank first":       "  \n\nblank first",
    "ends in \\":        "a path C:\\",
    "key names":         "Enter C-c Escape",
    "wide":              "日本語 🎉 é",
    "CR LF":             "one\r\ntwo\rthree",
    "4 KB":              LINE * 60,
    "20 KB":             LINE * 300,
    "200 KB":            LINE * 3000,
}


def prompts_told(desk, epic: str = "e.1") -> list[str]:  # noqa: F811
    return [e["prompt"] for e in desk.events(epic, "prompt")]


@pytest.mark.parametrize("part", range(3))
def test_prompts_of_every_kind_arrive_once_and_whole(demo, part):
    desk, _, pane = demo
    texts = list(TEXTS.values())[part::3]
    for text in texts:
        assert desk.deliver(pane, text), desk.screen()
    wanted = [pitboss.guard_prompt(text) for text in texts]
    assert prompts_told(desk) == wanted
    assert all(pitboss.clean_paste(text) in wanted[n] for n, text in enumerate(texts))
    assert not (desk.repo / "ran-as-shell").exists()


def test_a_prompt_arrives_though_a_person_scrolls(demo):
    desk, _, pane = demo
    for n, mode in enumerate((("copy-mode",), ("copy-mode", "-u"), ("choose-tree",))):
        desk.raw(*mode, "-t", pane.pane_id, check=True)
        assert desk.raw("display-message", "-p", "-t", pane.pane_id, "#{pane_in_mode}") == "1\n"
        assert desk.deliver(pane, f"number {n}"), desk.screen()
    assert prompts_told(desk) == ["number 0", "number 1", "number 2"]


def test_a_prompt_is_sent_once_to_an_agent_that_hangs_for_a_while(demo):
    """Its keys wait in the terminal: the Enters that came too many find an empty box."""
    import threading

    desk, _, pane = demo
    os.kill(pane.pid, signal.SIGSTOP)
    timer = threading.Timer(2.6, os.kill, (pane.pid, signal.SIGCONT))
    timer.start()
    assert desk.deliver(pane, "after a pause " + LINE * 20)
    timer.join()
    assert desk.deliver(pane, "next")
    assert [p[:5] for p in prompts_told(desk)] == ["after", "next"]


def test_keys_arrive_though_a_person_scrolls(demo):
    desk, _, pane = demo
    desk.do(desk.tmux.type(pane.pane_id, "half a "))
    for press in (lambda: desk.do(desk.tmux.type(pane.pane_id, "word;")), lambda: desk.do(desk.tmux.press(pane.pane_id, "Enter"))):
        desk.raw("copy-mode", "-t", pane.pane_id, check=True)
        press()
    assert desk.wait("prompt")["prompt"] == "half a word;"


CAREFREE = """import os, sys, tty
tty.setraw(0)
os.write(1, b"\\x1b[?2004h")
seen = b""
while True:
    with open(sys.argv[1] + ".new", "wb") as f:
        f.write(seen)
    os.rename(sys.argv[1] + ".new", sys.argv[1])
    seen += os.read(0, 4096)
"""


def test_enter_is_pressed_again_only_while_nothing_tells_of_the_prompt(desk, monkeypatch):  # noqa: F811
    """A terminal that overlooks the first two: three in all, and the text is pasted once."""
    monkeypatch.setattr(pitboss, "ENTERS_S", (0.3, 0.3, 10.0))
    out = desk.root / "seen"
    pane = desk.do(desk.tmux.open_window("pit", "e.1", str(desk.repo), [PYTHON, "-c", CAREFREE, str(out)], desk.env))
    wait_for(out.exists, 10)

    def when(enters: int):
        async def submitted(seconds: float) -> bool:
            try:
                return wait_for(lambda: out.exists() and out.read_bytes().count(b"\r") >= enters, seconds)
            except AssertionError:
                return False

        return submitted

    for enters, total in ((3, 3), (4, 4)):
        assert desk.do(pitboss.deliver(desk.tmux, pane.pane_id, "two\nlines", when(enters)))
        assert out.read_bytes().count(b"\r") == total
    assert out.read_bytes() == (b"\x1b[200~two\nlines\x1b[201~" + b"\r" * 3 + b"\x1b[200~two\nlines\x1b[201~\r")


def test_a_prompt_that_nobody_takes_is_told(desk, monkeypatch):  # noqa: F811
    monkeypatch.setattr(pitboss, "ENTERS_S", (0.2, 0.2, 0.4))
    pane = shell(desk, "e.1", "exec sleep 60")
    assert desk.deliver(pane, "word") is False
    assert desk.screen().count("word") == 1, "pasted once"


def test_a_text_cannot_end_its_own_paste(demo):
    desk, _, pane = demo
    evil = "ticket\x1b[201~\r!touch got-out\r\x03\x03\x1b]2;title\x07\x9b201~end"
    assert desk.deliver(pane, evil)
    told = prompts_told(desk)
    assert told == ["ticket[201~\n!touch got-out\n]2;title201~end"]
    assert not (desk.repo / "got-out").exists() and "title" not in desk.do(desk.tmux.pane(pane.pane_id)).title


@pytest.mark.parametrize("text, wanted", [
    ("Do it", "Do it"), ("/help", "Task:\n/help"), ("!ls", "Task:\n!ls"), ("\n/x", "Task:\n\n/x"),
    ("ends \\", "ends \\ ."), ("ends \\  ", "ends \\   ."), ("ends \\\n", "ends \\\n"), ("Über", "Über"), ("", "Task:\n"),
    ("@file", "Task:\n@file"), ("#note", "Task:\n#note")])
def test_a_prompt_is_never_a_command(text, wanted):
    assert pitboss.guard_prompt(text) == wanted


@pytest.mark.parametrize("told, is_it", [
    ("Do  it\nnow", True), ("what a person had typed Do it now", True), ("Do it no", False),
    ("<task-notification>", False), ("", False)])
def test_an_event_tells_whose_prompt_it_is(told, is_it):
    assert pitboss.is_prompt({"event": "prompt", "prompt": told}, "Do it now") is is_it
    assert not pitboss.is_prompt({"event": "turn_ended", "prompt": told}, "Do it now")


@contextlib.contextmanager
def busy_cores():
    """A loop on every core, meanwhile."""
    loops = [subprocess.Popen([PYTHON, "-S", "-c", "while True: pass"]) for _ in range(os.cpu_count() or 2)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def shown_in(desk, pane) -> str:  # noqa: F811
    """All that a window shows, with what has scrolled away."""
    return desk.raw("capture-pane", "-p", "-S", "-", "-t", pane.pane_id, check=True)


def many_prompts(desk, pane, count: int, seed: int = 7) -> None:  # noqa: F811
    """`count` prompts of changing kinds, some of them while a person scrolls or the agent hangs."""
    import random
    import threading

    kinds, dice = [t for k, t in TEXTS.items() if k != "only ;"], random.Random(seed)
    wanted, timers = [], []
    for n in range(count):
        text = f"number {n}: {kinds[n % len(kinds)] if n % 50 else LINE * 3000}"
        if dice.random() < 0.2:
            desk.raw("copy-mode", "-t", pane.pane_id)
        if dice.random() < 0.05:
            os.kill(pane.pid, signal.SIGSTOP)
            timers.append(threading.Timer(0.7, os.kill, (pane.pid, signal.SIGCONT)))
            timers[-1].start()
        wanted.append(pitboss.guard_prompt(text))
        assert desk.deliver(pane, text), f"prompt {n}\n{desk.screen()}"
    for timer in timers:
        timer.join()
    assert prompts_told(desk) == wanted


def test_a_dozen_prompts_are_each_delivered_once(demo, monkeypatch):
    monkeypatch.setattr(pitboss, "PASTE_S", 0.15)
    desk, _, pane = demo
    many_prompts(desk, pane, 12)


@pytest.mark.slow
def test_many_prompts_are_each_delivered_once_while_the_machine_is_busy(demo):
    desk, _, pane = demo
    with busy_cores():
        many_prompts(desk, pane, int(os.environ.get("PITBOSS_TEST_PROMPTS", "60")))


# ------------------------------------------------------------------ conversations

def test_a_conversation_is_cleared_whatever_stands_in_the_box(demo):
    desk, row, pane = demo
    assert desk.deliver(pane, "one")
    before = desk.wait("turn_ended")["session"]
    for leftover in ("", "typed by a person\nand not sent"):
        desk.do(desk.tmux.paste(pane.pane_id, leftover))
        last = desk.last()
        assert desk.do(pitboss.clear_context(desk.tmux, row, pane.pane_id, desk.told("cleared", after=last)))
        now = desk.wait("cleared", after=last)["session"]
        assert now != before
        before = now
    assert prompts_told(desk) == ["one"]


def test_a_clearing_that_is_never_confirmed_is_told_and_a_fresh_agent_begins_anew(desk, monkeypatch):  # noqa: F811
    monkeypatch.setattr(pitboss, "CLEAR_S", 0.6)
    row, prepared = desk.prepare()
    pane = shell(desk, "e.1", "trap '' INT; exec cat >/dev/null")
    wait_for(lambda: desk.do(desk.tmux.pane(pane.pane_id)).command == "cat", 10)
    assert desk.do(pitboss.clear_context(desk.tmux, row, pane.pane_id, desk.told("cleared"))) is False
    desk.do(desk.tmux.respawn(pane.pane_id, str(desk.repo), prepared.argv, prepared.env))
    assert desk.wait("started")["cwd"] == str(desk.repo)
    assert desk.deliver(pane, "again")


@pytest.mark.slow
def test_a_turn_is_interrupted_without_an_event_and_an_idle_agent_is_not_harmed(demo):
    desk, row, pane = demo
    assert desk.deliver(pane, "wait\n$ sleep 300")
    assert desk.do(pitboss.interrupt_turn(desk.tmux, row, pane.pane_id)) is True
    assert not pitboss.is_busy(desk.do(desk.tmux.pane(pane.pane_id)))
    assert [e["event"] for e in desk.events()] == ["started", "prompt"]
    assert desk.do(pitboss.interrupt_turn(desk.tmux, row, pane.pane_id)) is True
    assert desk.deliver(pane, "next\n$ say still here")
    assert desk.wait("turn_ended")["last"] == "still here"


STUBBORN = """import os, sys, tty
tty.setraw(0)
os.write(1, "\\x1b]2;⠂ at work\\x07".encode())
seen = b""
while seen.count(b"\\x1b") < 2:
    seen += os.read(0, 99)
os.write(1, "\\x1b]2;✳ idle\\x07".encode())
while True:
    seen += os.read(0, 99)
    open(sys.argv[1], "wb").write(seen)
"""


def test_an_interrupt_is_repeated_while_a_turn_shows_and_no_longer(desk, monkeypatch):  # noqa: F811
    """A third Escape would open a dialog."""
    monkeypatch.setattr(pitboss, "ESCAPE_S", 0.3)
    out = desk.root / "seen"
    pane = desk.do(desk.tmux.open_window("pit", "e.1", str(desk.repo), [PYTHON, "-c", STUBBORN, str(out)], desk.env))
    wait_for(lambda: pitboss.is_busy(desk.do(desk.tmux.pane(pane.pane_id))), 10)
    row = pitboss.TUI_AGENTS["claude-code"]
    assert desk.do(pitboss.interrupt_turn(desk.tmux, row, pane.pane_id)) is True
    desk.do(desk.tmux.press(pane.pane_id, "z"))
    wait_for(lambda: out.exists() and out.read_bytes().endswith(b"z"), 10)
    assert out.read_bytes() == b"\x1b\x1bz"


def test_a_turn_shows_on_the_screen_of_an_agent_whose_title_tells_nothing(desk):  # noqa: F811
    pane = shell(desk, "e.1", "echo '  esc interrupt '; read x; clear; exec sleep 60")
    row = pitboss.TUI_AGENTS["opencode"]
    wait_for(lambda: desk.do(pitboss.shows_turn(desk.tmux, row, pane.pane_id)), 10)
    assert not desk.do(pitboss.shows_turn(desk.tmux, pitboss.TUI_AGENTS["demo"], pane.pane_id))
    desk.do(desk.tmux.press(pane.pane_id, "Enter"))
    wait_for(lambda: not desk.do(pitboss.shows_turn(desk.tmux, row, pane.pane_id)), 10)


@pytest.mark.parametrize("title, busy", [
    ("⠂ Claude Code", True), ("⠐ Reading files", True), ("✳ Claude Code", False), ("OC | a title", False), ("", False)])
def test_a_title_tells_of_a_turn(title, busy):
    pane = pitboss.Pane("e", "%1", "@1", "$1", 7, False, None, "claude", "/", title)
    assert pitboss.is_busy(pane) is busy
    assert not pitboss.is_busy(pane._replace(is_dead=True)), "what its title said last is no turn"


def test_what_the_scripted_agent_tells(demo):
    """Background tasks, a permission, an error, its end: what a loop must tell apart."""
    desk, _, pane = demo
    desk.deliver(pane, "one\n$ task 0.3\n$ say begun")
    assert (first := desk.wait("turn_ended"))["background"] == 1 and first["last"] == "begun"
    assert desk.wait("turn_ended", count=2)["background"] == 0
    assert "task-notification" in prompts_told(desk)[1]
    desk.deliver(pane, "two\n$ permit Bash\n$ say allowed")
    asked = desk.wait("permission")
    assert asked["tool"] == "Bash" and "Bash" in asked["input"] and not desk.events(kind="turn_ended", after=asked["file"])
    desk.do(desk.tmux.press(pane.pane_id, "Enter"))
    assert desk.wait("turn_ended", after=asked["file"])["last"] == "allowed"
    desk.deliver(pane, "three\n$ limit 60")
    assert "429" in desk.wait("turn_failed")["error"]
    used = desk.wait("turn_failed")["usage"]
    assert used["input"] > 0 and used["output"] > 0 and used["cost_usd"] is None
    desk.do(desk.tmux.press(pane.pane_id, "C-c", "C-c"))
    assert desk.wait("ended")["kind"] == "prompt_input_exit"
    assert wait_for(lambda: (p := desk.do(desk.tmux.panes())["e.1"]).is_dead and p, 10).status in (0, UNTOLD)


def test_the_scripted_agent_works_on_the_ticket_that_a_prompt_names(demo):
    desk, _, pane = demo
    ticket = desk.root / "t.json"
    ticket.write_text(json.dumps([{"id": "t.1", "description": "Make a file.\n$ write made.txt yes\n$ commit Made\n"
                                                               "$ leave What colour?\n$ write colour.txt red"}]))
    tool = desk.root / "tracker"
    tool.write_text(f'#!/bin/sh\ncase "$1" in show) cat {ticket};; close) echo "$2" >>{desk.root}/closed;; esac\n')
    tool.chmod(0o755)
    desk.deliver(pane, f"Work on t.1. Read it with `{tool} show t.1`. Close it with `{tool} close t.1`.")
    assert desk.wait("turn_ended")["last"] == "What colour?"
    assert git(desk.repo, "log", "-1", "--format=%s") == "Made\n" and not (desk.root / "closed").exists()
    desk.deliver(pane, "Message from the orchestrator:\nred")
    desk.wait("turn_ended", count=2)
    assert (desk.repo / "colour.txt").read_text() == "red\n" and (desk.root / "closed").read_text() == "t.1\n"
    desk.deliver(pane, "Read it with `false show t.2`.")
    assert "showed no ticket" in desk.wait("turn_failed")["error"]


def test_nothing_of_ours_is_in_the_worktree(demo):
    desk, _, pane = demo
    desk.deliver(pane, "one")
    desk.wait("turn_ended")
    assert git(desk.repo, "status", "--porcelain", "--ignored") == ""


# ------------------------------------------------------------------ hooks

@pytest.fixture
def pinned(tmp_path):
    """A session folder with the hook in it."""
    session = tmp_path / "session"
    session.mkdir()
    pin(str(session))
    return str(session)


def listen(path: Path, backlog: int = 8) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(path))
    server.listen(backlog)
    server.settimeout(10)
    return server


def spooled(session: str, epic: str = "e") -> list[dict]:
    return pitboss.read_hook_spool(pitboss.epic_folder(session, epic))


PROMPT = {"hook_event_name": "UserPromptSubmit", "session_id": "s1", "prompt": "hello", "cwd": "/w"}


def test_a_hook_leaves_its_event_and_pokes_the_daemon(pinned, tmp_path):
    server = listen(tmp_path / "d")
    done, _ = hook_run(pinned, "e", json.dumps(PROMPT).encode(), str(tmp_path / "d"))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    event, = spooled(pinned)
    assert {k: event[k] for k in ("event", "epic", "session", "prompt", "cwd")} == {
        "event": "prompt", "epic": "e", "session": "s1", "prompt": "hello", "cwd": "/w"}
    assert abs(event["at"] - time.time()) < 60
    link, _ = server.accept()
    assert json.loads(link.recv(9999)) == {"method": "agent-event", "params": {"epicId": "e", "event": event["file"]}}
    assert os.stat(pitboss.epic_folder(pinned, "e") + "/spool/" + event["file"]).st_mode & 0o777 == 0o600


@pytest.mark.parametrize("raw", [b"", b"no json", b"[1]", b"\xff\xfe", b'{"hook_event_name": 3}', b"[" * 100000,
                                 b'{"hook_event_name": "Stop", "background_tasks": 7}'])
def test_a_hook_says_nothing_whatever_it_is_given(pinned, raw):
    done, _ = hook_run(pinned, "e", raw, "/no/such/socket")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    event, = spooled(pinned)
    assert event["event"] == "other"


def test_a_hook_that_is_started_wrongly_or_cannot_write_says_nothing(pinned, tmp_path):
    (tmp_path / "session" / "epics").write_text("a file in the place of the folder")
    for argv in (pitboss.hook_argv(pinned, "claude-code", "e", "/x"), pitboss.hook_argv(pinned, "c", "e", "/x")[:5]):
        done = subprocess.run(argv, input=b"{}", capture_output=True, timeout=20)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_hook_waits_neither_for_a_deaf_daemon_nor_for_an_input_without_an_end(pinned, tmp_path):
    """A daemon that accepts nobody and whose queue is full; then an agent that keeps the pipe open."""
    server, links = listen(tmp_path / "d", 0), []
    for _ in range(4):
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.setblocking(False)
        links.append(link)
        if link.connect_ex(str(tmp_path / "d")):
            break
    _, seconds = hook_run(pinned, "e", json.dumps(PROMPT).encode(), str(tmp_path / "d"))
    assert seconds < 5
    process = subprocess.Popen(pitboss.hook_argv(pinned, "claude-code", "e", "/x"), stdin=subprocess.PIPE)
    process.stdin.write(json.dumps(PROMPT).encode())
    process.stdin.flush()
    assert process.wait(10) == 0
    assert [e["event"] for e in spooled(pinned)] == ["prompt", "prompt"]
    process.stdin.close()
    server.close()


def test_a_hook_costs_little_more_than_python_itself(pinned):
    """It runs in every turn of an agent, which waits for it."""
    def best(run) -> float:
        return min(run() for _ in range(5))

    def bare() -> float:
        began = time.monotonic()
        subprocess.run([sys.executable, "-I", "-S", "-c", "import json"], stdin=subprocess.DEVNULL, check=True)
        return time.monotonic() - began

    hook = best(lambda: hook_run(pinned, "e", json.dumps(PROMPT).encode(), "/no/such/socket")[1])
    python = best(bare)
    print(f"hook {hook * 1000:.0f} ms, python {python * 1000:.0f} ms")
    assert hook < 4 * python + 0.1


def test_events_keep_their_order_though_the_clock_is_set_back(pinned):
    folder = pitboss.epic_folder(pinned, "e")
    future = f"{time.time_ns() + 10 ** 15:020d}-1.json"
    os.makedirs(f"{folder}/spool")
    Path(folder, "spool", future).write_text(json.dumps({"agent": "claude-code", "epic": "e", "at": 1.0, "raw": PROMPT}))
    for word in ("a", "b", "c"):
        hook_run(pinned, "e", json.dumps({**PROMPT, "prompt": word}).encode(), "/x")
    assert [e["prompt"] for e in spooled(pinned)] == ["hello", "a", "b", "c"]
    names = [e["file"] for e in spooled(pinned)]
    assert [e["prompt"] for e in pitboss.read_hook_spool(folder, names[1])] == ["b", "c"]
    for name in names[:2]:
        pitboss.remove_spooled(folder, name)
    assert [e["prompt"] for e in spooled(pinned)] == ["b", "c"]
    assert pitboss.read_hook_spool(folder + "-none") == []


def test_hooks_of_one_moment_are_all_kept(pinned):
    running = [subprocess.Popen(pitboss.hook_argv(pinned, "claude-code", "e", "/x"), stdin=subprocess.PIPE)
               for _ in range(12)]
    for n, process in enumerate(running):
        process.stdin.write(json.dumps({**PROMPT, "prompt": str(n)}).encode())
        process.stdin.close()
    assert [p.wait(30) for p in running] == [0] * 12
    assert sorted(int(e["prompt"]) for e in spooled(pinned)) == list(range(12))


def test_a_hook_that_finds_no_daemon_starts_one_once(pinned, tmp_path):
    out = tmp_path / "woken"
    wake = ["sh", "-c", f'echo "${{PIT_EPIC-none}}" >>{out}']
    env = {**os.environ, "PIT_WAKE": json.dumps(wake), "PIT_EPIC": "e"}
    for _ in range(2):
        hook_run(pinned, "e", json.dumps(PROMPT).encode(), "/no/such", env=env)
    assert wait_for(lambda: out.exists() and out.read_text(), 10) == "none\n"
    server = listen(tmp_path / "d")
    hook_run(pinned, "f", b"{}", str(tmp_path / "d"), env=env)
    hook_run(pinned, "g", b"{}", "/no/such", env={k: v for k, v in env.items() if k != "PIT_WAKE"})
    hook_run(pinned, "h", b"{}", "/no/such", env={**env, "PIT_WAKE": "nonsense"})
    hook_run(pinned, "i", b"{}", "/no/such", env=env)
    wait_for(lambda: out.read_text() == "none\nnone\n", 10)
    server.close()


@pytest.mark.parametrize("raw, wanted", [
    ({"hook_event_name": "SessionStart", "source": "startup"}, {"event": "started", "kind": "startup"}),
    ({"hook_event_name": "SessionStart", "source": "resume"}, {"event": "started"}),
    ({"hook_event_name": "SessionStart", "source": "clear"}, {"event": "cleared"}),
    ({"hook_event_name": "SessionStart", "source": "compact"}, {"event": "other", "kind": "compact"}),
    ({"hook_event_name": "SessionEnd", "reason": "clear"}, {"event": "other"}),
    ({"hook_event_name": "SessionEnd", "reason": "prompt_input_exit"}, {"event": "ended", "kind": "prompt_input_exit"}),
    ({"hook_event_name": "Stop", "last_assistant_message": "x" * 9999, "background_tasks": [{"id": "1"}]},
     {"event": "turn_ended", "last": "x" * 4000, "background": 1}),
    ({"hook_event_name": "StopFailure", "error": "unknown", "last_assistant_message": "API Error: 400"},
     {"event": "turn_failed", "error": "API Error: 400"}),
    ({"hook_event_name": "PermissionRequest", "tool_name": "Bash", "tool_input": {"command": "ls"}},
     {"event": "permission", "tool": "Bash", "input": '{"command": "ls"}'}),
    ({"hook_event_name": "Notification", "notification_type": "idle_prompt", "message": "waiting"},
     {"event": "notice", "message": "waiting"}),
    ({"hook_event_name": "Notification", "notification_type": "permission_prompt"}, {"event": "other"}),
    ({"hook_event_name": "Later"}, {"event": "other"})])
def test_events_of_claude(raw, wanted):
    event = pitboss.read_claude({"session_id": "s", "cwd": "/w", "transcript_path": "/t", **raw})
    assert {k: event.get(k) for k in wanted} == wanted
    assert (event["session"], event["cwd"], event["transcript"]) == ("s", "/w", "/t")


@pytest.mark.parametrize("raw, wanted", [
    ({"type": "started", "directory": "/w"}, {"event": "started", "cwd": "/w", "session": ""}),
    ({"type": "prompt", "session": "s", "prompt": "p"}, {"event": "prompt", "prompt": "p", "session": "s"}),
    ({"type": "idle", "session": "s", "last": "words", "finish": "stop", "messages": [
        {"cost": 0.5, "tokens": {"input": 1, "output": 2, "reasoning": 3, "cache": {"read": 4, "write": 5}}},
        {"cost": 0.25, "tokens": {"input": 10, "output": 20}}]},
     {"event": "turn_ended", "last": "words", "background": 0, "usage": {
         "input": 11, "output": 25, "cache_read": 4, "cache_creation": 5, "cost_usd": 0.75}}),
    ({"type": "idle", "session": "s", "error": {"name": "APIError", "data": {"message": "no"}}},
     {"event": "turn_failed", "error": "APIError: no"}),
    ({"type": "idle", "session": "s", "error": {"name": "MessageAbortedError"}}, {"event": "other", "kind": "interrupted"}),
    ({"type": "idle", "session": "s"}, {"event": "other", "kind": "interrupted"}),      # before its model answered
    ({"type": "permission", "session": "s", "tool": "bash", "input": {"command": "ls"}},
     {"event": "permission", "tool": "bash", "input": '{"command": "ls"}'}),
    ({"type": "answered", "session": "s"}, {"event": "other", "kind": "answered"})])
def test_events_of_opencode(raw, wanted):
    event = pitboss.read_opencode(raw)
    assert {k: event.get(k) for k in wanted} == wanted


@pytest.mark.parametrize("session, event, counts", [
    ("s1", {"event": "turn_ended", "session": "s1"}, True),
    ("s2", {"event": "turn_ended", "session": "s1"}, False),       # late, of the conversation before
    ("", {"event": "turn_ended", "session": "s1"}, True),
    ("s1", {"event": "cleared", "session": "s2"}, True),
    ("s1", {"event": "started", "session": "s2"}, True),
    ("s1", {"event": "other", "session": ""}, True)])
def test_late_events_of_an_earlier_conversation_do_not_count(session, event, counts):
    assert pitboss.follows(session, event) is counts


def test_a_late_event_of_a_real_conversation_does_not_count(demo):
    desk, row, pane = demo
    desk.deliver(pane, "one")
    first = desk.wait("turn_ended")
    assert desk.do(pitboss.clear_context(desk.tmux, row, pane.pane_id, desk.told("cleared")))
    now = desk.wait("cleared")["session"]
    hook_run(desk.session, "e.1", json.dumps({"hook_event_name": "Stop", "session_id": first["session"]}).encode(),
             desk.daemon_socket)
    desk.deliver(pane, "two")
    desk.wait("turn_ended", count=3)
    assert [pitboss.follows(now, e) for e in desk.events(kind="turn_ended")] == [False, False, True]


def test_usage_is_counted_once_a_message(tmp_path):
    path = tmp_path / "t.jsonl"

    def line(number: str, **usage) -> str:
        return json.dumps({"type": "assistant", "message": {"id": number, "usage": usage}}) + "\n"

    path.write_text(line("a", input_tokens=5, output_tokens=1) + line("a", input_tokens=5, output_tokens=9)
                    + '{"type": "user"}\nbroken "assistant"\n' + line("b", cache_read_input_tokens=7)
                    + '{"type": "assistant", "message": null}\n{"type": "assistant", "message": "x"}\n')
    assert pitboss.transcript_usage(str(path)) == {"input": 5, "output": 9, "cache_read": 7, "cache_creation": 0,
                                                   "cost_usd": None}
    assert pitboss.transcript_usage(str(tmp_path / "none")) is None


# ------------------------------------------------------------------ rows

@pytest.mark.parametrize("name", pitboss.TUI_AGENTS)
def test_an_agent_of_the_table_is_prepared_outside_the_worktree(name, tmp_path):
    row = pitboss.TUI_AGENTS[name]
    assert row.name == name and row.agent in pitboss.AGENTS
    hook = tuple(pitboss.hook_argv(str(tmp_path), name, "e", "/sock"))
    env = {"PATH": "/bin", "KEY": "v", **dict.fromkeys(pitboss.AGENT_MARKS, "x"), "OPENCODE_CONFIG_CONTENT": "{}"}
    for superuser in (False, True):
        seat = pitboss.TuiSeat(pitboss.epic_folder(str(tmp_path), "e"), "e", ("prog",), "some/model", hook, "Instructions.",
                            superuser, env)
        prepared = row.prepare(seat)
        assert all(path.startswith(seat.folder + "/") for path in prepared.files)
        assert "Instructions." in prepared.files.values()
        assert prepared.argv[0] == "prog" and "some/model" in prepared.argv
        assert prepared.env["KEY"] == "v" and "CLAUDECODE" not in prepared.env and "TMUX" not in prepared.env
        assert "Instructions." not in prepared.argv
    without = row.prepare(seat._replace(model=""))
    assert "--model" not in without.argv or name == "demo"
    assert row.clear.startswith("/") and row.interrupt


def test_claude_is_prepared_as_it_was_measured(tmp_path):
    hook = ("python", "/a b/hook", "x;y")
    seat = pitboss.TuiSeat(str(tmp_path), "e", ("claude",), "", hook, "I.", True, {"CLAUDECODE": "1", "A": "b"})
    prepared = pitboss.prepare_claude(seat)
    assert prepared.argv == ["claude", "--settings", f"{tmp_path}/claude.json", "--disallowedTools",
                             "AskUserQuestion,ExitPlanMode", "--append-system-prompt-file",
                             f"{tmp_path}/instructions.md", "--dangerously-skip-permissions"]
    assert prepared.env == {"A": "b", "CLAUDE_CODE_SANDBOXED": "1", "IS_SANDBOX": "1"}
    assert "IS_SANDBOX" not in pitboss.prepare_claude(seat._replace(superuser=False)).env
    settings = json.loads(prepared.files[f"{tmp_path}/claude.json"])
    assert settings["skipDangerousModePermissionPrompt"] is True and set(settings["hooks"]) == set(pitboss.CLAUDE_HOOKS)
    assert all(rows[0]["hooks"][0]["command"] == "python '/a b/hook' 'x;y'" for rows in settings["hooks"].values())


def test_opencode_keeps_what_its_user_configured(tmp_path):
    own = {"plugin": ["mine"], "instructions": ["mine.md"], "theme": "x", "permission": {"bash": "ask"}}
    seat = pitboss.TuiSeat(str(tmp_path / "a b"), "e", ("opencode",), "", ("hook", "sock"), "I.", False,
                        {"OPENCODE_CONFIG_CONTENT": json.dumps(own), "OPENCODE_CONFIG_DIR": "/mine"})
    prepared = pitboss.prepare_opencode(seat)
    content = json.loads(prepared.env["OPENCODE_CONFIG_CONTENT"])
    assert content["theme"] == "x" and content["instructions"] == ["mine.md", f"{tmp_path}/a b/instructions.md"]
    assert content["plugin"] == ["mine", f"file://{tmp_path}/a%20b/opencode.js"]
    assert content["permission"] == {"*": "allow", "question": "deny"} and prepared.env["OPENCODE_CONFIG_DIR"] == "/mine"
    broken = pitboss.prepare_opencode(seat._replace(env={"OPENCODE_CONFIG_CONTENT": "nonsense"}))
    assert json.loads(broken.env["OPENCODE_CONFIG_CONTENT"])["plugin"]


@pytest.mark.parametrize("screen, words", [
    ("╭──╮\n│ Quick safety check: Is this a project you trust? │\n│ ❯ 1. Yes, I trust this folder │", "can be trusted"),
    ("Detected a custom API key in your environment\n ❯ No (recommended)", "API key"),
    ("  ░░░░ \n *  ██▄█ *\nUnable to connect to Anthropic services", "cannot reach its provider"),
    ("command not found: x", "command not found: x"), ("\n\n", "its screen is empty")])
def test_a_silent_agent_is_explained_by_its_screen(screen, words):
    said = pitboss.explain_silence(pitboss.TUI_AGENTS["claude-code"], screen + "\x1b[31m")
    assert words in said and "░" not in said and "\x1b" not in said
