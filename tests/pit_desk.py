"""What the tests of the ticket loop share: a project, a private tmux server, `pit` as a program.

What happened is read from the program's answers, the tickets, git, tmux and the process table.
"""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tools import Home, git, wait_for

needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="no tmux on PATH")
IDENTITY = {f"GIT_{who}_{what}": "t@t" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


class Pit:
    """A project of one test's own, and what can be typed in it."""

    def __init__(self, home: Home, name: str = "repo", **config) -> None:
        self.home = home
        self.repo = home.repo(name, 3)
        self.env = {**home.env, **IDENTITY, "TMUX_TMPDIR": str(home.root), "SHELL": "/bin/sh", "TERM": "xterm-256color"}
        self.env.pop("TMUX", None)
        self.configure(**config)

    def configure(self, **config) -> None:
        """Write `.pit.json`: the scripted agent, without delays, unless `config` says otherwise."""
        (self.repo / ".git/info/exclude").write_text("/.pit.json\n")
        (self.repo / ".pit.json").write_text(json.dumps({"agent": "demo", "clearDelay": 0, **config}))

    def run(self, *args, check: int | None = 0, timeout: float = 60, cwd=None, env=None) -> subprocess.CompletedProcess:
        """One command line of pit, to its end."""
        done = subprocess.run(self.home.argv("pit", *args), cwd=cwd or self.repo, env={**self.env, **(env or {})},
                              text=True, capture_output=True, timeout=timeout, stdin=subprocess.DEVNULL)
        if check is not None:
            assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}\n{self.daemon_log()}"
        return done

    def pit(self, *args, **options):
        """The JSON answer of one command."""
        return json.loads(self.run(*args, **options).stdout)

    def error(self, *args, check: int, **options) -> dict:
        """The error of a command that must fail so."""
        return self.pit(*args, check=check, **options)["error"]

    def spawn(self, *args) -> subprocess.Popen:
        """A command that goes on, its output in a pipe."""
        return subprocess.Popen(self.home.argv("pit", *args), cwd=self.repo, env=self.env, text=True,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def epic(self, title: str, *tickets: str, chain: bool = True) -> str:
        """An epic with tickets, whose scripts are `tickets`; each waits for the one before.  Its short id."""
        lines, rows = [], []
        name = title.lower()
        for n, script in enumerate(tickets, 1):
            deps = [{"issue_id": f"repo-{name}.{n}", "depends_on_id": f"repo-{name}", "type": "parent-child"}]
            if chain and n > 1:
                deps.append({"issue_id": f"repo-{name}.{n}", "depends_on_id": f"repo-{name}.{n - 1}",
                             "type": "blocks"})
            rows.append({"id": f"repo-{name}.{n}", "title": f"{title} {n}", "description": script,
                         "status": "open", "priority": 2, "issue_type": "task", "dependencies": deps})
        rows.insert(0, {"id": f"repo-{name}", "title": title, "status": "open", "priority": 2, "issue_type": "epic"})
        path = self.home.root / f"{name}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        self.run("ticket", "import", str(path))
        return name

    def watch(self, until: str = "settled", timeout: float = 50, *args, check: int | None = 0) -> list[dict]:
        """The lines of `watch`, to its end."""
        done = self.run("watch", "--until", until, "--timeout", str(timeout), *args, check=None, timeout=timeout + 30)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        if check is not None:
            assert done.returncode == check, f"{lines}\n{done.stderr}\n{self.daemon_log()}\n{self.screens()}"
        return lines

    def status(self, name: str | None = None) -> dict:
        """How an epic stands, or the whole answer."""
        answer = self.pit("status", *([name] if name else []))
        return answer["epics"][name] if name else answer

    def statuses(self) -> dict[str, str]:
        """The status of each ticket."""
        return {t["id"]: t["status"] for t in self.pit("ticket", "list", "--all") if t["issue_type"] != "epic"}

    @property
    def folder(self) -> Path:
        """The session folder."""
        return next((self.home.root / "data/pitboss/pit").iterdir())

    def events(self, kind: str = "") -> list[dict]:
        """The events of the session's journal."""
        raw = (self.folder / "journal.jsonl").read_bytes().split(b"\n")[:-1]
        return [e for e in map(json.loads, raw) if kind in ("", e["kind"])]

    def daemon_log(self) -> str:
        """What the daemon said."""
        logs = list((self.home.root / "data/pitboss/pit").glob("*/daemon.log"))
        return "".join(p.read_text() for p in logs)

    def daemon_pid(self) -> int | None:
        """The pid of the living daemon."""
        return self.pit("daemon", "status")["pid"]

    def tmux(self, *args, check: bool = True) -> str:
        """A command to the private tmux server."""
        done = subprocess.run(["tmux", "-S", self.tmux_socket, *args], text=True, capture_output=True, env=self.env)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    @property
    def tmux_socket(self) -> str:
        """The socket of the private tmux server."""
        return f"{os.path.realpath(self.home.root)}/tmux-{os.getuid()}/default"

    def screens(self) -> str:
        """What every window shows."""
        panes = self.tmux("list-panes", "-a", "-F", "#{pane_id}", check=False).split()
        return "\n".join(self.tmux("capture-pane", "-p", "-t", p, check=False) for p in panes)

    def commits(self, branch: str) -> list[str]:
        """The subjects of a branch's commits beyond main, oldest first."""
        return git(self.repo, "log", "--reverse", "--format=%s", f"main..{branch}").splitlines()

    def end(self) -> None:
        """Nothing of it stays alive."""
        subprocess.run(["tmux", "-S", self.tmux_socket, "kill-server"], capture_output=True, env=self.env)
        self.home.end_everything()
        for path in Path("/tmp/pit").glob(f"{os.getuid()}-*") if (self.home.root / "data/pitboss/pit").exists() else ():
            if path.name.endswith(tuple(p.name[-12:] for p in (self.home.root / "data/pitboss/pit").iterdir())):
                shutil.rmtree(path, ignore_errors=True)


def work(n: int) -> str:
    """The script of a ticket that is worked in one turn."""
    return f"$ write f{n}.txt {n}\n$ commit work {n}"
