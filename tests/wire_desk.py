"""A desk for tests of the wire, and a server process around it: `python wire_desk.py RUN [SETTING=VALUE ...]`.

It keeps the promise that real desks make: what a key asks for is done once, and asking again gives the same
answer. What was done stands in RUN/done.jsonl; a token's owner in RUN/tokens.json.
"""
from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback
from pathlib import Path


class TestDesk:
    """Tools that answer at once, wait, refuse, break, or die."""

    __test__ = False

    def __init__(self, pitboss, run: Path) -> None:
        self.pitboss, self.run = pitboss, run
        self.done_path = run / "done.jsonl"
        self.done = {}
        if self.done_path.exists():
            for line in self.done_path.read_text().splitlines():
                key, answer = json.loads(line)
                self.done[tuple(key)] = answer

    def desk(self):
        return self.pitboss.Desk({"name": "pitboss", "title": "test", "version": "1"}, self.admit, self.tools,
                                 self.call, self.dropped, self.report)

    def note(self, *words) -> None:
        with open(self.run / "notes.txt", "a") as f:
            f.write(" ".join(map(str, words)) + "\n")

    def admit(self, hello):
        actors = json.loads((self.run / "tokens.json").read_text())
        token, role = actors.get(hello.actor, ("", ""))
        if not self.pitboss.same_token(hello.token, token):
            raise self.pitboss.Refused("refused: this is not the token of that actor")
        if hello.role != role:
            raise self.pitboss.Refused(f"refused: {hello.actor} is a {role}")
        self.note("admitted", hello.actor, json.dumps(hello.outstanding))
        return hello.actor, role

    def tools(self, caller):
        return [{"name": name, "inputSchema": {"type": "object"}, "annotations": {"readOnlyHint": True}}
                for name in ("echo", "wait", "deal_and_die", f"of_{caller[1]}")]

    def dropped(self, caller, key) -> None:
        self.note("dropped", key[2])

    def report(self, error) -> None:
        self.note("report", type(error).__name__)
        if not isinstance(error, (ZeroDivisionError, RecursionError)):
            traceback.print_exception(error)

    def deal(self, key, arguments):
        """The effect that must happen once for each key."""
        if key not in self.done:
            self.done[key] = {"number": len(self.done), "said": arguments.get("text")}
            with open(self.done_path, "a") as f:
                f.write(json.dumps([key, self.done[key]]) + "\n")
        return self.done[key]

    def call(self, caller, name, arguments, key):
        if name == "echo":
            return {"text": arguments.get("text")}
        if name == "deal":
            return self.deal(key, arguments)
        if name == "deal_and_die":
            known = key in self.done
            answer = self.deal(key, arguments)
            if not known:
                os._exit(9)
            return answer
        if name == "wait":
            return self.wait(key, arguments)
        if name == "whoami":
            return {"actor": caller[0], "role": caller[1], "key": list(key)}
        if name == "big":
            return {"text": "x" * arguments["size"]}
        if name == "text":
            return "only text"
        if name == "crash":
            return {"x": 1 / 0}
        if name == "crash_later":
            return self.crash_later()
        if name == "not_json":
            return {"x": float("nan")}
        raise self.pitboss.Refused(f"unknown tool {name}", hint="tools/list says which there are")

    async def wait(self, key, arguments):
        """Until the file named `gate` is there, then the effect."""
        self.note("waits", key[2])
        while not (self.run / arguments["gate"]).exists():
            await asyncio.sleep(0.01)
        return self.deal(key, arguments)

    async def crash_later(self):
        await asyncio.sleep(0)
        return {"x": 1 / 0}


async def serve(pitboss, run: Path, settings: dict) -> None:
    """The server until it is killed; `ready` in RUN/notes.txt says that it listens."""
    desk = TestDesk(pitboss, run)
    uid_of = (lambda connection: int(settings["uid"])) if "uid" in settings else pitboss.peer_uid
    async with asyncio.TaskGroup() as group:
        def open_session(link):
            return pitboss.McpSession(link, desk.desk(), group, float(settings.get("heartbeat_s", 15)))

        sockets = pitboss.Sockets(str(run), os.environ, {"mcp": open_session, "control": open_session},
                                  desk.report, uid_of)
        await sockets.open()
        desk.note("ready", os.getpid())
        try:
            await sockets.watch(0.05)
        finally:
            sockets.close()


def main(argv: list[str]) -> None:
    sys.path.insert(0, os.environ.get("PITBOSS_TEST_LIB") or str(Path(__file__).resolve().parent.parent))
    import pitboss

    os.umask(0o077)
    asyncio.run(serve(pitboss, Path(argv[0]), dict(word.split("=", 1) for word in argv[1:])))


if __name__ == "__main__":
    main(sys.argv[1:])
