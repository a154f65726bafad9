#!/usr/bin/env python3
"""What pitboss costs, beside a plain program that does the same work in the same minute.

    python3 tests/bench/bench.py [--quick] [--only NAME ...] [--json FILE] [--figures]

Every figure is the median of several rounds; where there is a peer, the two take turns, and the ratio is
the figure to look at, for it says little about the machine. Linux only (/proc), standard library only.
"""
from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import py_compile
import re
import resource
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from figures import put_rows, today  # noqa: E402
from tools import PITBOSS, PYTHON, Home, read_events, wait_for  # noqa: E402

os.environ["PITBOSS_TEST_PLAIN"] = "1"      # measure the file itself, as users start it
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
MB = 1_000_000


class Figure(NamedTuple):
    """One line of the table; `peer` is the same figure of the plain program, None where there is none."""
    what: str
    value: float
    unit: str
    peer: float | None = None
    peer_is: str = ""


class Size(NamedTuple):
    """How much work a round is and how many rounds there are."""
    rounds: int
    tasks: int
    worktrees: int
    log_bytes: int
    idle_s: float
    runs: int
    starts: int
    calls: int
    workers: int
    stored_bytes: int
    events: int


FULL = Size(rounds=5, tasks=400, worktrees=40, log_bytes=20 * MB, idle_s=20, runs=1000, starts=21,
            calls=10_000, workers=100, stored_bytes=64 << 20, events=100_000)
QUICK = Size(rounds=3, tasks=200, worktrees=12, log_bytes=5 * MB, idle_s=5, runs=100, starts=7,
             calls=4_000, workers=20, stored_bytes=16 << 20, events=20_000)

NOOP = '[agent.noop]\ncommand = ["true"]\nformat = "text"\n'
SLEEPER = '[agent.sleeper]\ncommand = ["sleep", "600"]\nformat = "text"\n'


# ---- tools of the rows

@contextlib.contextmanager
def fresh_home() -> Iterator[Home]:
    """A user's machine in a temporary folder; what it left alive is killed, what it wrote is removed."""
    with tempfile.TemporaryDirectory(prefix="pitboss-bench-", ignore_cleanup_errors=True) as name:
        home = Home(Path(name))
        try:
            yield home
        finally:
            home.end_everything()


def manifest_of(agents: str, actors: list[str], cap: int, defaults: str = "use_worktree = false") -> str:
    """A manifest with one task for every name of an agent in `actors`."""
    tasks = "".join(f'[[task]]\nid = "t{n}"\nagent = "{agent}"\ndirectory = "repo"\nprompt = "x"\n'
                    for n, agent in enumerate(actors))
    return f"[run]\nmax_parallel = {cap}\n[defaults]\n{defaults}\n{agents}{tasks}"


def prepare(home: Home, text: str) -> Path:
    (home.root / "repo").mkdir(exist_ok=True)
    return home.manifest(text)


def seconds(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def alternate(rounds: int, *acts: Callable[[], float]) -> list[float]:
    """The median of each act's answers; in every round each act has its turn."""
    answers = [[act() for act in acts] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*answers)]


def slope(small: int, large: int, cost: Callable[[int], float]) -> tuple[float, float]:
    """Seconds a task and seconds of the fixed part, from one round of `small` and one of `large` tasks."""
    few, many = cost(small), cost(large)
    per_task = (many - few) / (large - small)
    return per_task, few - small * per_task


def start_and_wait(home: Home, text: str, kind: str, count: int) -> tuple[subprocess.Popen, Path]:
    """A dispatch whose journal holds `count` events of `kind`; the process and the run folder."""
    process = home.start("dispatch", "-q", prepare(home, text), **QUIET)
    wait_for(lambda: count_events(home, kind) >= count, 120, f"{count} times {kind}")
    return process, home.run_dir()


def count_events(home: Home, kind: str) -> int:
    try:
        return sum(event["kind"] == kind for event in read_events(home.run_dir()))
    except (OSError, ValueError):        # no run folder yet, or an empty one
        return 0


def cpu_of(pid: int) -> float:
    """CPU seconds of one process, its children not counted; also right while it is a zombie."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def memory_of(pid: int) -> dict[str, float]:
    """VmRSS and VmHWM in MB; empty for a process that has ended."""
    text = Path(f"/proc/{pid}/status").read_text()
    return {name: int(kb) * 1024 / MB for name, kb in re.findall(r"^(VmRSS|VmHWM):\s+(\d+)", text, re.M)}


def bytes_read_by(pid: int) -> int:
    return int(re.search(r"rchar: (\d+)", Path(f"/proc/{pid}/io").read_text())[1])


def has_ended(pid: int) -> bool:
    """True when our child `pid` is a zombie; it stays one, so that /proc still tells of it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


# ---- 1. agents that do nothing

def measure_noop(size: Size) -> list[Figure]:
    few, many = size.tasks // 4, size.tasks
    with fresh_home() as home:
        def dispatch(count: int) -> float:
            manifest = prepare(home, manifest_of(NOOP, ["noop"] * count, cap=4))
            return seconds(lambda: home.pitboss("dispatch", "-q", manifest, check=0, timeout=300))

        def xargs(count: int) -> float:
            command = f"seq {count} | xargs -n 1 -P 4 true"
            return seconds(lambda: subprocess.run(command, shell=True, check=True))

        rounds = [(slope(few, many, dispatch), slope(few, many, xargs)) for _ in range(size.rounds)]
    middle = [statistics.median(values) for values in zip(*(ours + theirs for ours, theirs in rounds))]
    return [Figure("one agent more, at 4 at once", middle[0] * 1e3, "ms", middle[2] * 1e3, "xargs -P4"),
            Figure("a run's fixed part", middle[1] * 1e3, "ms")]


# ---- 2. worktrees

WORKTREES_BY_HAND = """\
set -e
for n in $(seq $1); do
    git worktree add -q -b "work/$n" "$2/$n"
    git -C "$2/$n" status --porcelain
    git worktree remove "$2/$n"
    git branch -q -d "work/$n"
done
"""


def measure_worktrees(size: Size) -> list[Figure]:
    with fresh_home() as home:
        repo = home.repo(files=10)
        actors = ["noop"] * size.worktrees
        manifest = prepare(home, manifest_of(NOOP, actors, cap=4, defaults="use_worktree = true"))
        by_hand = ["sh", "-c", WORKTREES_BY_HAND, "sh", str(size.worktrees), str(home.root / "by-hand")]
        ours, theirs = alternate(
            size.rounds,
            lambda: seconds(lambda: home.pitboss("dispatch", "-q", manifest, check=0, timeout=300)),
            lambda: seconds(lambda: subprocess.run(by_hand, cwd=repo, env=home.env, check=True)))
    return [Figure(f"{size.worktrees} agents with a worktree", ours * 1e3 / size.worktrees, "ms each",
                   theirs * 1e3 / size.worktrees, "git, one after the other")]


# ---- 3. agents that say much

SESSION = "5f1e6d0a-0000-4000-8000-000000000000"
ASSISTANT = {"type": "assistant", "message": {
    "id": "msg_%08d", "type": "message", "role": "assistant", "model": "claude-sonnet-4-6",
    "content": [{"type": "text", "text": "0123456789" * 60}], "stop_reason": None,
    "usage": {"input_tokens": 500, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
              "output_tokens": 1}},
    "parent_tool_use_id": None, "session_id": SESSION, "uuid": "u", "request_id": "r"}
RESULT = {"type": "result", "subtype": "success", "is_error": False, "num_turns": 1, "result": "done",
          "session_id": SESSION, "total_cost_usd": 0.01, "usage": {},
          "modelUsage": {"claude-sonnet-4-6": {"inputTokens": 500, "outputTokens": 9, "costUSD": 0.01}}}


def write_log(path: Path, size_bytes: int) -> int:
    """Lines as claude prints them, `size_bytes` of them and a result; the size in bytes."""
    line = json.dumps(ASSISTANT, separators=(",", ":")) + "\n"
    with path.open("w") as file:
        for n in range(size_bytes // len(line)):
            file.write(line % n)
        file.write(json.dumps(RESULT, separators=(",", ":")) + "\n")
    return path.stat().st_size


class Watched(NamedTuple):
    """A dispatcher seen from outside: its own CPU seconds, its memory after a tenth, at the end, at most."""
    cpu_s: float
    early_mb: float
    late_mb: float
    peak_mb: float


def watch_dispatch(home: Home, manifest: Path, total_bytes: int) -> Watched:
    """Run a dispatch and sample its memory; "a tenth" is when it has read a tenth of `total_bytes`."""
    process = home.start("dispatch", "-q", manifest, **QUIET)
    samples: list[tuple[int, dict]] = []
    pause = threading.Event()
    while not has_ended(process.pid):
        read, memory = bytes_read_by(process.pid), memory_of(process.pid)
        if memory:
            samples.append((read, memory))
        pause.wait(0.02)
    cpu_s = cpu_of(process.pid)
    assert process.wait() == 0
    early = next((memory for read, memory in samples if read >= total_bytes / 10), samples[-1][1])
    late = samples[-1][1]
    return Watched(cpu_s, early["VmRSS"], late["VmRSS"], late["VmHWM"])


def cat_cpu_s(source: Path, target: Path, times: int) -> float:
    """CPU seconds of `cat` writing `source` to a file, `times` times."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(times):
        with target.open("wb") as file:
            subprocess.run(["cat", source], stdout=file, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure_stream(size: Size) -> list[Figure]:
    agents = 8
    with fresh_home() as home:
        log = home.root / "log.jsonl"
        total = agents * write_log(log, size.log_bytes)
        cat = f'[agent.cat]\ncommand = ["cat", "{log}"]\nformat = "claude"\n'
        manifest = prepare(home, manifest_of(cat, ["cat"] * agents, cap=agents))
        seen = []
        for _ in range(size.rounds):
            seen.append((watch_dispatch(home, manifest, total), cat_cpu_s(log, home.root / "copy", agents)))
            shutil.rmtree(home.runs)
    ours, theirs = [w for w, _ in seen], [c for _, c in seen]
    per_100_mb = 100 * MB / total
    middle = Watched(*(statistics.median(column) for column in zip(*ours)))
    return [Figure("dispatcher CPU for 100 MB of events", middle.cpu_s * per_100_mb, "s",
                   statistics.median(theirs) * per_100_mb, "cat to a file"),
            Figure("dispatcher memory at most", middle.peak_mb, "MB"),
            Figure("dispatcher memory at the end", middle.late_mb, "MB", middle.early_mb, "after a tenth")]


# ---- 4. agents that say nothing

def measure_idle(size: Size) -> list[Figure]:
    with fresh_home() as home:
        text = manifest_of(SLEEPER, ["sleeper"] * 16, cap=16)
        process, _ = start_and_wait(home, text, "hand_started", 16)
        before, began = cpu_of(process.pid), time.perf_counter()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(size.idle_s)
        spent_s, passed_s = cpu_of(process.pid) - before, time.perf_counter() - began
        process.kill()
        process.wait()
    return [Figure("dispatcher CPU, 16 silent agents", 100 * spent_s / passed_s, "% of a core")]


# ---- 5. taking over after the dispatcher was killed

def measure_takeover(size: Size) -> list[Figure]:
    agents, rows = 8, []
    for _ in range(size.rounds):
        with fresh_home() as home:
            text = manifest_of(SLEEPER, ["sleeper"] * agents, cap=agents)
            process, run = start_and_wait(home, text, "hand_started", agents)
            process.kill()
            process.wait()
            rows.append(take_over(home, run, agents))
    restarted, passed_s = (statistics.median(column) for column in zip(*rows))
    return [Figure("agents adopted after SIGKILL of the dispatcher", agents - restarted, f"of {agents}"),
            Figure("agents dealt again", restarted, f"of {agents}"),
            Figure("until all are watched again", passed_s * 1e3, "ms")]


def take_over(home: Home, run: Path, agents: int) -> tuple[int, float]:
    """`resume` a run with living agents: how many were dealt again, and the seconds until all are watched."""
    known = len(read_events(run))
    began = time.perf_counter()
    process = home.start("resume", run.name, **QUIET)

    def is_watching() -> bool:
        return len(read_events(run)) > known and watched_processes(process.pid) >= agents

    wait_for(is_watching, 60, "adoption")
    passed_s = time.perf_counter() - began
    kinds = [event["kind"] for event in read_events(run)[known:]]
    process.kill()
    process.wait()
    return kinds.count("hand_dealt"), passed_s


def watched_processes(pid: int) -> int:
    """How many processes `pid` holds a pidfd of: that is how a dispatcher waits for an agent."""
    links = []
    with contextlib.suppress(OSError):
        links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    return sum("pidfd" in link for link in links)


# ---- 6. reading commands

def measure_reading(size: Size) -> list[Figure]:
    return [*measure_status(size), *measure_list(size)]


def measure_status(size: Size) -> list[Figure]:
    count = size.runs
    with fresh_home() as home:
        manifest = prepare(home, manifest_of(NOOP, ["noop"] * count, cap=4))
        home.pitboss("dispatch", "-q", manifest, check=0, timeout=600)
        finished = home.run_dir().name
        actors = ["noop"] * (count // 2) + ["sleeper"] * (count - count // 2)
        process, run = start_and_wait(home, manifest_of(NOOP + SLEEPER, actors, cap=4), "closed", count // 2)
        of_finished, of_live, version = alternate(
            size.rounds, *(lambda args=args: run_s(home, *args)
                           for args in (["status", finished], ["status", run.name], ["version"])))
        process.kill()
        process.wait()
    return [Figure(f"status, finished run of {count}, above version", (of_finished - version) * 1e3, "ms"),
            Figure(f"status, live run of {count}, above version", (of_live - version) * 1e3, "ms")]


def run_s(home: Home, *args: str) -> float:
    return seconds(lambda: home.pitboss(*args, check=0))


def measure_list(size: Size) -> list[Figure]:
    with fresh_home() as home:
        home.pitboss("dispatch", "-q", prepare(home, manifest_of(NOOP, ["noop"] * 3, cap=4)), check=0)
        for n in range(size.runs - 1):
            copy_run(home.run_dir(), n)
        listed = json.loads(home.pitboss("list", "--json", check=0).stdout)
        assert len(listed) == size.runs and {row["state"] for row in listed} == {"complete"}
        of_list, version = alternate(size.rounds, lambda: run_s(home, "list"), lambda: run_s(home, "version"))
    return [Figure(f"list of {size.runs} runs, above version", (of_list - version) * 1e3, "ms")]


def copy_run(run: Path, number: int) -> None:
    """The same run once more under another UUIDv7, earlier by `number` + 1 ms: `run` stays the newest."""
    moment = int(run.name.replace("-", "")[:12], 16) - number - 1
    bits = moment << 80 | 7 << 76 | uuid.uuid4().int & (1 << 76) - 1
    name = str(uuid.UUID(int=bits & ~(3 << 62) | 2 << 62))
    shutil.copytree(run, run.parent / name, ignore=shutil.ignore_patterns("self", "tasks", "worktrees"))
    for path in (run.parent / name).glob("*.json*"):
        path.write_text(path.read_text().replace(run.name, name))


# ---- 7. start-up

def measure_start(size: Size) -> list[Figure]:
    with fresh_home() as home:
        py_compile.compile(str(PITBOSS), cfile=str(home.root / "pitboss.pyc"), doraise=True)
        compiled = f"import sys; sys.path[:0] = {[str(home.root)]}; import pitboss; pitboss.main(['version'])"
        acts = [[str(PITBOSS), "version"], ["-c", compiled], ["-c", "pass"]]
        source, cached, bare = alternate(
            size.starts, *(lambda args=args: python_s(home, args) for args in acts))
    lines = PITBOSS.read_text().count("\n")
    return [Figure("version, from the file", source * 1e3, "ms", bare * 1e3, "python3 -c pass"),
            Figure("version, compiled before", cached * 1e3, "ms", bare * 1e3, "python3 -c pass"),
            Figure(f"start-up for 1000 of the {lines} lines", (source - bare) * 1e3 / (lines / 1000), "ms"),
            Figure("the same, compiled before", (cached - bare) * 1e3 / (lines / 1000), "ms")]


def python_s(home: Home, argv: list[str]) -> float:
    argv = [PYTHON, "-I", "-S", *argv]
    return seconds(lambda: subprocess.run(argv, env=home.env, stdout=subprocess.DEVNULL, check=True))


# ---- 8. calls of tools

BARE_SERVER = """\
import json, socket, sys, threading
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(64)
def serve(link):
    part = b""
    while data := link.recv(65536):
        *lines, part = (part + data).split(b"\\n")
        for line in lines:
            message = json.loads(line)
            link.sendall(json.dumps({"id": message["id"], "result": message["params"]}).encode() + b"\\n")
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
BARE_RELAY = """\
import os, select, socket, sys
link = socket.socket(socket.AF_UNIX)
link.connect(sys.argv[1])
while True:
    for ready in select.select([0, link], [], [])[0]:
        data = os.read(0, 65536) if ready == 0 else link.recv(65536)
        if not data: sys.exit()
        link.sendall(data) if ready == 0 else os.write(1, data)
"""


class Caller:
    """An agent's side of a bridge or a relay: one call at a time."""

    def __init__(self, argv: list[str]) -> None:
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.fd, self.part, self.number = self.process.stdout.fileno(), b"", 0

    def send(self, tool: str = "echo", **arguments) -> None:
        self.number += 1
        arguments = arguments or {"text": "a value of a key-value store"}
        line = json.dumps({"jsonrpc": "2.0", "id": self.number, "method": "tools/call",
                           "params": {"name": tool, "arguments": arguments}}).encode() + b"\n"
        while line:                          # a raw pipe takes what it has room for
            line = line[self.process.stdin.write(line):]

    def receive(self) -> dict:
        """The result of the last call, which must be of that call and no error."""
        parts = []
        while not parts or not parts[-1].endswith(b"\n"):
            parts.append(os.read(self.fd, 65536))
            assert parts[-1], "the other side has gone"
        answer = json.loads(b"".join(parts))
        assert answer["id"] == self.number and "result" in answer, answer
        assert not answer["result"].get("isError"), answer
        return answer["result"]

    def ask(self, tool: str, **arguments) -> dict:
        """What a tool of pitboss answers."""
        self.send(tool, **arguments)
        return self.receive()["structuredContent"]

    def call(self, tool: str = "echo", **arguments) -> float:
        """Seconds until a call was answered."""
        began = time.perf_counter()
        self.send(tool, **arguments)
        self.receive()
        return time.perf_counter() - began

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


@contextlib.contextmanager
def serving(argv: list[str], ready: Path) -> Iterator[None]:
    """A server that has bound `ready`, or written it."""
    server = subprocess.Popen(argv, **QUIET)
    try:
        wait_for(ready.exists, 30, f"the server of {ready}")
        yield
    finally:
        server.kill()
        server.wait()


@contextlib.contextmanager
def bare_relay() -> Iterator[list[str]]:
    """The argv of a bare relay with a server that echoes behind it."""
    with tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp") as name:
        socket_path = Path(name, "bare.sock")
        with serving([PYTHON, "-c", BARE_SERVER, str(socket_path)], socket_path):
            yield [PYTHON, "-I", "-S", "-c", BARE_RELAY, str(socket_path)]


@contextlib.contextmanager
def echoing_bridge() -> Iterator[list[str]]:
    """The argv of a bridge with a desk that echoes behind it."""
    import pitboss
    import wire_desk

    with tempfile.TemporaryDirectory(prefix="pw-", dir="/tmp") as name:
        run = Path(name)
        pitboss.pin_self(name)
        pitboss.pin_bridge(name)
        (run / "tokens.json").write_text('{"lead": ["token", "lead"]}')
        (run / "token").write_text("token")
        with serving([PYTHON, wire_desk.__file__, name], run / "sockets.json"):
            yield pitboss.bridge_argv(name, "lead", "lead", f"{name}/token")


def latencies(argv: list[str], count: int, tool: str = "echo", **arguments) -> tuple[float, float]:
    """p50 and p99, in seconds, of calls that one caller makes one after the other."""
    caller = Caller(argv)
    for _ in range(200):
        caller.call(tool, **arguments)
    values = sorted(caller.call(tool, **arguments) for _ in range(count))
    caller.end()
    return values[count // 2], values[count * 99 // 100]


def calls_a_second(argvs: list[list[str]], count: int, tool: str = "echo", **arguments) -> float:
    """How many calls the callers get answered a second, each making one after the other."""
    all_callers = [Caller(argv) for argv in argvs]
    for caller in all_callers:
        caller.call(tool, **arguments)
    by_fd = {caller.fd: caller for caller in all_callers}
    poll = select.poll()
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    began, answered = time.perf_counter(), 0
    for caller in all_callers:
        caller.send(tool, **arguments)
    while answered < count:
        for fd, _ in poll.poll():
            by_fd[fd].receive()
            by_fd[fd].send(tool, **arguments)
            answered += 1
    passed = time.perf_counter() - began
    for caller in all_callers:
        caller.end()
    return answered / passed


def first_answer_s(argv: list[str]) -> float:
    """From the start of a bridge to its first answer."""
    began = time.perf_counter()
    caller = Caller(argv)
    caller.call()
    passed = time.perf_counter() - began
    caller.end()
    return passed


def measure_wire(size: Size) -> list[Figure]:
    with echoing_bridge() as bridge, bare_relay() as relay:
        rows = [(*latencies(bridge, size.calls // 10), *latencies(relay, size.calls // 10),
                 calls_a_second([bridge] * 16, size.calls), calls_a_second([relay] * 16, size.calls),
                 first_answer_s(bridge), first_answer_s(relay)) for _ in range(size.rounds)]
    p50, p99, bare50, bare99, rate, bare_rate, start, bare_start = map(statistics.median, zip(*rows))
    return [Figure("call through the bridge, p50", p50 * 1e3, "ms", bare50 * 1e3, PEER),
            Figure("call through the bridge, p99", p99 * 1e3, "ms", bare99 * 1e3, PEER),
            Figure("calls of 16 callers at once", rate, "a second", bare_rate, PEER),
            Figure("bridge, from its start to an answer", start * 1e3, "ms", bare_start * 1e3, PEER)]


# ---- 9. runs with a lead: the agents sleep, their calls are ours

PEER = "echo through a bare relay"


def lead_manifest(home: Home, agents: str = NOOP + SLEEPER, agent: str = "sleeper") -> Path:
    """A manifest with a lead that does nothing, and room for all that its callers will spawn."""
    return prepare(home, "[run]\nmax_workers = 16\nbudget_usd = 1e6\n[defaults]\nuse_worktree = false\n"
                         f'{agents}[lead]\nid = "boss"\nagent = "{agent}"\n'
                         'directory = "repo"\nprompt = "x"\n')


class LeadRun:
    """A run whose agents sleep: what they could call, the bench calls through bridges of its own."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.process = home.start("dispatch", "-q", lead_manifest(home), **QUIET)
        wait_for(lambda: count_events(home, "hand_started"), 60, "the lead")
        self.folder = home.run_dir()
        self.lead = Caller(self.bridge("boss"))

    def bridge(self, actor: str) -> list[str]:
        """The command by which an actor's agent starts its bridge."""
        config = json.loads((self.folder / "tasks" / actor / "mcp-config.json").read_text())
        server = config["mcpServers"]["pitboss"]
        return [server["command"], *server["args"]]

    def spawn(self, count: int) -> list[str]:
        """`count` workers that sleep, and run."""
        names = [self.lead.ask("spawn_worker", prompt="x", agent="sleeper")["task_id"] for _ in range(count)]
        wait_for(lambda: count_events(self.home, "hand_started") > count, 60, "the workers")
        return names

    def end(self) -> None:
        self.lead.end()
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def lead_run() -> Iterator[LeadRun]:
    with fresh_home() as home:
        run = LeadRun(home)
        try:
            yield run
        finally:
            run.end()


def measure_calls(size: Size) -> list[Figure]:
    get = {"tool": "kv_get", "path": "/shared/value"}
    with lead_run() as run, bare_relay() as relay:
        bridges = [run.bridge(name) for name in run.spawn(16)]
        run.lead.ask("kv_set", path="/shared/value", value="a value of a key-value store")
        rows = []
        for _ in range(size.rounds):
            alone, bare = latencies(bridges[0], size.calls // 10, **get), latencies(relay, size.calls // 10)
            before = cpu_of(run.process.pid)
            rate = calls_a_second(bridges, size.calls, **get)
            spent_s = cpu_of(run.process.pid) - before
            rows.append((*alone, *bare, rate, calls_a_second([relay] * 16, size.calls), spent_s / size.calls,
                         written_cpu_s(run, size.calls // 4)))
    p50, p99, bare50, bare99, rate, bare_rate, get_cpu_s, set_cpu_s = map(statistics.median, zip(*rows))
    return [Figure("kv_get, p50", p50 * 1e3, "ms", bare50 * 1e3, PEER),
            Figure("kv_get, p99", p99 * 1e3, "ms", bare99 * 1e3, PEER),
            Figure("kv_get of 16 workers at once", rate, "a second", bare_rate, PEER),
            Figure("dispatcher CPU of a kv_get, 16 at once", get_cpu_s * 1e6, "us"),
            Figure("dispatcher CPU of a kv_set", set_cpu_s * 1e6, "us")]


def written_cpu_s(run: LeadRun, count: int) -> float:
    """CPU seconds that one kv_set costs the dispatcher."""
    before = cpu_of(run.process.pid)
    for n in range(count):
        run.lead.call("kv_set", path=f"/shared/{n % 100}", value="a value of a key-value store")
    return (cpu_of(run.process.pid) - before) / count


def measure_spawn(size: Size) -> list[Figure]:
    def true() -> float:
        return seconds(lambda: subprocess.run(["true"], check=True))

    with lead_run() as run:
        def worker() -> float:
            began = time.perf_counter()
            name = run.lead.ask("spawn_worker", prompt="x", agent="noop")["task_id"]
            record = run.lead.ask("wait_for_worker", task_id=name)
            assert record["status"] == "Success", record
            return time.perf_counter() - began

        worker()
        before = cpu_of(run.process.pid)
        settled, alone = alternate(size.workers, worker, true)
        spent_s = cpu_of(run.process.pid) - before
    return [Figure("worker that does nothing, spawned to settled", settled * 1e3, "ms", alone * 1e3,
                   "subprocess.run true"),
            Figure("dispatcher CPU of it", spent_s * 1e3 / size.workers, "ms")]


def measure_lead(size: Size) -> list[Figure]:
    with fresh_home() as home:
        up = home.root / "up"
        tells = f'[agent.tells]\ncommand = ["sh", "-c", "date +%s%N >{up}"]\nformat = "text"\n'
        manifest = lead_manifest(home, tells, "tells")

        def until_up() -> float:
            began = time.time_ns()
            home.pitboss("dispatch", "-q", manifest, check=0)
            return (int(up.read_text()) - began) / 1e9

        ours, version = alternate(size.starts, until_up, lambda: run_s(home, "version"))
    return [Figure("dispatch, until the lead's agent is up", ours * 1e3, "ms", version * 1e3, "version"),
            Figure("the same, above version", (ours - version) * 1e3, "ms")]


def measure_store(size: Size) -> list[Figure]:
    """Memory with as many values as the dispatcher keeps in its own, and large ones, which lie in files."""
    small, large = 4096, 1 << 20
    with lead_run() as run:
        run.spawn(16)
        empty = memory_of(run.process.pid)["VmRSS"]
        count = min(9000, size.stored_bytes // 2 // small)
        for n in range(count):
            run.lead.ask("kv_set", path=f"/shared/small/{n}", value=chr(97 + n % 26) * small)
        for n in range((size.stored_bytes - count * small) // large):
            run.lead.ask("kv_set", path=f"/shared/large/{n}", value=f"{n:08}" * (large // 8))
        memory = memory_of(run.process.pid)
    stored = f"16 workers and {size.stored_bytes >> 20} MiB stored"
    return [Figure(f"dispatcher memory, {stored}", memory["VmRSS"], "MB", empty, "nothing stored"),
            Figure("the same, at most", memory["VmHWM"], "MB")]


FOLD = """\
import sys, time
sys.path[:0] = sys.argv[1:2]
import pitboss
began = time.process_time()
run = pitboss.fold_run(sys.argv[2])
print(time.process_time() - began, len(run.actors), run.seq)
"""
PARSE = """\
import json, sys, time
began = time.process_time()
with open(sys.argv[1] + "/journal.jsonl", "rb") as f:
    for line in f:
        json.loads(line)
print(time.process_time() - began)
"""


def measure_replay(size: Size) -> list[Figure]:
    """A real journal whose one worker is repeated under other names, folded in a process of its own."""
    with lead_run() as run, tempfile.TemporaryDirectory(prefix="pitboss-bench-") as name:
        write_long_journal(run, Path(name), size.events)

        def python(*argv: str) -> list[str]:
            return subprocess.check_output([PYTHON, "-c", *argv], text=True).split()

        def folded() -> float:
            cpu_s, actors, seq = python(FOLD, str(PITBOSS.parent), name)
            assert int(seq) == size.events and int(actors) > size.events / 20, (actors, seq)
            return float(cpu_s)

        ours, parsed = alternate(size.rounds, folded, lambda: float(python(PARSE, name)[0]))
    return [Figure(f"fold of {size.events} events, CPU", ours, "s", parsed, "json.loads of its lines")]


def write_long_journal(run: LeadRun, folder: Path, count: int) -> None:
    """`count` events: those of a worker that shared values and leases and settled, again and again."""
    worker = run.lead.ask("spawn_worker", prompt="x", agent="sleeper")["task_id"]
    wait_for(lambda: count_events(run.home, "hand_started") > 1, 60, "the worker")
    caller = Caller(run.bridge(worker))
    for path in ("/peer/self/notes", f"/shared/{worker}"):
        caller.ask("kv_set", path=path, value="a value of a key-value store")
    lease = caller.ask("lease_acquire", name="it", ttl_secs=600)["lease_id"]
    caller.ask("lease_release", lease_id=lease)
    caller.end()
    run.lead.ask("cancel_worker", task_id=worker)
    run.lead.ask("wait_for_worker", task_id=worker)
    events = repeat_worker(read_events(run.folder), worker, lease)
    with (folder / "journal.jsonl").open("w") as file:
        for seq, event in zip(range(1, count + 1), events):
            file.write(json.dumps({**event, "seq": seq}, separators=(",", ":")) + "\n")


def repeat_worker(events: list[dict], worker: str, lease: str) -> Iterator[dict]:
    """The events of a run; those from its one worker on come again and again, under other names."""
    first = next(n for n, event in enumerate(events) if event.get("actor") == worker)
    yield from events[:first]
    block = json.dumps(events[first:])
    for turn in itertools.count():
        text = block.replace(worker, f"repeated-{turn}").replace(lease, f"lease-{turn}")
        for event in json.loads(text):
            yield {**event, "version": turn + 1} if event["kind"] == "lease_granted" else event


def measure_control(size: Size) -> list[Figure]:
    """From an operator's line to its answer, when the worker stands still; it is looked at from outside."""
    with lead_run() as run:
        worker = run.spawn(1)[0]
        pid = next(event["handle"]["pid"] for event in read_events(run.folder)
                   if event["kind"] == "hand_started" and event["actor"] == worker)
        link = socket.socket(socket.AF_UNIX)
        link.settimeout(60)
        link.connect(json.loads((run.folder / "sockets.json").read_text())["control"])
        lines = link.makefile("rb")

        def operate(op: str, **fields) -> float:
            began = time.perf_counter()
            link.sendall(json.dumps({"op": op, **fields}).encode() + b"\n")
            answer = json.loads(lines.readline())
            assert answer["event"] in ("hello", "op_acked"), answer
            return time.perf_counter() - began

        operate("hello")
        frozen, went_on = [], []
        for _ in range(size.workers):
            frozen.append(operate("pause_worker", task_id=worker, mode="freeze"))
            assert process_state(pid) == "T", process_state(pid)
            went_on.append(operate("continue_worker", task_id=worker))
            assert process_state(pid) != "T"
        link.close()
    return [Figure(f"{what}, {name}", sorted(values)[int(len(values) * part)] * 1e3, "ms")
            for what, values in (("pause --freeze to a frozen worker", frozen), ("continue", went_on))
            for name, part in (("p50", 0.5), ("p95", 0.95))]


def process_state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


# ---- 10. the floor

class Shown:
    """The floor of a run in a terminal of its own; what it writes is read at once."""

    def __init__(self, home: Home, run: str, columns: int = 120, rows: int = 40) -> None:
        import fcntl
        import pty
        import struct
        import termios

        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.fd, self.text, self.began = ours, b"", time.perf_counter()
        self.process = subprocess.Popen(home.argv("floor", run), stdin=theirs, stdout=theirs, stderr=theirs,
                                        start_new_session=True, cwd=home.root,
                                        env={**home.env, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"})
        os.close(theirs)

    def until(self, wanted: bytes, deadline_s: float = 60) -> float:
        """Seconds until some text is written."""
        began, seen = time.perf_counter(), b""
        while wanted not in seen:
            left = began + deadline_s - time.perf_counter()
            assert left > 0 and select.select([self.fd], [], [], left)[0], f"no {wanted!r}: {seen[-2000:]!r}"
            seen += os.read(self.fd, 1 << 16)
        return time.perf_counter() - began

    def cpu_share(self, seconds_: float, act: Callable[[], None] = lambda: None) -> float:
        """The share of a core that it takes while `act` is called four times a second."""
        before, end = cpu_of(self.process.pid), time.monotonic() + seconds_
        while (left := end - time.monotonic()) > 0:
            act()
            pause = time.monotonic() + min(0.25, left)
            while (rest := pause - time.monotonic()) > 0:
                if select.select([self.fd], [], [], rest)[0]:
                    os.read(self.fd, 1 << 16)
        return (cpu_of(self.process.pid) - before) / seconds_

    def end(self) -> None:
        self.process.terminate()
        with contextlib.suppress(OSError):
            while os.read(self.fd, 1 << 16):
                pass
        self.process.wait(10)
        os.close(self.fd)


class Made:
    """A run folder with a journal that was written by hand; this process holds its lock."""

    def __init__(self, home: Home, actors: int, events: int) -> None:
        import fcntl

        self.run_id = "01a20000-0000-7000-8000-%012x" % actors
        self.folder = home.runs / self.run_id
        (self.folder / "tasks").mkdir(parents=True)
        (self.folder / "meta.json").write_text('{"manifest_name": "big", "mode": "hierarchical"}')
        self.lock = open(self.folder / "lock", "w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self.journal = open(self.folder / "journal.jsonl", "a")
        self.at, self.seq = time.time() - 100, 0
        self.names = ["boss", *(f"worker-{n}" for n in range(1, actors))]
        self.logs = [self.folder / "tasks" / name / "stdout.log" for name in self.names]
        self.write("run_opened", format=1, run_id=self.run_id, name="big", mode="hierarchical", max_parallel=1 << 20)
        common = {"agent": "claude", "model": "claude-haiku-4-5", "directory": "/", "use_worktree": False,
                  "timeout_s": 3600, "branch": None}
        for n, name in enumerate(self.names):
            own = ({"role": "worker", "parent": "boss", "layer": "boss", "estimate": 0.1} if n else
                   {"role": "lead", "layer": "boss", "budget_usd": 100.0, "max_workers": 16})
            self.write("actor_added", actor=name, **common, **own)
            self.write("hand_dealt", actor=name, hand=1, session_id="s", how="prompt", log_at=0, message_id="m")
            self.write("hand_started", actor=name, hand=1, handle={"executor": "local", "pid": 1, "start": "",
                                                                   "boot": "", "ns": "", "marker": "m"})
            self.logs[n].parent.mkdir()
            self.say(n)
        while self.seq < events:
            self.write("usage", actor=self.names[self.seq % actors], usage=[self.seq, 1, 1, 1], cost_usd=0.01)
        self.journal.flush()

    def write(self, kind: str, **facts) -> None:
        self.seq += 1
        self.at += 0.0001
        self.journal.write(json.dumps({"seq": self.seq, "at": self.at, "kind": kind, **facts}) + "\n")

    def say(self, n: int) -> None:
        with open(self.logs[n], "a") as f:
            f.write('{"type":"assistant","message":{"content":[{"type":"text","text":"line %d"}]}}\n' % time.time_ns())

    def print_some(self) -> None:
        """What 16 agents do in a quarter of a second."""
        for n in range(16):
            for _ in range(5):
                self.say(n)
            self.write("usage", actor=self.names[n], usage=[self.seq, 1, 1, 1], cost_usd=0.01)
        self.journal.flush()

    def change(self, freeze: bool) -> None:
        """The lead is frozen, or goes on."""
        if freeze:
            self.write("pause_decided", actor="boss", mode="freeze")
        else:
            self.write("continue_decided", actor="boss")
        self.journal.flush()


def measure_floor(size: Size) -> list[Figure]:
    """CPU and latency of the floor; its first frame of a long run."""
    figures = []
    with fresh_home() as home:
        long, few = Made(home, size.runs, size.events), Made(home, 300, 1000)
        firsts, costs = [], []
        for _ in range(size.rounds):
            shown = Shown(home, long.run_id)
            firsts.append(shown.until(b"worker-1"))
            costs.append(cpu_of(shown.process.pid))
            shown.end()
        figures.append(Figure(f"first frame: {size.runs} actors, {size.events} events", statistics.median(firsts), "s"))
        figures.append(Figure("the same, CPU", statistics.median(costs), "s"))
        shown = Shown(home, few.run_id)
        shown.until(b"worker-1")
        shown.cpu_share(2)
        figures.append(Figure("300 actors at rest", 100 * shown.cpu_share(size.idle_s), "% of a core"))
        figures.append(Figure("300 actors, 16 of them print", 100 * shown.cpu_share(size.idle_s, few.print_some), "% of a core"))
        os.write(shown.fd, b"v")
        figures.append(Figure("the same, one line an actor", 100 * shown.cpu_share(size.idle_s, few.print_some), "% of a core"))
        os.write(shown.fd, b"v")
        shown.cpu_share(1)
        delays = []
        for n in range(40):
            few.change(n % 2 == 0)
            delays.append(shown.until(b"Running" if n % 2 else b"Frozen"))
            shown.cpu_share(0.01 + 0.013 * n)
        figures += [Figure(f"an event to the screen, {name}", sorted(delays)[int(len(delays) * part)] * 1e3, "ms")
                    for name, part in (("p50", 0.5), ("p95", 0.95))]
        shown.end()
    return figures


# ---- the ticket loop

def measure_pit(size: Size) -> list[Figure]:
    """What lies between the end of one ticket's turn and the agent's word that it has the next prompt.

    The scripted agent's own time for `/clear` and its hooks is in it.
    """
    from pit_desk import Pit

    figures = []
    for flags, name in (((), "in tmux"), (("--headless",), "headless")):
        with fresh_home() as home:
            pit = Pit(home)
            try:
                pit.epic("Bench", *(f"$ run true {n}" for n in range(4 * size.rounds)))
                pit.pit("start", "--epics", "bench", *flags)
                pit.watch("done", 300)
                ended = [e["at"] for e in pit.events("turn_ended")]
                begun = [e["at"] for e in pit.events("prompted")]
                gaps = [b - e for e, b in zip(ended, begun[1:])]
                figures.append(Figure(f"between two tickets, {name}", statistics.median(gaps), "s"))
            finally:
                pit.end()
    return figures


# ---- the table

ROWS = {
    "noop": measure_noop,
    "worktrees": measure_worktrees,
    "stream": measure_stream,
    "idle": measure_idle,
    "takeover": measure_takeover,
    "reading": measure_reading,
    "start": measure_start,
    "wire": measure_wire,
    "calls": measure_calls,
    "spawn": measure_spawn,
    "lead": measure_lead,
    "store": measure_store,
    "replay": measure_replay,
    "control": measure_control,
    "floor": measure_floor,
    "pit": measure_pit,
}


def render(name: str, figure: Figure) -> str:
    against = ""
    if figure.peer is not None:
        ratio = f"{figure.value / figure.peer:.2f}" if figure.peer > 0 else "-"
        against = f"{ratio:>7} x {figure.peer:.4g} {figure.unit} ({figure.peer_is})"
    return f"{name:<10} {figure.what:<52} {figure.value:>9.4g} {figure.unit:<12}{against}".rstrip()


def measure(names: list[str], size: Size) -> dict[str, list[Figure]]:
    """Every row asked for, printed as it comes."""
    print(f"{'row':<10} {'figure':<52} {'value':>9} {'':<12}{'ratio':>7}   peer", flush=True)
    results = {}
    for name in names:
        results[name] = ROWS[name](size)
        for figure in results[name]:
            print(render(name, figure), flush=True)
    return results


def as_json(results: dict[str, list[Figure]]) -> dict:
    figures = [{"row": name, **figure._asdict(), "ratio": figure.value / figure.peer if figure.peer else None}
               for name, figures in results.items() for figure in figures]
    machine = {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count(),
               "load": os.getloadavg()[0]}
    return {"machine": machine, "figures": figures}


def as_rows(results: dict[str, list[Figure]], command: str, scale: str) -> list[dict]:
    """The figures as rows of tests/data/figures.json."""
    rows = []
    for name, found in results.items():
        for f in found:
            ratio = f", ratio {f.value / f.peer:.2f}" if f.peer else ""
            beside = f"{f.peer:.4g} {f.unit} ({f.peer_is}){ratio}" if f.peer is not None else "–"
            rows.append({"row": name, "what": f.what, "measured": f"{f.value:.4g} {f.unit}", "beside": beside,
                         "scale": f"{scale}, {os.cpu_count()} cores", "command": command, "when": today()})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", choices=ROWS, metavar="NAME", help=", ".join(ROWS))
    parser.add_argument("--quick", action="store_true", help="less work and fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--figures", action="store_true",
                        help="put them into tests/data/figures.json, for the README (tests/figures.py --write)")
    options = parser.parse_args()
    if sys.platform != "linux":
        parser.error("the figures come from /proc, which only Linux has")
    results = measure(options.only or list(ROWS), QUICK if options.quick else FULL)
    if options.json:
        options.json.write_text(json.dumps(as_json(results), indent=1) + "\n")
    if options.figures:
        flags = ["--quick"] * options.quick + [f"--only {name}" for name in options.only or ()]
        command = f'make bench ARGS="{" ".join(flags)}"' if flags else "make bench"
        put_rows("bench", as_rows(results, command, "quick" if options.quick else "full"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
