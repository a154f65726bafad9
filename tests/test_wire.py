"""The wire: real sockets, a server process with a desk made for tests (wire_desk.py), the bridge as a process.

The server can be killed and started again at any moment; what the desk did stands in files.
"""
from __future__ import annotations

import asyncio
import json
import os
import random
import select
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

import pitboss
import wire_desk
from test_claude import LONG_S, a_claude_home, check_success, manifest, prompt, real, say, section
from tools import PITBOSS, PYTHON, program, wait_for

linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
LIB = str(program().parent / "lib" if (program().parent / "lib").is_dir() else PITBOSS.parent)
TOKENS = {"lead": ("token-of-the-lead", "lead"), "w1": ("token-of-w1", "worker")}
RUN_NAME = "0192f3a0-0000-7000-8000-000000000000"
DEADLINE_S = 30


class House:
    """A run folder with tokens, the server of it, and clients of both kinds."""

    def __init__(self, root: Path, pinned: Path) -> None:
        self.run = root / RUN_NAME
        self.run.mkdir(mode=0o700)
        (self.run / "self").symlink_to(pinned)
        (self.run / "tokens.json").write_text(json.dumps(TOKENS))
        for actor, (token, _) in TOKENS.items():
            (self.run / f"token-{actor}").write_text(token + "\n")
        self.env = {"PATH": os.environ["PATH"], "TMPDIR": str(root), "PITBOSS_TEST_LIB": LIB}
        self.processes: list[subprocess.Popen] = []
        self.open: list = []
        self.server: subprocess.Popen | None = None

    def serve(self, *settings: str, env: dict | None = None) -> subprocess.Popen:
        """Start the server and wait until it listens."""
        before = self.notes().count("ready")
        self.server = self.popen([PYTHON, wire_desk.__file__, str(self.run), *settings],
                                 env={**self.env, **(env or {})})
        wait_for(lambda: self.notes().count("ready") > before or self.server.poll() is not None, DEADLINE_S, "server")
        assert self.server.poll() is None
        return self.server

    def kill(self) -> None:
        self.server.kill()
        self.server.wait()

    def popen(self, argv: list, **options) -> subprocess.Popen:
        self.processes.append(subprocess.Popen(argv, **options))
        return self.processes[-1]

    def notes(self) -> str:
        path = self.run / "notes.txt"
        return path.read_text() if path.exists() else ""

    def done(self) -> list:
        """[key, answer] of everything that the desk did, in order."""
        path = self.run / "done.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def gate(self, name: str = "gate") -> None:
        (self.run / name).touch()

    def connect(self) -> "Client":
        """A client that has said nothing yet."""
        client = Client(pitboss.read_sockets(str(self.run))["mcp"])
        self.open.append(client)
        return client

    def client(self, actor: str = "lead", nonce: str = "nonce-of-test") -> "Client":
        """A client that was admitted."""
        client = self.connect()
        answer = client.ask("hello", hello_of(actor, nonce=nonce))
        assert answer["result"]["protocol"] == 1, answer
        return client

    def bridge(self, actor: str = "lead", **options) -> "Agent":
        argv = pitboss.bridge_argv(str(self.run), actor, TOKENS.get(actor, ("", "worker"))[1],
                                   str(self.run / f"token-{actor}"))
        process = self.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                             env=self.env, **options)
        return Agent(process)

    def end(self) -> None:
        for client in self.open:
            client.close()
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


class Talker:
    """Lines out and in over two descriptors, with a deadline for each line."""

    def __init__(self, fd_in: int, write) -> None:
        self.fd_in, self.write, self.parts, self.lines, self.next_id = fd_in, write, [], [], 0

    def say(self, *lines) -> None:
        """Send lines: objects as JSON, bytes as they are."""
        self.write(b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n"
                            for line in lines))

    def hear(self, deadline_s: float = DEADLINE_S):
        """The next line; None at the end of all lines."""
        end = time.monotonic() + deadline_s
        while not self.lines:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.fd_in], [], [], left)[0]:
                raise AssertionError(f"no line in {deadline_s:g} s; part of one: {self.parts[:1]!r}")
            try:
                data = os.read(self.fd_in, 1 << 18)
            except ConnectionResetError:
                data = b""
            if not data:
                return None
            if b"\n" not in data:
                self.parts.append(data)
                continue
            *lines, rest = data.split(b"\n")
            self.lines += [b"".join([*self.parts, lines[0]]), *lines[1:]]
            self.parts = [rest]
        return json.loads(self.lines.pop(0))

    def request(self, method: str, params: dict | None = None, id=None) -> int:
        """Send a request without waiting; its id."""
        if id is None:
            self.next_id += 1
            id = self.next_id
        self.say({"jsonrpc": "2.0", "id": id, "method": method, "params": params or {}})
        return id

    def ask(self, method: str, params: dict | None = None, id=None) -> dict:
        """A request and its answer, which must be the next line."""
        id = self.request(method, params, id)
        answer = self.hear()
        assert answer["id"] == id, answer
        return answer

    def start_call(self, name: str, id=None, **arguments) -> int:
        return self.request("tools/call", {"name": name, "arguments": arguments}, id)

    def call(self, name: str, **arguments) -> dict:
        return self.ask("tools/call", {"name": name, "arguments": arguments})["result"]

    def value(self, name: str, **arguments) -> dict:
        """structuredContent of a call; its text must say the same."""
        result = self.call(name, **arguments)
        assert result["isError"] is False and json.loads(result["content"][0]["text"]) == result["structuredContent"]
        return result["structuredContent"]

    def hear_all(self, ids) -> dict:
        """id: answer, for all of `ids`; each must come exactly once, and nothing else."""
        answers = {}
        while len(answers) < len(ids):
            line = self.hear()
            assert line["id"] in ids and line["id"] not in answers, line
            answers[line["id"]] = line
        return answers

    def is_fine(self) -> None:
        """The connection is usable, and nothing unexpected is on it."""
        assert self.ask("ping", id=f"ping{random.random()}")["result"] == {}


class Client(Talker):
    """A plain connection to the socket."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)
        super().__init__(self.sock.fileno(), self.sock.sendall)

    def close(self) -> None:
        self.sock.close()


class Agent(Talker):
    """What an agent is to a bridge."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        super().__init__(process.stdout.fileno(), lambda data: process.stdin.write(data))

    def initialize(self, version: str = "2025-11-25") -> dict:
        answer = self.ask("initialize", {"protocolVersion": version, "capabilities": {}, "clientInfo": {}}, id=0)
        self.say({"jsonrpc": "2.0", "method": "notifications/initialized"})
        return answer


def hello_of(actor: str = "lead", **changes) -> dict:
    token, role = TOKENS[actor]
    return {"protocol": 1, "actor_id": actor, "role": role, "token": token, "nonce": "nonce-of-test",
            "outstanding": [], **changes}


@pytest.fixture(scope="module")
def pinned(tmp_path_factory):
    """What a run has in its folder `self`."""
    folder = tmp_path_factory.mktemp("pinned")
    pitboss.pin_self(str(folder))
    pitboss.pin_bridge(str(folder))
    return folder / "self"


@pytest.fixture
def house(pinned):
    with tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp") as root:       # short: sockets lie in it
        place = House(Path(root), pinned)
        yield place
        place.end()


@pytest.fixture
def client(house):
    house.serve()
    return house.client()


# ------------------------------------------------------------------ lines

def test_lines_come_whole_however_they_were_cut():
    chance = random.Random(1)
    for _ in range(200):
        lines = [bytes(chance.choices(b"ab\r ", k=chance.choice((0, 1, 3, 9, 10, 11, 40)))) for _ in range(12)]
        data, reader, got = b"\n".join(lines) + b"\nhalf", pitboss.Lines(10), []
        while data:
            size = chance.randint(1, 15)
            got += reader.feed(data[:size])
            data = data[size:]
        assert got == [line if len(line) <= 10 else None for line in lines]
        assert bytes(reader.part) == b"half"


def test_a_line_that_never_ends_takes_no_memory_above_its_bound():
    reader = pitboss.Lines(1000)
    for _ in range(100):
        assert reader.feed(b"x" * 900) == []
        assert len(reader.part) <= 1000
    assert reader.feed(b"x\nok\n") == [None, b"ok"]


@pytest.mark.parametrize("line", [
    b'{"a": NaN}', b'[Infinity]', b"-Infinity", b"1e999", b'{"x": -1e400}', b'"\xff"', b"\xef\xbb\xbf{}",
    '{"a": 1}'.encode("utf-16"), b"[" * 10_000, b"[" * 10_000 + b"]" * 10_000, b'{"a":' * 10_000, b"{", b"{}{}",
    b"1" * 5000, b"\x00", b"'a'"], ids=lambda line: repr(line[:12]))
def test_what_is_no_strict_json_in_utf8_is_refused(line):
    with pytest.raises((ValueError, RecursionError)):
        pitboss.parse_message(line)


def test_strict_json_keeps_what_json_can_say():
    assert pitboss.parse_message(b'["\\ud800", 1e308, -0.5, 9007199254740993, {}]\r') == [
        "\ud800", 1e308, -0.5, 9007199254740993, {}]


@pytest.mark.parametrize("value, good", [
    (0, True), (-5, True), ("a", True), ("x" * 200, True), ((1 << 63) - 1, True),
    ("", False), ("x" * 201, False), (True, False), (1.0, False), (None, False), ([], False), (1 << 63, False)])
def test_what_may_name_a_request(value, good):
    assert pitboss.is_request_id(value) is good


# ------------------------------------------------------------------ who may talk

REFUSED = {
    "wrong token": ({"token": "token-of-w1"}, "token"),
    "no token": ({"token": ""}, "token"),
    "token is no text": ({"token": None}, "hello.token"),
    "another's name": ({"actor_id": "w1"}, "token"),
    "unknown actor": ({"actor_id": "w9"}, "token"),
    "unknown actor, no token": ({"actor_id": "w9", "token": ""}, "token"),
    "higher role": ({"actor_id": "w1", "token": TOKENS["w1"][0], "role": "lead"}, "w1 is a worker"),
    "newer protocol": ({"protocol": 2}, "hello.protocol is 2"),
    "protocol true": ({"protocol": True}, "hello.protocol"),
    "short nonce": ({"nonce": "abc"}, "hello.nonce"),
    "strange nonce": ({"nonce": "../../../etc"}, "hello.nonce"),
    "too much outstanding": ({"outstanding": list(range(65))}, "hello.outstanding"),
    "outstanding of no ids": ({"outstanding": [None]}, "hello.outstanding"),
}


def test_a_client_that_is_not_believed_is_told_why_and_let_go(house):
    house.serve()
    for case, (changes, words) in REFUSED.items():
        client = house.connect()
        client.say({"jsonrpc": "2.0", "id": 1, "method": "hello", "params": hello_of(**changes)})
        client.start_call("deal")
        answer = client.hear()
        assert answer["error"]["code"] == -32600 and answer["error"]["message"].startswith("refused"), case
        assert words in answer["error"]["message"], case
        assert client.hear() is None, case
    assert house.done() == [] and "admitted" not in house.notes()


def test_nothing_is_done_before_the_first_line_was_a_good_hello(house):
    house.serve()
    for first in (b"", b"{", b"[]", b"7", {"jsonrpc": "2.0", "id": 1, "method": "tools/list"},
                  {"jsonrpc": "2.0", "id": 1, "method": "hello", "params": []},
                  {"jsonrpc": "2.0", "method": "hello", "params": hello_of()}):
        client = house.connect()
        client.say(first, {"jsonrpc": "2.0", "id": 5, "method": "tools/call", "params": {"name": "deal"}})
        answers = []
        while (answer := client.hear()) is not None:
            answers.append(answer["error"]["code"])
        assert answers and set(answers) <= {-32600, -32700}, first
    assert house.done() == []


def test_a_client_of_another_user_is_refused(house):
    house.serve(f"uid={os.geteuid() + 1}")
    client = house.connect()
    answer = client.hear()
    assert answer["error"]["code"] == -32600 and f"you are user {os.geteuid() + 1}" in answer["error"]["message"]
    assert client.hear() is None


def test_the_peer_of_a_socket_is_known_by_its_user(tmp_path):
    one, other = socket.socketpair()
    assert pitboss.peer_uid(one) == os.geteuid()
    one.close()
    other.close()


def test_nothing_that_is_said_later_changes_who_a_client_is(house):
    house.serve()
    client = house.client("w1")
    told = client.ask("tools/call", {"name": "whoami", "arguments": {"actor": "lead", "actor_id": "lead"},
                                     "_meta": {"actor": "lead", "pitboss/actor": "lead", "role": "lead"}})
    assert told["result"]["structuredContent"] == {"actor": "w1", "role": "worker",
                                                   "key": ["w1", "nonce-of-test", told["id"]]}
    again = client.ask("hello", hello_of("lead"))
    assert again["error"]["code"] == -32601
    assert client.value("whoami")["actor"] == "w1"
    assert [t["name"] for t in client.ask("tools/list")["result"]["tools"]] == ["echo", "wait", "deal_and_die",
                                                                                 "of_worker"]


def test_an_actor_may_have_several_connections(house):
    house.serve()
    one, two = house.client(nonce="nonce-one"), house.client(nonce="nonce-two")
    assert one.value("deal", text="a")["number"] == 0
    assert two.value("deal", text="b")["number"] == 1         # the same request id, another nonce: another call
    one.close()
    two.is_fine()


def test_tokens_are_random_and_compared_whole():
    assert len({pitboss.mint_token() for _ in range(50)}) == 50
    token = pitboss.mint_token()
    assert pitboss.same_token(token, token)
    for given in ("", token[:-1], token + "0", "\ud800", token.upper() + "x"):
        assert not pitboss.same_token(given, token)
    assert not pitboss.same_token("", "")


# ------------------------------------------------------------------ MCP

def test_the_version_is_the_clients_where_it_is_known(client):
    for asked, agreed in (("2024-11-05", "2024-11-05"), ("2025-03-26", "2025-03-26"), ("2025-06-18", "2025-06-18"),
                          ("2025-11-25", "2025-11-25"), ("2031-01-01", "2025-11-25"), (7, "2025-11-25"),
                          ([], "2025-11-25"), (None, "2025-11-25")):
        result = client.ask("initialize", {"protocolVersion": asked, "capabilities": {}})["result"]
        assert result["protocolVersion"] == agreed, asked
        assert result["capabilities"] == {"tools": {}} and result["serverInfo"]["name"] == "pitboss"


FAULTS = [
    #  a line                                                                   code     id of the answer
    (b"nonsense", -32700, None),
    (b"\xff\xfe", -32700, None),
    (b'{"jsonrpc": "2.0", "id": 1, "method": "ping", "params": {"x": NaN}}', -32700, None),
    (b"[" * 10_000, -32700, None),
    (b'{"id": 1, "jsonrpc": "2.0", "params": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001, -32700, None),
    (b"7", -32600, None),
    (b"null", -32600, None),
    (b"[]", -32600, None),
    (b'[{"jsonrpc": "2.0", "id": 1, "method": "ping"}]', -32600, None),
    (b"{}", -32600, None),
    ({"jsonrpc": "1.0", "id": 4, "method": "ping"}, -32600, 4),
    ({"id": "a", "method": "ping"}, -32600, "a"),
    ({"jsonrpc": "2.0", "id": 4}, -32600, 4),
    ({"jsonrpc": "2.0", "id": 4, "method": 7}, -32600, 4),
    ({"jsonrpc": "2.0", "id": None, "method": "ping"}, -32600, None),
    ({"jsonrpc": "2.0", "id": [1], "method": "ping"}, -32600, None),
    ({"jsonrpc": "2.0", "id": True, "method": "ping"}, -32600, None),
    ({"jsonrpc": "2.0", "id": 5, "method": "tools/cal"}, -32601, 5),
    ({"jsonrpc": "2.0", "id": 5, "method": "resources/list"}, -32601, 5),
    ({"jsonrpc": "2.0", "id": 5, "method": "notifications/cancelled"}, -32601, 5),
    ({"jsonrpc": "2.0", "id": 6, "method": "tools/call", "params": []}, -32602, 6),
    ({"jsonrpc": "2.0", "id": 6, "method": "tools/call", "params": None}, -32602, 6),
    ({"jsonrpc": "2.0", "id": 6, "method": "tools/call"}, -32602, 6),
    ({"jsonrpc": "2.0", "id": 6, "method": "tools/call", "params": {"name": 1}}, -32602, 6),
    ({"jsonrpc": "2.0", "id": 6, "method": "tools/call", "params": {"name": "echo", "arguments": "x"}}, -32602, 6),
    ({"jsonrpc": "2.0", "id": 6, "method": "tools/list", "params": {"cursor": "x"}}, -32602, 6),
    ({"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "crash"}}, -32603, 7),
    ({"jsonrpc": "2.0", "id": 7, "method": "tools/call", "params": {"name": "crash_later"}}, -32603, 7),
]


def test_a_fault_has_its_code_and_leaves_the_connection_usable(house):
    house.serve()
    client, neighbour = house.client(), house.client("w1")
    for line, code, answers in FAULTS:
        client.say(line)
        said = client.hear()
        assert (said.get("error", {}).get("code"), said["id"]) == (code, answers), (line, said)
        assert said["error"]["message"]
        client.is_fine()
    neighbour.is_fine()


UNANSWERED = [
    b"", b"  \r", {"jsonrpc": "2.0", "method": "notifications/unheard-of"}, {"jsonrpc": "2.0", "method": "tools/call"},
    {"jsonrpc": "2.0", "id": 3, "result": {}}, {"jsonrpc": "2.0", "id": 3, "error": {}},
    {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": 12345}},
    {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": []}},
    {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": "x"},
    {"jsonrpc": "2.0", "method": "notifications/cancelled"}]


def test_what_wants_no_answer_gets_none(client):
    for line in UNANSWERED:
        client.say(line)
        client.is_fine()


def test_results_refusals_and_texts(client):
    assert client.value("echo", text="ü\ud800\n") == {"text": "ü\ud800\n"}
    refusal = client.call("nothing")
    assert refusal == {"content": [{"type": "text", "text": "unknown tool nothing\ntools/list says which there are"}],
                       "isError": True}
    assert client.call("text") == {"content": [{"type": "text", "text": "only text"}], "isError": False}


def test_a_result_that_json_cannot_say_is_our_fault_alone(house, client):
    assert client.ask("tools/call", {"name": "not_json"})["error"]["code"] == -32603
    assert "report ValueError" in house.notes()
    client.is_fine()


def test_calls_of_one_connection_run_together(house, client):
    slow = [client.start_call("wait", gate="one"), client.start_call("wait", gate="two")]
    assert client.value("echo", text="at once")
    house.gate("two")
    assert client.hear()["id"] == slow[1]
    house.gate("one")
    assert client.hear()["id"] == slow[0]


def test_an_id_is_not_used_twice_at_a_time(house, client):
    first = client.start_call("wait", gate="gate")
    assert client.ask("ping", id=first)["error"]["code"] == -32600
    house.gate()
    assert client.hear()["result"]["structuredContent"]["number"] == 0


def test_calls_that_wait_are_bounded(house, client):
    ids = [client.start_call("wait", gate="gate") for _ in range(64)]
    refused = client.call("wait", gate="gate")
    assert refused["isError"] and "64 calls" in refused["content"][0]["text"]
    house.gate()
    assert len(client.hear_all(ids)) == 64


def test_a_cancelled_call_is_not_answered_and_not_done(house, client):
    cancelled, kept = client.start_call("wait", gate="gate"), client.start_call("wait", gate="gate")
    wait_for(lambda: f"waits {kept}\n" in house.notes())
    cancel = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": cancelled}}
    client.say(cancel, cancel)
    client.is_fine()
    house.gate()
    assert client.hear()["id"] == kept
    client.say({**cancel, "params": {"requestId": kept}})          # answered already
    client.is_fine()
    assert house.notes().count("dropped") == 1 and f"dropped {cancelled}\n" in house.notes()
    assert [key[2] for key, _ in house.done()] == [kept]


def test_a_call_that_is_cancelled_in_the_line_after_it_leaves_nothing(house, client):
    for id in range(100, 120):
        client.say({"jsonrpc": "2.0", "id": id, "method": "tools/call",
                    "params": {"name": "wait", "arguments": {"gate": "gate"}}},
                   {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": id}})
    house.gate()
    client.is_fine()
    assert house.done() == [] and "report" not in house.notes()


def test_a_waiting_call_gives_signs_of_life_where_they_are_wanted(house):
    house.serve("heartbeat_s=0.02")
    client = house.client()
    quiet = client.start_call("wait", gate="other")
    loud = client.request("tools/call", {"name": "wait", "arguments": {"gate": "gate"}, "_meta": {"progressToken": "t"}})
    beats = [client.hear() for _ in range(5)]
    assert all(b["method"] == "notifications/progress" and b["params"]["progressToken"] == "t" for b in beats)
    assert (values := [b["params"]["progress"] for b in beats]) == sorted(set(values))
    house.gate()
    while (last := client.hear()).get("method"):
        assert last["params"]["progressToken"] == "t"
    assert last["id"] == loud
    client.is_fine()                       # not one more after the answer
    house.gate("other")
    assert client.hear()["id"] == quiet


def test_batches_are_of_one_version_of_mcp(house, client):
    client.ask("initialize", {"protocolVersion": "2025-03-26"})
    one, two = ({"jsonrpc": "2.0", "id": n, "method": "tools/call",
                 "params": {"name": "wait" if n == 70 else "echo", "arguments": {"gate": "gate"}}} for n in (70, 71))
    bad = {"jsonrpc": "2.0", "id": 72, "method": "nothing"}
    client.say([one, two, bad, {"jsonrpc": "2.0", "method": "notifications/x"}, 7,
                {"jsonrpc": "2.0", "id": 73, "method": "initialize"}])
    client.is_fine()
    house.gate()
    answers = client.hear()
    assert {a["id"]: a.get("error", {}).get("code") for a in answers} == {
        None: -32600, 70: None, 71: None, 72: -32601, 73: -32600}
    client.say([{"jsonrpc": "2.0", "method": "notifications/x"}])          # nothing to answer: no line at all
    client.is_fine()
    for wrong in (b"[]", [{"jsonrpc": "2.0", "id": n, "method": "ping"} for n in range(65)]):
        client.say(wrong)
        assert client.hear()["error"]["code"] == -32600


# ------------------------------------------------------------------ clients that harm nobody else

def test_a_line_that_is_too_long_is_skipped_and_said_once(house):
    house.serve()
    client, neighbour = house.client(), house.client("w1")
    flood = threading.Thread(target=client.sock.sendall, args=(b"x" * (17 << 20) + b"\n",))
    flood.start()
    for _ in range(20):
        neighbour.is_fine()
    flood.join()
    answer = client.hear()
    assert answer["error"]["code"] == -32600 and str(16 << 20) in answer["error"]["message"] and answer["id"] is None
    client.is_fine()


def test_a_line_of_16_mib_is_taken(client):
    text = "x" * ((16 << 20) - 200)
    assert client.value("echo", text=text)["text"] == text


def memory_of(pid: int) -> int:
    """Bytes of memory that a process has in use now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@linux
def test_a_client_that_does_not_read_suffers_alone(house):
    server = house.serve()
    slow, neighbour = house.client(), house.client("w1")
    before = memory_of(server.pid)
    ids = list(range(1000, 1500))
    writer = threading.Thread(target=lambda: [slow.start_call("big", id=id, size=100_000) for id in ids])
    writer.start()                                             # asks for 100 MB of answers
    for _ in range(50):
        neighbour.is_fine()
    assert memory_of(server.pid) - before < 20e6
    assert list(slow.hear_all(ids)) == ids
    writer.join()
    slow.is_fine()


def test_a_thousand_small_answers_wait_for_a_client_that_asks_first_and_reads_then(client):
    client.say(*({"jsonrpc": "2.0", "id": n, "method": "ping"} for n in range(1000)))
    assert list(client.hear_all(range(1000))) == list(range(1000))


@linux
def test_what_a_client_is_told_unasked_is_bounded(tmp_path):
    """A link whose client never reads is dropped when more than WIRE_ANSWER bytes lie for it."""
    ended = []

    async def flood() -> int:
        def open_session(link):
            opened.set_result(link)
            return type("Session", (), {"on_line": lambda self, line: None, "on_end": lambda self: ended.append(1)})()

        opened = asyncio.get_running_loop().create_future()
        sockets = pitboss.Sockets(str(tmp_path), {}, {"control": open_session}, ended.append)
        await sockets.open()
        client = Client(sockets.places["control"])
        link = await opened
        sent = 0
        while not link.transport.is_closing() and sent < 3 * pitboss.WIRE_ANSWER:
            link.send("x" * 1_000_000)
            sent += 1_000_000
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        client.close()
        sockets.close()
        return sent

    sent = asyncio.run(flood())
    assert pitboss.WIRE_ANSWER <= sent <= pitboss.WIRE_ANSWER + 3_000_000 and ended == [1]


def test_half_a_line_and_an_end_harm_nobody(house):
    house.serve()
    neighbour = house.client("w1")
    for _ in range(20):
        client = house.client()
        client.sock.sendall(b'{"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "deal"}}')
        client.close()
    neighbour.is_fine()
    assert house.done() == []


def test_a_flood_of_one_client_leaves_the_others_their_turn(house):
    house.serve()
    flooder, neighbour = house.client(), house.client("w1")
    lines = b"".join(b'{"jsonrpc":"2.0","id":%d,"method":"ping"}\n' % n for n in range(20_000))
    writer = threading.Thread(target=flooder.sock.sendall, args=(lines,))
    writer.start()
    neighbour.is_fine()
    assert len(flooder.hear_all(set(range(20_000)))) == 20_000
    writer.join()


class Transport:
    """What a Link needs of asyncio; `seen` holds the names of what was asked of it."""

    def __init__(self) -> None:
        self.seen = []

    def is_closing(self) -> bool:
        return "close" in self.seen or "abort" in self.seen

    def get_write_buffer_size(self) -> int:
        return 0

    def __getattr__(self, name):
        return lambda *args, **named: self.seen.append(name)


def test_lines_are_taken_up_in_turns():
    """However much a client sends at once, what else the loop has to do comes between."""
    class Session:
        def on_line(self, line):
            taken.append(line)

    async def flood():
        link = pitboss.Link(lambda link: Session(), set(), taken.append, lambda connection: os.geteuid())
        link.connection_made(Transport())
        seen = link.transport.seen
        link.data_received(b"x\n" * 1000)
        assert len(taken) == pitboss.LINES_A_TURN and "pause_reading" in seen
        others = []
        for _ in range(50):
            others.append(len(taken))
            await asyncio.sleep(0)
        steps = [b - a for a, b in zip(others, others[1:])]
        assert max(steps) == pitboss.LINES_A_TURN and len(taken) == 1000 and "resume_reading" in seen

    taken = []
    asyncio.run(flood())


@pytest.mark.parametrize("end", ["close", "breaks"])
def test_what_lies_behind_the_end_of_a_connection_is_not_taken_up(end):
    class Session:
        def __init__(self, link):
            self.link = link

        def on_line(self, line):
            taken.append(line)
            if end == "breaks":
                raise ZeroDivisionError
            self.link.close()

    async def flood():
        reports = []
        link = pitboss.Link(Session, set(), reports.append, lambda connection: os.geteuid())
        link.connection_made(Transport())
        link.data_received(b"x\n" * 1000)
        assert len(taken) == 1 and not link.waiting and not link.turn_due and len(reports) == (end == "breaks")

    taken = []
    asyncio.run(flood())


PIECES = [b"{", b"}", b"[", b"]", b'"', b",", b":", b"null", b"true", b"-1", b"1e5", b"NaN", b"\\u0000", b"\xff", b"\xc3",
          b"\x00", b"\r", b" ", b'"jsonrpc":"2.0"', b'"id":1', b'"id":"x"', b'"id":null', b'"method":"tools/call"',
          b'"method":"ping"', b'"params":{}', b'"params":{"name":"echo"}', b'"params":{"name":"crash"}',
          b'"method":"notifications/cancelled"', b'"params":{"requestId":1}', b"[[[[[[", b"0" * 50, b"\xed\xa0\x80"]


def strange_line(chance: random.Random) -> bytes:
    """A line that nobody would write: loose pieces, or a good message with an accident."""
    if chance.random() < 0.5:
        return b"".join(chance.choices(PIECES, k=chance.randint(0, 30)))
    keys = chance.sample([b'"jsonrpc":"2.0"', b'"id":%d' % chance.randint(0, 9), chance.choice(
        (b'"method":"tools/call"', b'"method":"ping"', b'"method":"initialize"', b'"method":"tools/list"', b'"method":{}')),
        chance.choice((b'"params":{"name":"echo","arguments":{}}', b'"params":[]', b'"params":{"name":"crash"}',
                       b'"params":{"protocolVersion":"2025-03-26"}'))], k=chance.randint(1, 4))
    line = bytearray(b"{" + b",".join(keys) + b"}")
    if chance.random() < 0.3:
        line = bytearray(b"[" + line + b"]")
    if chance.random() < 0.5:
        line[chance.randrange(len(line))] = chance.randrange(256)
    return bytes(line).replace(b"\n", b" ")


def fuzz(house, count: int, seed: int) -> None:
    """Strange lines, each batch followed by a ping that must be answered; a neighbour goes on meanwhile."""
    chance = random.Random(seed)
    house.serve()
    client, neighbour = house.client(), house.client("w1")
    for start in range(0, count, 100):
        client.say(*(strange_line(chance) for _ in range(min(100, count - start))))
        client.request("ping", id=f"end of {start}")
        while (answer := client.hear()) is None or not (isinstance(answer, dict) and answer["id"] == f"end of {start}"):
            assert answer is not None, "the connection was ended"
        neighbour.is_fine()
    assert house.server.poll() is None
    assert {line for line in house.notes().splitlines() if line.startswith("report")} <= {"report ZeroDivisionError"}


def test_strange_lines_harm_nobody(house):
    fuzz(house, 2_000, seed=11)


@pytest.mark.slow
def test_many_strange_lines_harm_nobody(house):
    fuzz(house, 50_000, seed=12)


# ------------------------------------------------------------------ where the sockets are

def test_sockets_are_private_named_in_a_file_and_taken_away_at_the_end(house):
    runtime = house.run.parent / "runtime"
    runtime.mkdir(mode=0o700)
    house.serve(env={"XDG_RUNTIME_DIR": str(runtime)})
    places = json.loads((house.run / "sockets.json").read_text())
    assert places == {name: str(runtime / "pitboss" / f"{RUN_NAME}.{name}.sock") for name in ("mcp", "control")}
    assert stat.S_IMODE((runtime / "pitboss").stat().st_mode) == 0o700
    for name, path in places.items():
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
        assert os.readlink(house.run / f"{name}.sock") == path
    house.server.send_signal(signal.SIGINT)
    house.server.wait()
    assert os.listdir(runtime / "pitboss") == []
    assert not [name for name in os.listdir(house.run) if "sock" in name]


def test_a_runtime_folder_that_is_not_ours_alone_is_not_used(house):
    runtime = house.run.parent / "runtime"
    (runtime / "pitboss").mkdir(parents=True)
    (runtime / "pitboss").chmod(0o777)
    house.serve(env={"XDG_RUNTIME_DIR": str(runtime)})
    assert pitboss.read_sockets(str(house.run))["mcp"] == str(house.run / "mcp.sock")
    assert os.listdir(runtime / "pitboss") == []
    house.kill()
    runtime.chmod(0o777)
    os.rmdir(runtime / "pitboss")
    house.serve(env={"XDG_RUNTIME_DIR": str(runtime)})
    assert pitboss.read_sockets(str(house.run))["mcp"] == str(house.run / "mcp.sock") and os.listdir(runtime) == []


def test_a_path_too_long_for_a_socket_gets_a_short_one_and_a_link(tmp_path, pinned):
    deep = tmp_path.joinpath(*["a-long-name-of-a-folder"] * 5)
    deep.mkdir(parents=True)
    house = House(deep, pinned)
    house.env["TMPDIR"] = "/tmp"
    try:
        house.serve(env={"XDG_RUNTIME_DIR": str(deep)})
        path = Path(pitboss.read_sockets(str(house.run))["mcp"])
        assert path.parent.name.startswith("pitboss-") and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert os.readlink(house.run / "mcp.sock") == str(path)
        house.client().is_fine()
        house.bridge().initialize()
        house.kill()
        house.serve(env={"XDG_RUNTIME_DIR": str(deep)})       # the one of the dispatcher that died is used again
        assert Path(pitboss.read_sockets(str(house.run))["mcp"]) == path
        house.server.send_signal(signal.SIGINT)
        house.server.wait()
        assert not path.parent.exists()
    finally:
        house.end()


def test_a_socket_that_vanished_is_bound_again(house):
    runtime = house.run.parent / "runtime"
    runtime.mkdir(mode=0o700)
    house.serve(env={"XDG_RUNTIME_DIR": str(runtime)})
    before = house.client(nonce="before-it-vanished")
    os.rename(runtime, runtime.with_name("gone"))             # as a login manager wipes it
    wait_for(lambda: (pitboss.read_sockets(str(house.run)) or {}).get("mcp") == str(house.run / "mcp.sock"), DEADLINE_S)
    house.client().is_fine()
    before.is_fine()                                          # and what stood goes on
    for name in ("mcp.sock", "sockets.json"):
        os.unlink(house.run / name)
        wait_for(lambda: pitboss.read_sockets(str(house.run)) and (house.run / "mcp.sock").exists(), DEADLINE_S)
        wait_for(lambda: house.connect(), DEADLINE_S).close()
    assert house.server.poll() is None


def test_no_place_at_all_is_said_in_words(tmp_path, monkeypatch):
    monkeypatch.setattr(pitboss, "max_socket_path", lambda: 5)
    before = set(os.listdir("/tmp"))
    with pytest.raises(pitboss.EnvironmentFault, match="short enough") as error:
        pitboss.choose_places(str(tmp_path), {}, ["mcp"])
    assert "TMPDIR" in error.value.hint
    assert not [name for name in set(os.listdir("/tmp")) - before if name.startswith("pitboss-") and
                not os.listdir(f"/tmp/{name}")]


# ------------------------------------------------------------------ the bridge

def test_the_bridge_carries_what_an_agent_and_its_tools_say(house):
    house.serve()
    agent = house.bridge("w1")
    assert agent.initialize()["result"]["protocolVersion"] == "2025-11-25"
    assert agent.value("whoami")["actor"] == "w1"
    agent.say(b"nonsense")
    assert agent.hear()["error"]["code"] == -32700
    text = "x" * 3_000_000
    assert agent.value("echo", text=text)["text"] == text
    agent.say(b"y" * (17 << 20))
    assert agent.hear()["error"]["code"] == -32600
    agent.is_fine()


def test_the_bridge_ends_with_its_agent_and_answers_what_was_asked_before(house):
    house.serve()
    agent = house.bridge()
    ids = [agent.start_call("echo", text=n) for n in range(5)]
    agent.process.stdin.close()
    assert len(agent.hear_all(ids)) == 5
    assert agent.hear() is None
    assert (agent.process.wait(DEADLINE_S), agent.process.stderr.read()) == (0, b"")


def test_an_interrupt_is_nothing_to_the_bridge_and_a_termination_ends_it(house):
    house.serve()
    agent = house.bridge()
    agent.initialize()
    agent.process.send_signal(signal.SIGINT)
    agent.is_fine()
    agent.process.terminate()
    assert (agent.process.wait(DEADLINE_S), agent.process.stderr.read()) == (-signal.SIGTERM, b"")


def test_an_agent_that_is_gone_ends_its_bridge(house):
    house.serve()
    agent = house.bridge()
    agent.initialize()
    agent.process.stdout.close()
    agent.request("ping")
    assert (agent.process.wait(DEADLINE_S), agent.process.stderr.read()) == (0, b"")


def test_the_bridge_waits_for_a_dispatcher_that_is_not_there_yet(house):
    agent = house.bridge()
    first, second = agent.request("initialize", {"protocolVersion": "2025-06-18"}), agent.start_call("echo", text=1)
    house.serve()
    answers = agent.hear_all([first, second])
    assert answers[first]["result"]["protocolVersion"] == "2025-06-18"


def test_calls_in_flight_survive_the_dispatcher_and_are_done_once(house):
    house.serve()
    agents = [house.bridge(actor) for actor in ("lead", "w1", "lead")]
    for agent in agents:
        agent.initialize()
        agent.waiting = [agent.start_call("wait", gate="gate", text=n) for n in range(5)]
    wait_for(lambda: house.notes().count("waits") == 15, DEADLINE_S)
    for _ in range(3):
        house.kill()
        for agent in agents:                                   # said to nobody: held for the next one
            agent.waiting.append(agent.start_call("deal", text="meanwhile"))
        house.serve()
        for agent in agents:
            agent.hear_all(agent.waiting[5:])
            del agent.waiting[5:]
    house.gate()
    for agent in agents:
        answers = agent.hear_all(agent.waiting)
        assert all(a["result"]["structuredContent"]["said"] in range(5) for a in answers.values())
        agent.is_fine()
    keys = [tuple(key) for key, _ in house.done()]
    assert len(keys) == len(set(keys)) == 3 * (5 + 3)


def test_what_was_done_but_not_answered_is_not_done_again(house):
    """The dispatcher dies between the effect and its answer."""
    house.serve()
    agent = house.bridge()
    agent.initialize()
    for n in range(3):
        id = agent.start_call("deal_and_die", text=n)
        house.server.wait(DEADLINE_S)
        house.serve()
        answer = agent.hear()
        assert (answer["id"], answer["result"]["structuredContent"]) == (id, {"number": n, "said": n})
        agent.is_fine()
    assert [answer["number"] for _, answer in house.done()] == [0, 1, 2]
    assert len({tuple(key) for key, _ in house.done()}) == 3


def test_the_next_dispatcher_hears_hello_and_initialize_and_what_is_outstanding(house):
    house.serve()
    agent = house.bridge()
    agent.initialize("2025-03-26")
    id = agent.start_call("wait", gate="gate")
    agent.say([{"jsonrpc": "2.0", "id": 50, "method": "tools/call", "params": {"name": "wait",
                                                                                "arguments": {"gate": "gate"}}},
               {"jsonrpc": "2.0", "id": 51, "method": "ping"}])
    wait_for(lambda: house.notes().count("waits") == 2, DEADLINE_S)
    house.kill()
    house.serve()
    wait_for(lambda: f"admitted lead [{id}, 50, 51]\n" in house.notes(), DEADLINE_S)
    house.gate()
    answers = [agent.hear(), agent.hear()]            # batches work: the version was agreed again, unseen by the agent
    assert sorted(json.dumps([a["id"] for a in answer] if isinstance(answer, list) else answer["id"])
                  for answer in answers) in ([str(id), "[50, 51]"], [str(id), "[51, 50]"])
    agent.is_fine()
    assert len(house.done()) == 2


def test_what_was_cancelled_while_nobody_was_there_is_not_asked_again(house):
    house.serve()
    agent = house.bridge()
    agent.initialize()
    dropped, kept = agent.start_call("wait", gate="gate"), agent.start_call("wait", gate="gate")
    wait_for(lambda: house.notes().count("waits") == 2, DEADLINE_S)
    house.kill()
    unsent = agent.start_call("deal")
    for id in (dropped, unsent):
        agent.say({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": id}})
    answered = agent.start_call("echo", text="after")          # the bridge has read what came before
    house.serve()
    assert agent.hear()["id"] == answered
    assert f"admitted lead [{kept}]\n" in house.notes()
    house.gate()
    assert agent.hear()["id"] == kept
    agent.is_fine()
    assert [key[2] for key, _ in house.done()] == [kept]


def test_a_cancelled_call_goes_past_those_that_wait_for_room(house):
    house.serve()
    agent = house.bridge()
    agent.initialize()
    ids = [agent.start_call("wait", gate="gate", text=n) for n in range(100)]
    wait_for(lambda: house.notes().count("waits") == 64, DEADLINE_S)
    agent.say({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": ids[0]}},
              {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": ids[99]}})
    wait_for(lambda: f"dropped {ids[0]}\n" in house.notes(), DEADLINE_S)
    house.gate()
    assert len(agent.hear_all(ids[1:99])) == 98
    agent.is_fine()
    assert len(house.done()) == 98


def test_the_dispatcher_is_found_where_it_is_now(house):
    house.serve()
    agent = house.bridge()
    agent.initialize()
    house.kill()
    runtime = house.run.parent / "later"
    runtime.mkdir(mode=0o700)
    house.serve(env={"XDG_RUNTIME_DIR": str(runtime)})
    agent.is_fine()
    assert pitboss.read_sockets(str(house.run))["mcp"].startswith(str(runtime))


def test_a_bridge_that_is_not_believed_says_so(house):
    house.serve()
    (house.run / "token-w1").write_text("guessed")
    agent = house.bridge("w1")
    answer = agent.ask("initialize", {"protocolVersion": "2025-11-25"})
    assert answer["error"]["code"] == -32603 and "not the token" in answer["error"]["message"]
    assert agent.call("deal") == {"content": [{"type": "text", "text": answer["error"]["message"]}], "isError": True}
    os.unlink(house.run / "token-w1")
    assert "error" in house.bridge("w1").ask("initialize", {})
    assert house.done() == []


def settle(run: Path) -> None:
    (run / "lock").write_text("{}")
    (run / "summary.json").write_text("{}")


@pytest.mark.parametrize("end", ["settled", "folder gone"])
def test_the_bridge_gives_up_when_the_run_is_over(house, end):
    house.serve()
    agent = house.bridge()
    agent.initialize()
    waiting, listing = agent.start_call("wait", gate="gate"), None
    wait_for(lambda: "waits" in house.notes(), DEADLINE_S)
    house.kill()
    listing = agent.request("tools/list")
    settle(house.run) if end == "settled" else house.run.rename(house.run.with_name("elsewhere"))
    answers = agent.hear_all([waiting, listing])
    assert answers[waiting]["result"]["isError"] and "run has ended" in answers[waiting]["result"]["content"][0]["text"]
    assert answers[listing]["error"]["code"] == -32603
    assert agent.call("echo")["isError"]
    agent.process.stdin.close()
    assert agent.process.wait(DEADLINE_S) == 0


def test_a_run_that_somebody_holds_is_not_over(house):
    import fcntl

    house.serve()
    agent = house.bridge()
    agent.initialize()
    house.kill()
    settle(house.run)
    with open(house.run / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        id = agent.start_call("echo", text="still there")
        house.serve()
        answer = agent.hear()
        assert answer["id"] == id and answer["result"]["structuredContent"] == {"text": "still there"}


def test_an_id_names_one_request_of_a_session(house):
    house.serve()
    agent = house.bridge()
    agent.initialize()
    for id in (7, 8, 5, "a", -1):
        assert "result" in agent.ask("ping", id=id)
    for id in (7, 8, 5, "a", -1, 0):
        assert agent.ask("ping", id=id)["error"]["code"] == -32600
    for id in (6, 9, "7", 1 << 40):
        assert "result" in agent.ask("ping", id=id)


def test_an_agent_that_asks_much_and_reads_late_gets_every_answer_once(house):
    house.serve()
    agent = house.bridge()
    agent.initialize()
    ids = list(range(1000, 3000))
    writer = threading.Thread(target=lambda: [agent.start_call("big", id=id, size=5000) for id in ids])
    writer.start()
    assert set(agent.hear_all(ids)) == set(ids)
    writer.join()
    agent.is_fine()


def test_the_bridge_is_a_command_too(house, home):
    house.serve()
    process = house.popen(home.argv("mcp-bridge", house.run / "mcp.sock", "--actor-id", "lead", "--actor-role", "lead",
                                    "--token-file", house.run / "token-lead"), stdin=subprocess.PIPE, bufsize=0,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=home.env)
    agent = Agent(process)
    agent.initialize()
    process.send_signal(signal.SIGINT)
    assert agent.value("whoami")["actor"] == "lead"


@real
def test_a_real_claude_calls_through_the_bridge_and_outlives_two_dispatchers(house, tmp_path):
    """Two calls of one turn wait together over a death; one that was done and not answered is not done again."""
    def call(tool: str, **arguments) -> dict:
        return {"tool": f"mcp__wire__{tool}", "input": arguments}

    house.serve()
    command, *args = pitboss.bridge_argv(str(house.run), "lead", "lead", str(house.run / "token-lead"))
    with a_claude_home(tmp_path) as place:
        steps = [{"tools": [call("wait", gate="gate", text="one"), call("wait", gate="gate", text="two")]},
                 call("deal_and_die", text="three"), call("echo", text="four"), say("${4}")]
        text = manifest(place.task("a", prompt(*steps), tools=["Read"]))
        text += section("[[mcp_server]]", {"id": "wire", "command": command, "args": args})
        process = place.home.start("dispatch", place.home.manifest(text))
        wait_for(lambda: house.notes().count("waits") == 2 or process.poll() is not None, LONG_S, "both calls")
        assert process.poll() is None, process.stderr.read()
        house.kill()
        house.serve()
        house.gate()
        house.server.wait(LONG_S)                      # it died of deal_and_die
        house.serve()
        assert process.wait(LONG_S) == 0, process.stderr.read()
        run = place.newest()
        check_success(run)
        results = run.tool_results()
    assert all(word in results for word in ("one", "two", "three", "four")) and "Connection closed" not in results
    assert sorted(answer["said"] for _, answer in house.done()) == ["one", "three", "two"]
    assert house.notes().count("admitted") == 3        # one bridge, one hello to each dispatcher


@pytest.mark.parametrize("argv", [[], ["s"], ["s", "--actor-id", "a"], ["s", "--actor-id", "a", "--actor-role"],
                                  ["s", "--actor-id", "a", "--actor-role", "r", "--unknown", "x"],
                                  ["s", "--actor-id", "a", "--actor-id", "b"]], ids=" ".join)
def test_a_bridge_that_is_started_wrongly_says_how(pinned, argv):
    done = subprocess.run([PYTHON, "-I", "-S", str(pinned / "bridge"), *argv], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=DEADLINE_S, check=False)
    assert done.returncode == 2 and done.stderr.startswith("usage: mcp-bridge") and not done.stdout


def test_the_pinned_bridge_names_nothing_but_the_standard_library(pinned):
    """It is compiled, small, and every global name in it is its own, a builtin, or an import."""
    import builtins
    import symtable

    source = (pinned / "pitboss_bridge.py").read_text()
    assert list((pinned / "__pycache__").glob("pitboss_bridge.*.pyc"))
    top = symtable.symtable(source, "bridge", "exec")
    own = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}

    def strangers(table):
        for symbol in table.get_symbols():
            if symbol.is_global() and symbol.is_referenced():
                yield symbol.get_name()
        for child in table.get_children():
            yield from strangers(child)

    assert set(strangers(top)) - own - set(dir(builtins)) == set()
    imported = {line.split()[1] for line in source.splitlines() if line.strip().startswith("import ")}
    assert {"asyncio", "argparse", "typing", "subprocess"} & imported == set() and imported <= sys.stdlib_module_names


def test_the_rows_of_the_method_tables_are_methods_of_a_session():
    for table in (pitboss.METHODS, pitboss.NOTIFICATIONS):
        for name, handler in table.items():
            assert getattr(pitboss.McpSession, handler.__name__) is handler and handler.__doc__, name
    assert not set(pitboss.METHODS) & set(pitboss.NOTIFICATIONS)
    assert all(name.startswith("notifications/") for name in pitboss.NOTIFICATIONS)
