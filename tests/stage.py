"""A run with a lead for tests: the scripted lead only waits, and the test itself acts with the lead's token.

`Stage` starts a dispatcher as a program; `lead()`, `worker()` and `operator()` are clients of its real sockets.
"""
from __future__ import annotations

import json
import os
import select
import shlex
import socket
import time
from pathlib import Path

from tools import Home, read_events, read_records, wait_for

DEADLINE_S = 60


class Client:
    """A connection to one of the sockets: lines out and in, with a deadline for each."""

    def __init__(self, path: str | socket.socket) -> None:
        """Connect to a path; a socket that is given is connected already."""
        if isinstance(path, socket.socket):
            self.sock = path
        else:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.connect(path)
        self.buffer, self.lines, self.kept, self.next_id = b"", [], [], 0

    def say(self, *lines) -> None:
        """Send lines: bytes as they are, anything else as JSON."""
        self.sock.sendall(b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n"
                                   for line in lines))

    def hear(self, deadline_s: float = DEADLINE_S):
        """The next line that was not heard yet; None at the end of all lines."""
        end = time.monotonic() + deadline_s
        while not self.lines:
            left = end - time.monotonic()
            assert left > 0 and select.select([self.sock], [], [], left)[0], f"no line in {deadline_s:g} s"
            try:
                data = self.sock.recv(1 << 18)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            *lines, self.buffer = (self.buffer + data).split(b"\n")
            self.lines += lines
        return json.loads(self.lines.pop(0))

    def find(self, wanted, deadline_s: float = DEADLINE_S) -> dict:
        """The first line for which `wanted(line)` is true; the others are kept for later."""
        for n, line in enumerate(self.kept):
            if wanted(line):
                return self.kept.pop(n)
        end = time.monotonic() + deadline_s
        while (line := self.hear(end - time.monotonic())) is not None:
            if wanted(line):
                return line
            self.kept.append(line)
        raise AssertionError(f"the connection ended; heard {self.kept}")

    def close(self) -> None:
        self.sock.close()


class Caller(Client):
    """A connection of an actor: MCP."""

    def __init__(self, path: str, actor: str, token: str, nonce: str = "", role: str = "lead") -> None:
        super().__init__(path)
        nonce = nonce or os.urandom(8).hex()
        self.say({"jsonrpc": "2.0", "id": "hello", "method": "hello", "params": {
            "protocol": 1, "actor_id": actor, "role": role, "token": token, "nonce": nonce, "outstanding": []}})
        self.greeting = self.hear()

    def start(self, tool: str, arguments=None, id=None, **more) -> int:
        """Call a tool without waiting; the id of the request."""
        if id is None:
            self.next_id += 1
            id = self.next_id
        self.say({"jsonrpc": "2.0", "id": id, "method": "tools/call",
                  "params": {"name": tool, "arguments": {} if arguments is None else arguments, **more}})
        return id

    def answer(self, id, deadline_s: float = DEADLINE_S) -> dict:
        return self.find(lambda line: line.get("id") == id, deadline_s)

    def call(self, tool: str, **arguments) -> dict:
        """structuredContent of a call that must not be refused; its text says the same."""
        return value_of(self.answer(self.start(tool, arguments)))

    def refused(self, tool: str, **arguments) -> str:
        """The words of a call that must be refused."""
        return words_of(self.answer(self.start(tool, arguments)))

    def ask(self, method: str, params=None) -> dict:
        self.next_id += 1
        self.say({"jsonrpc": "2.0", "id": self.next_id, "method": method, "params": params or {}})
        return self.answer(self.next_id)


def value_of(answer: dict) -> dict:
    assert "result" in answer and answer["result"]["isError"] is False, answer
    value = answer["result"]["structuredContent"]
    assert json.loads(answer["result"]["content"][0]["text"]) == value
    return value


def words_of(answer: dict) -> str:
    assert "result" in answer and answer["result"]["isError"] is True, answer
    assert "structuredContent" not in answer["result"]
    return answer["result"]["content"][0]["text"]


class Operator(Client):
    """A connection to the control socket that has said hello."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.say({"op": "hello", "client_version": "0.9.0"})
        self.hello = self.hear()

    def op(self, op: str, **fields) -> dict:
        """Ask for an operation; the line that answers it, without its id."""
        self.next_id += 1
        number = self.next_id
        self.say({"op": op, "id": number, **fields})
        answer = self.find(lambda line: line.get("id") == number)
        assert answer.pop("id") == number
        return answer

    def told(self, event: str, **facts) -> dict:
        """The first event of that name with these facts."""
        return self.find(lambda line: line.get("event") == event
                         and all(line.get(k) == v for k, v in facts.items()))


def gate(path: Path) -> str:
    """A step of a script that lasts until a file is there."""
    return f"$ run while [ ! -e {shlex.quote(str(path))} ]; do sleep 0.05; done"


class Stage:
    """A run whose lead `boss` waits for the file `home/lead.gate`, unless `script` says otherwise."""

    def __init__(self, home: Home, *, script: str | None = None, budget: float = 100.0, workers: int = 8,
                 run: str = "", lead: str = "", defaults: str = "", more: str = "",
                 args: tuple = ()) -> None:
        self.home = home
        self.gate = home.root / "lead.gate"
        self.repo = home.root / "repo"
        if not self.repo.exists():
            home.repo("repo", 2)
        text = gate(self.gate) + "\n$ say the lead is done" if script is None else script
        self.manifest = home.manifest(
            f"[run]\nmax_workers = {workers}\nbudget_usd = {budget}\n{run}\n"
            f"[defaults]\nagent = \"demo\"\nuse_worktree = false\n{defaults}\n"
            f"[lead]\nid = \"boss\"\ndirectory = \"repo\"\n{lead}\nprompt = '''\n{text}\n'''\n{more}\n")
        self.log = open(home.root / "dispatch.out", "a+")
        self.process = home.start("dispatch", self.manifest, *args, stdout=self.log, stderr=self.log)
        self.run = self._find_run()
        self.clients: list[Client] = []

    def _find_run(self) -> Path:
        def ready():
            found = sorted(self.home.runs.glob("*/sockets.json")) if self.home.runs.exists() else []
            return found and (found[-1].parent / "tasks/boss/token").exists() and found[-1].parent
        return wait_for(lambda: ready() or self.process.poll() is not None and self._died(), DEADLINE_S, "the run")

    def _died(self):
        self.log.seek(0)
        raise AssertionError(f"the dispatcher ended: {self.log.read()}")

    def socket(self, name: str) -> str:
        return json.loads((self.run / "sockets.json").read_text())[name]

    def token(self, actor: str) -> str:
        path = self.run / "tasks" / actor / "token"
        return wait_for(lambda: path.exists() and path.read_text(), DEADLINE_S, f"the token of {actor}")

    def kept(self, client):
        self.clients.append(client)
        return client

    def lead(self, **options) -> Caller:
        return self.worker("boss", **options)

    def worker(self, actor: str, **options) -> Caller:
        caller = self.kept(Caller(self.socket("mcp"), actor, self.token(actor), **options))
        assert "result" in caller.greeting, caller.greeting
        return caller

    def operator(self) -> Operator:
        return self.kept(Operator(self.socket("control")))

    def running(self, lead: Caller, name: str) -> None:
        """Return when an actor has a process that has taken its prompt up."""
        log = self.run / "tasks" / name / "stdout.log"
        wait_for(lambda: log.exists() and b'"init"' in log.read_bytes(), DEADLINE_S, f"{name} at work")

    def spawn(self, lead: Caller, script: str, **arguments) -> str:
        """Spawn a worker that is at work when this returns; its id."""
        name = lead.call("spawn_worker", prompt=script, **arguments)["task_id"]
        self.running(lead, name)
        return name

    def events(self, *kinds: str, **facts) -> list[dict]:
        return [e for e in read_events(self.run) if (not kinds or e["kind"] in kinds)
                and all(e.get(k) == v for k, v in facts.items())]

    def heard(self, actor: str) -> list[str]:
        """The texts of the messages that an actor echoed."""
        lines = (self.run / "tasks" / actor / "stdout.log").read_bytes().splitlines()
        return [row["message"]["content"] for row in map(json.loads, lines) if row.get("isReplay")]

    def finish(self, code: int | None = 0) -> dict:
        """Let the lead end; the records, by actor, when the dispatcher has left with that code."""
        self.gate.touch()
        return self.settle(code)

    def settle(self, code: int | None = 0) -> dict:
        """The records, by actor, when the dispatcher has left by itself with that code."""
        found = self.process.wait(DEADLINE_S)
        self.log.seek(0)
        assert code is None or found == code, f"exit {found}: {self.log.read()}"
        records = read_records(self.run)
        assert len({r["task_id"] for r in records}) == len(records)
        return {r["task_id"]: r for r in records}

    def summary(self) -> dict:
        return json.loads((self.run / "summary.json").read_text())

    def end(self) -> None:
        for client in self.clients:
            client.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.log.close()
