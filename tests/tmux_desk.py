"""What the tests of terminal agents share: a private tmux server, a session folder, agents in it.

A `Desk` drives pitboss's own functions, as the daemon of the ticket loop does; what happened is read from tmux,
the spool and the process table.
"""
from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

import pitboss
from tools import make_repo, wait_for

needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="no tmux on PATH")
PINNED: dict = {}


class Desk:
    """A tmux server of one test's own, the files of a session, and agents in windows."""

    def __init__(self, root: Path, env: dict | None = None) -> None:
        self.root = root
        self.session = str(root / "session")
        self.repo = make_repo(root / "repo")
        self.socket = str(root / "s")
        self.daemon_socket = str(root / "d.sock")
        self.env = {"PATH": os.environ["PATH"], "HOME": str(root / "home"), "LC_ALL": "C", "TERM": "xterm-256color",
                    "TMUX_TMPDIR": str(root), "SHELL": "/bin/sh", **(env or {})}
        (root / "home").mkdir(exist_ok=True)
        Path(self.session).mkdir(mode=0o700, exist_ok=True)
        self.tmux = pitboss.Tmux(self.socket, self.session, str(self.repo), self.env, 0o022)
        pin(self.session)

    def do(self, coroutine):
        """Run one coroutine to its end."""
        return asyncio.run(coroutine)

    def prepare(self, epic: str = "e.1", agent: str = "demo", program: tuple = (), model: str = "", **env):
        """(row, prepared) of an agent, its files written."""
        row = pitboss.TUI_AGENTS[agent]
        hook = pitboss.hook_argv(self.session, agent, epic, self.daemon_socket)
        seat = pitboss.TuiSeat(pitboss.epic_folder(self.session, epic), epic,
                            program or tuple(pitboss.self_argv(self.session)), model, tuple(hook),
                            "You work on the epic.", os.getuid() == 0, {**self.env, **env})
        prepared = row.prepare(seat)
        pitboss.write_prepared(prepared)
        return row, prepared

    def start(self, epic: str = "e.1", agent: str = "demo", started_s: float = 20, cwd=None, **more):
        """An agent in a window, once it has told that it started: (row, pane)."""
        row, prepared = self.prepare(epic, agent, **more)
        pane = self.do(self.tmux.open_window("pit", epic, str(cwd or self.repo), prepared.argv, prepared.env))
        if started_s:
            self.wait("started", epic, deadline_s=started_s)
        return row, pane

    def events(self, epic: str = "e.1", kind: str = "", after: str = "") -> list[dict]:
        return [e for e in pitboss.read_hook_spool(pitboss.epic_folder(self.session, epic), after)
                if kind in ("", e["event"])]

    def wait(self, kind: str, epic: str = "e.1", after: str = "", count: int = 1, deadline_s: float = 20) -> dict:
        """The `count`-th event of a kind after `after`, once it is there."""
        def look():
            found = self.events(epic, kind, after)
            return found[count - 1] if len(found) >= count else None

        try:
            return wait_for(look, deadline_s, f"{kind} of {epic}")
        except AssertionError as e:
            raise AssertionError(f"{e}\nevents: {self.events(epic)}\nscreen:\n{self.screen()}") from None

    def screen(self) -> str:
        done = self.raw("list-panes", "-a", "-F", "#{pane_id}")
        return "\n----\n".join(self.raw("capture-pane", "-p", "-t", pane) for pane in done.split())

    def raw(self, *words: str, check: bool = False) -> str:
        """What tmux itself prints."""
        done = subprocess.run(["tmux", "-u", "-S", self.socket, *words], env=self.env, capture_output=True, text=True,
                              stdin=subprocess.DEVNULL)
        assert not (check and done.returncode), done.stderr
        return done.stdout

    def last(self, epic: str = "e.1") -> str:
        """The name of the newest event."""
        found = self.events(epic)
        return found[-1]["file"] if found else ""

    def submitted(self, text: str, epic: str = "e.1", after: str = ""):
        """What `deliver` waits with."""
        async def wait(seconds: float) -> bool:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                if any(pitboss.is_prompt(e, text) for e in self.events(epic, "prompt", after)):
                    return True
                await asyncio.sleep(0.02)
            return False

        return wait

    def told(self, kind: str, epic: str = "e.1", after: str = ""):
        async def wait(seconds: float) -> bool:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                if self.events(epic, kind, after):
                    return True
                await asyncio.sleep(0.02)
            return False

        return wait

    def deliver(self, pane, text: str, epic: str = "e.1", home: str = "") -> bool:
        after = self.last(epic)
        return self.do(pitboss.deliver(self.tmux, pane.pane_id, text, self.submitted(text, epic, after), home))

    def close(self) -> None:
        """End every agent and the server."""
        async def end():
            try:
                for pane in (await self.tmux.panes()).values():
                    await self.tmux.end_agent(pane)
            except pitboss.TmuxFailed:
                pass

        self.do(end())
        self.raw("kill-server")


def pin(session: str) -> None:
    """What a session folder holds for its agents; made once for all tests."""
    if not PINNED:
        import atexit
        import tempfile

        PINNED["folder"] = tempfile.mkdtemp(prefix="pitboss-pinned-")
        atexit.register(shutil.rmtree, PINNED["folder"], ignore_errors=True)
        pitboss.pin_self(PINNED["folder"])
        pitboss.pin_hook(PINNED["folder"])
    shutil.copytree(os.path.join(PINNED["folder"], "self"), os.path.join(session, "self"), dirs_exist_ok=True)


@pytest.fixture
def desk(tmp_path):
    """A desk of one test's own."""
    place = Desk(tmp_path)
    yield place
    place.close()


def hook_run(session: str, epic: str, raw: bytes, socket_path: str, agent: str = "claude-code", **options):
    """One hook, run as an agent runs it: (finished process, seconds)."""
    argv = pitboss.hook_argv(session, agent, epic, socket_path)
    began = time.monotonic()
    done = subprocess.run(argv, input=raw, capture_output=True, timeout=20, **options)
    return done, time.monotonic() - began
