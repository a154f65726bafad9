"""The store and the leases of a real run: 16 clients at its sockets, many of which die while they are answered.

The clients hold the tokens of a lead and its workers (tests/stage.py). What they were told is turned into a
history, and tests/linear.py, which knows nothing of pitboss, says whether it can have happened; meanwhile
others talk nonsense to both sockets.
"""
from __future__ import annotations

import json
import random
import select
import socket
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Callable, NamedTuple

import pytest

import linear
import pitboss
from linear import Op
from stage import Caller, Client, Stage, gate, value_of, words_of
from test_wire import strange_line
from tree_checker import unix

LEAD = "boss"
CLIENTS, BRIDGED, WORKERS = 16, 4, 3
PATHS = [*(f"/shared/{name}" for name in "abcdef"), "/peer/self/x"]
TTL_S = {"short": 0.1, "middle": 0.3, "long": 1.0, "wide": 0.2}    # by lease: asking again never shortens one
WIDE = "wide"                     # a lease of the whole tree; the others are of the layer
ROUNDING_S = 0.001                # moments are told in milliseconds


# ------------------------------------------------------------------ what was told, as a history

class Asked(NamedTuple):
    """A call as it was sent; `what` is the lease's name for a tool that takes its id alone."""
    actor: str
    tool: str
    arguments: dict
    what: str = ""


def plain(value) -> str:
    """A value as something that can be compared and counted."""
    return json.dumps(value, sort_keys=True)


def as_ops(asked: Asked, answer: dict | None, begun: float, ended: float) -> list[Op]:
    """What a call says of the history; nothing where nobody can tell.

    `answer` is the line that was heard, None when there was none: then `ended` is the moment by which the call
    had its effect, or never.
    """
    call, given, actor = asked.tool.rpartition("_")[2], dict(asked.arguments), asked.actor
    if call in ("get", "set", "cas", "delete"):
        what = LEAD, given["path"].replace("/self/", f"/{actor}/")
        given["value"] = plain(given.get("new_value", given.get("value")))
    else:
        what = "" if asked.tool.startswith("run_") else LEAD, asked.what
    if answer is None:
        return [] if call == "get" else [Op(actor, call, what, given, None, begun, ended)]
    if call == "release" and answer["result"]["isError"]:
        assert "it was released, or its ttl_secs ran out" in words_of(answer), answer
        return []                                          # it had ended by itself
    result = value_of(answer)
    if call == "get" and result["entry"]:
        result = {"entry": {**result["entry"], "value": plain(result["entry"]["value"])}}
    if call == "acquire" and result["acquired"]:
        result = {**result, "expires_at": unix(result["expires_at"]) - ROUNDING_S}
    return [Op(actor, call, what, given, result, begun, ended)]


def verdict(history: list[Op]) -> list[str]:
    return linear.check_store(history) + linear.check_leases(history)


def change(history: list[Op], n: int, **facts) -> list[Op]:
    """A copy in which one answer says something else."""
    spoiled = list(history)
    spoiled[n] = spoiled[n]._replace(result={**spoiled[n].result, **facts})
    return spoiled


def first(history: list[Op], call: str, wanted: Callable[[Op], bool]) -> int:
    """The first answered call of a kind that is as wanted."""
    return next(n for n, op in enumerate(history) if op.call == call and op.result is not None and wanted(op))


def numbers(history: list[Op]) -> dict[tuple, Op]:
    """The writes that were answered, by path and version."""
    return {(op.what, op.result["version"]): op for op in history if op.call in ("set", "cas") and op.result
            and op.result.get("swapped", True)}


def spoil_swap(history):
    """A swap that was refused is said to have been made."""
    given = numbers(history)
    n = first(history, "cas", lambda op: not op.result["swapped"] and (op.what, op.result["version"]) in given)
    return change(history, n, swapped=True)


def spoil_value(history):
    """Somebody reads what nobody wrote."""
    n = first(history, "get", lambda op: op.result["entry"])
    return change(history, n, entry={**history[n].result["entry"], "value": "spoiled"})


def spoil_write(history):
    """A write gets the number of the one before."""
    given = numbers(history)
    n = first(history, "set", lambda op: (op.what, op.result["version"] - 1) in given)
    return change(history, n, version=history[n].result["version"] - 1)


def about(history: list[Op], lease_id: str) -> list[Op]:
    """What was told of one acquisition, renewals and releases too."""
    return [op for op in history if op.call in ("acquire", "release")
            and lease_id in ((op.result or {}).get("lease_id"), op.given.get("lease_id"))]


def changed_hands(history) -> tuple[int, int]:
    """Two acquisitions of one lease: the second is the next one, another actor's, and stands when it is told."""
    got = {(op.what, op.result["version"]): n for n, op in enumerate(history)
           if op.call == "acquire" and op.result and op.result["acquired"]}
    for (what, version), n in got.items():
        later = got.get((what, version + 1))
        if later is not None:
            old, new = history[n], history[later]
            rest = [op for op in about(history, new.result["lease_id"]) if op != new]
            if (old.client != new.client and old.ended < new.ended < new.result["expires_at"]
                    and all(op.call == "release" and op.begun > new.ended for op in rest)):
                return n, later
    raise AssertionError("no lease changed hands")


def spoil_hold(history):
    """A lease changes hands while its first holder has been promised more, and has not given it back."""
    n, later = changed_hands(history)
    others = about(history, history[n].result["lease_id"])
    spoiled = change(history, n, expires_at=history[later].ended + 9)
    return [op for i, op in enumerate(spoiled) if i == n or op not in others]


def spoil_fence(history):
    """Two acquisitions have one number."""
    n, later = changed_hands(history)
    return change(history, later, version=history[n].result["version"])


SPOILT = (spoil_swap, spoil_value, spoil_write, spoil_hold, spoil_fence)


def told(value: dict, error: bool = False) -> dict:
    """The line that answers a call."""
    text = value["says"] if error else json.dumps(value)
    return {"id": 1, "result": {"content": [{"type": "text", "text": text}], "isError": error,
                                **({} if error else {"structuredContent": value})}}


def held(actor: str, version: int, since: str, until: str) -> dict:
    return told({"acquired": True, "lease_id": f"L{version}", "version": version, "holder": actor,
                 "acquired_at": f"1970-01-01T00:00:{since}Z", "expires_at": f"1970-01-01T00:00:{until}Z"})


def took(actor: str, tool: str = "lease_acquire") -> Asked:
    return Asked(actor, tool, {"ttl_secs": 10}, "l")


TOLD = [
    (Asked("a", "kv_set", {"path": "/shared/p", "value": [1, 2]}), told({"version": 1}), 1, 2),
    (Asked("b", "kv_cas", {"path": "/shared/p", "new_value": "x", "expected_version": 0}),
     told({"version": 1, "swapped": False}), 3, 4),
    (Asked("b", "kv_get", {"path": "/shared/p"}), told({"entry": {"value": [1, 2], "version": 1}}), 5, 6),
    (Asked("b", "kv_set", {"path": "/shared/p", "value": "y"}), told({"version": 2}), 7, 8),
    (Asked("a", "kv_set", {"path": "/peer/self/p", "value": "mine"}), told({"version": 1}), 7, 8),
    (Asked("b", "kv_set", {"path": "/peer/self/p", "value": "mine"}), told({"version": 1}), 7, 8),
    (Asked("b", "kv_get", {"path": "/shared/p"}), None, 9, 10),
    (Asked("b", "kv_delete", {"path": "/shared/p"}), None, 11, 12),
    (Asked("a", "kv_get", {"path": "/shared/p"}), told({"entry": None}), 13, 14),
    (took("a"), held("a", 1, "10.000", "20.000"), 10, 10.1),
    (took("b"), told({"acquired": False, "holder": "a", "expires_at": "1970-01-01T00:00:20.000Z"}), 11, 12),
    (took("b"), held("b", 2, "20.000", "30.000"), 12, 20.001),
    (Asked("a", "lease_release", {"lease_id": "L1"}, "l"),
     told({"says": "unknown lease_id: L1; it was released, or its ttl_secs ran out: acquire"}, True), 21, 22),
    (took("a", "run_lease_acquire"), held("a", 1, "10.000", "20.000"), 10, 10.1),
]


def test_what_was_told_becomes_a_history():
    history = [op for row in TOLD for op in as_ops(*row)]
    assert verdict(history) == []
    assert Counter(op.call for op in history) == {"set": 4, "cas": 1, "get": 2, "delete": 1, "acquire": 4}
    assert {op.what for op in history} == {(LEAD, "/shared/p"), (LEAD, "/peer/a/p"), (LEAD, "/peer/b/p"),
                                           (LEAD, "l"), ("", "l")}
    assert [op.result["expires_at"] for op in history if op.call == "acquire" and op.result["acquired"]] == [
        pytest.approx(19.999), pytest.approx(29.999), pytest.approx(19.999)]
    early = [*TOLD[:-3], (*TOLD[-3][:3], 19.998), *TOLD[-2:]]
    assert len(verdict([op for row in early for op in as_ops(*row)])) == 1


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda f: f.__name__)
def test_a_history_that_is_spoiled_is_found(spoil):
    assert verdict(spoil([op for row in TOLD for op in as_ops(*row)]))


def test_another_refusal_of_a_release_is_no_history():
    with pytest.raises(AssertionError):
        as_ops(Asked("a", "lease_release", {"lease_id": "L1"}, "l"), told({"says": "forbidden"}, True), 1, 2)


# ------------------------------------------------------------------ clients that die

class Bridged(Caller):
    """An actor's connection through a bridge of its own, as agents have it."""

    def __init__(self, run: Stage, actor: str, nonce: str) -> None:
        ours, theirs = socket.socketpair()
        Client.__init__(self, ours)
        role = "lead" if actor == LEAD else "worker"
        argv = pitboss.bridge_argv(str(run.run), actor, role, str(run.run / "tasks" / actor / "token"))
        self.process = subprocess.Popen(argv, stdin=theirs, stdout=theirs, env=run.home.env)
        theirs.close()
        self.start_ping()

    def start_ping(self) -> None:
        """What was sent by one that died before was read by the dispatcher when this is answered."""
        self.say({"jsonrpc": "2.0", "id": "there", "method": "ping"})
        assert "result" in self.answer("there")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        super().close()


class Direct(Caller):
    """An actor's connection of its own to the socket."""

    def __init__(self, run: Stage, actor: str, nonce: str) -> None:
        super().__init__(run.socket("mcp"), actor, run.token(actor), nonce)
        assert "result" in self.greeting, self.greeting


NEVER = object()           # no whole line was sent


def well(person: Person, request: int, line: bytes):
    person.link.say(line)
    return person.link.answer(request)


def closed(person: Person, request: int, line: bytes):
    """The connection ends before or while the answer comes; the same call comes by a new one."""
    person.link.say(line)
    person.linger()
    person.come_again()
    return well(person, request, line)


def half(person: Person, request: int, line: bytes):
    """The connection ends in the middle of the line; the same call comes whole by a new one."""
    person.say_half(line)
    person.come_again()
    return well(person, request, line)


def doubled(person: Person, request: int, line: bytes):
    """The same call comes by a new connection while the old one still waits for its answer."""
    person.link.say(line)
    old, person.link = person.link, person.connect()
    answer = well(person, request, line)
    old.close()
    return answer


def given_up(person: Person, request: int, line: bytes):
    """The client dies, and nobody asks for the answer; a bridge is killed."""
    person.link.say(line)
    person.linger()
    person.come_again()


def half_given_up(person: Person, request: int, line: bytes):
    """The client dies in the middle of the line, and nobody comes back for it."""
    person.say_half(line)
    person.come_again()
    return NEVER


# of a bridge the calls die with it: its next one has another nonce
FATES = {Direct: (closed, half, doubled, given_up, half_given_up), Bridged: (given_up, half_given_up)}


class Person:
    """One of the clients: does things at random, and notes what it was told."""

    def __init__(self, run: Stage, number: int, actor: str, dies: float, clock: Callable[[], float]) -> None:
        self.run, self.number, self.actor, self.dies, self.clock = run, number, actor, dies, clock
        self.chance = random.Random(number)
        self.kind = Bridged if number < BRIDGED else Direct
        self.nonce = f"client-of-test-{number}"
        self.requests = 0
        self.history: list[Op] = []
        self.fates: Counter = Counter()
        self.versions: dict[str, int] = {}          # as they were last seen, by path
        self.leases: dict[str, Asked] = {}          # how to give them back, by id
        self.link = self.connect()

    def connect(self) -> Caller:
        return self.kind(self.run, self.actor, self.nonce)

    def come_again(self) -> None:
        """Die, and be there again."""
        self.link.close()
        self.link = self.connect()

    def linger(self) -> None:
        """Until the first bytes of an answer are there, or for a few milliseconds."""
        select.select([self.link.sock], [], [], self.chance.choice([0, 0.001, 0.01]))

    def say_half(self, line: bytes) -> None:
        """Some of a line, or all of it but its end."""
        self.link.sock.sendall(line[:self.chance.choice([self.chance.randrange(1, len(line)), len(line)])])

    def ask(self, asked: Asked) -> None:
        """Call a tool, whatever becomes of it."""
        self.requests += 1
        line = json.dumps({"jsonrpc": "2.0", "id": self.requests, "method": "tools/call",
                           "params": {"name": asked.tool, "arguments": asked.arguments}}).encode()
        fate = self.chance.choice(FATES[self.kind]) if self.chance.random() < self.dies else well
        self.fates[fate.__name__] += 1
        begun = self.clock()
        answer = fate(self, self.requests, line)
        if answer is not NEVER:
            ops = as_ops(asked, answer, begun, self.clock())
            self.history += ops
            self.learn(asked, ops[0].result if ops else None)

    def learn(self, asked: Asked, result: dict | None) -> None:
        """Remember what makes the next calls sensible."""
        if asked.tool == "kv_get" and result:
            self.versions[asked.arguments["path"]] = result["entry"]["version"] if result["entry"] else 0
        elif asked.tool in ("kv_set", "kv_cas") and result:
            self.versions[asked.arguments["path"]] = result["version"]
        elif result and result.get("acquired"):
            wide = asked.what == WIDE
            self.leases[result["lease_id"]] = Asked(
                self.actor, "run_lease_release" if wide else "lease_release",
                {"lease_id": result["lease_id"], **({"key": WIDE} if wide else {})}, asked.what)

    def turn(self) -> None:
        chance = self.chance.random()
        if self.leases and chance < 0.15:
            self.ask(self.leases.pop(self.chance.choice([*self.leases])))
        elif chance < 0.4:
            self.acquire()
        else:
            self.store()

    def acquire(self) -> None:
        name = self.chance.choice([*TTL_S])
        tool, key = ("run_lease_acquire", "key") if name == WIDE else ("lease_acquire", "name")
        self.ask(Asked(self.actor, tool, {key: name, "ttl_secs": TTL_S[name], "wait_secs": self.chance.choice(
            [0, 0, 0.05, 0.3])}, name))

    def store(self) -> None:
        tool = self.chance.choice(["kv_get", "kv_set", "kv_cas", "kv_cas", "kv_delete"])
        path = self.chance.choice(PATHS)
        text = f"{self.number}.{self.requests}"
        value = self.chance.choice([text, text, text * 3000, [self.number, *text.encode()]])
        extra = {"kv_set": {"value": value}, "kv_cas": {
            "new_value": value, "expected_version": self.versions.get(path, 0)}}.get(tool, {})
        self.ask(Asked(self.actor, tool, {"path": path, **extra}))

    def work(self, count: int) -> None:
        for _ in range(count):
            self.turn()
        self.link.close()


# ------------------------------------------------------------------ those who talk nonsense meanwhile

ARGUMENTS = [b'"path":"/shared/fuzz"', b'"path":"/peer/self/fuzz"', b'"path":5', b'"value":"z"', b'"value":null',
             b'"value":[999]', b'"new_value":{"base64":"?"}', b'"expected_version":-1', b'"name":"fuzz"',
             b'"expected_version":1e400', b'"key":"fuzz"', b'"ttl_secs":0.2', b'"ttl_secs":"1"', b'"wait_secs":1',
             b'"lease_id":"\\ud800"', b'"lease_id":{}', b'"glob":"**/\\u0000"']
TOOL_NAMES = [b"kv_get", b"kv_set", b"kv_cas", b"kv_delete", b"kv_list", b"lease_acquire", b"lease_release",
              b"lease_list", b"run_lease_acquire", b"run_lease_release", b"spawn_worker", b"kv_"]
CONTROL = [b'"op":"hello"', b'"op":"list_workers"', b'"op":"cancel_worker"', b'"op":"pause_worker"', b'"op":{}',
           b'"op":"\\ud800"', b'"task_id":"nobody"', b'"task_id":7', b'"prompt":[]', b'"mode":"melt"', b'"id":1',
           b'"id":[]', b'"reason":1']


def accident(chance: random.Random, line: bytes) -> bytes:
    """The line, often with one byte that is another."""
    line = bytearray(line)
    if chance.random() < 0.5:
        line[chance.randrange(len(line))] = chance.randrange(256)
    return bytes(line).replace(b"\n", b" ")


def strange_call(chance: random.Random) -> bytes:
    """A call of a tool that nobody would make, or a line that is no call."""
    if chance.random() < 0.4:
        return strange_line(chance)
    given = b",".join(chance.sample(ARGUMENTS, chance.randrange(5)))
    return accident(chance, b'{"jsonrpc":"2.0","id":%d,"method":"tools/call",'
                            b'"params":{"name":"%b","arguments":{%b}}}'
                    % (chance.randrange(50), chance.choice(TOOL_NAMES), given))


def strange_op(chance: random.Random) -> bytes:
    if chance.random() < 0.4:
        return strange_line(chance)
    return accident(chance, b"{%b}" % b",".join(chance.sample(CONTROL, chance.randrange(1, 4))))


def talk_nonsense(client: Client, count: int, strange: Callable, question: dict) -> None:
    """Strange lines, each batch followed by a question that must be answered."""
    chance = random.Random(count)
    for start in range(0, count, 50):
        mark = f"end of {start}"
        client.say(*(strange(chance) for _ in range(50)), {**question, "id": mark})
        client.find(lambda line: isinstance(line, dict) and line.get("id") == mark)


def knock(run: Stage, count: int) -> None:
    """Strange first lines: whoever says one is told so, and let go."""
    chance = random.Random(count)
    for n in range(count):
        client = Client(run.socket(("mcp", "control")[n % 2]))
        client.say([strange_line(chance).decode("latin-1")])
        assert client.hear() and client.hear() is None
        client.close()


# ------------------------------------------------------------------ all of them at once

@pytest.fixture
def stage(home):
    """A run with workers that stay until `home/workers.gate` is there."""
    run = Stage(home, workers=WORKERS, run="dump_shared_store = true")
    yield run
    run.end()


def clock_of_unix() -> Callable[[], float]:
    """Unix time that nobody sets."""
    offset = time.time() - time.monotonic()
    return lambda: time.monotonic() + offset


def run_all(run: Stage, people: list[Person], count: int, strange: int) -> None:
    """All clients and all nonsense at once; the first failure of any is raised."""
    ping = {"jsonrpc": "2.0", "method": "ping"}
    nonsense = [
        lambda: talk_nonsense(run.worker("worker-1"), strange // 2, strange_call, ping),
        lambda: talk_nonsense(run.operator(), strange // 2, strange_op, {"op": "list_workers"}),
        lambda: knock(run, strange // 50)]
    together = threading.Barrier(len(people) + len(nonsense))

    def begin(work: Callable, *args) -> None:
        together.wait()
        work(*args)

    with ThreadPoolExecutor(len(people) + len(nonsense)) as pool:
        for done in [*(pool.submit(begin, person.work, count) for person in people),
                     *(pool.submit(begin, work) for work in nonsense)]:
            done.result()


def last_words(run: Stage, lead: Caller, actors: list[str], clock: Callable[[], float]) -> list[Op]:
    """What lies at each path when all is quiet."""
    ops = []
    for path in [p for p in PATHS if "self" not in p] + [f"/peer/{actor}/x" for actor in actors]:
        begun = clock()
        answer = lead.answer(lead.start("kv_get", {"path": path}))
        ops += as_ops(Asked(LEAD, "kv_get", {"path": path}), answer, begun, clock())
    return ops


def check_dump(run: Stage, history: list[Op], final: list[Op]) -> None:
    """shared-store.json has each path's last write, and nothing else; `final` are reads after all of them."""
    layers = json.loads((run.run / "shared-store.json").read_text())["layers"]
    dumped = {(layer, path): entry for layer, entries in layers.items() for path, entry in entries.items()
              if not path.endswith("/fuzz")}
    read = {op.what: op.result["entry"] for op in final if op.result["entry"]}
    assert dumped.keys() == read.keys() and read
    wrote = [op for op in history if op.call == "set" or op.call == "cas"]
    for what, entry in dumped.items():
        last = max(op.result["version"] for op in wrote if op.what == what and op.result is not None)
        assert last <= entry["version"] == read[what]["version"], what
        known = numbers(history).get((what, entry["version"]))
        could = [known] if known else [op for op in wrote if op.what == what and op.result is None]
        assert (entry["written_by"], plain(entry["value"])) in {(op.client, op.given["value"]) for op in could}
        assert {**entry, "value": plain(entry["value"]), "path": what[1]} == read[what]


def check_run(run: Stage, count: int, strange: int, dies: float) -> None:
    lead, clock, open_gate = run.lead(), clock_of_unix(), run.home.root / "workers.gate"
    names = [lead.call("spawn_worker", prompt=gate(open_gate))["task_id"] for _ in range(WORKERS)]
    for name in names:
        run.running(lead, name)
    actors = [LEAD, *names]
    people = [Person(run, n, actors[n % len(actors)], dies, clock) for n in range(CLIENTS)]
    run_all(run, people, count, strange)
    final = last_words(run, lead, names + [LEAD], clock)
    history = [op for person in people for op in person.history]
    open_gate.touch()
    for name in names:
        assert lead.call("wait_for_worker", task_id=name)["status"] == "Success"
    run.finish()
    assert verdict(history + final) == []
    for spoil in SPOILT:
        assert verdict(spoil(history + final)), spoil.__name__
    check_dump(run, history, final)
    assert not (run.run / "sockets.log").exists(), (run.run / "sockets.log").read_text()
    fates = sum((person.fates for person in people), Counter())
    assert set(fates) == {"well", *(fate.__name__ for fates in FATES.values() for fate in fates)} and (
        fates.total() == CLIENTS * count)
    waited = [op for op in history if op.call == "acquire" and op.result and op.result["acquired"]
              and unix(op.result["acquired_at"]) > op.begun + 0.02]
    assert waited, "nobody had to wait for a lease"


def test_what_16_clients_are_told_can_have_happened(stage):
    check_run(stage, 60, 600, dies=0.08)


@pytest.mark.slow
def test_what_16_clients_are_told_in_2000_calls_each_can_have_happened(stage):
    check_run(stage, 2000, 5000, dies=0.03)
