"""R11, R13, R14 and R15: what agents print, how much of it, and how many of them there are."""
from __future__ import annotations

import contextlib
import json
import random
import subprocess
from pathlib import Path

from trial import Outcome, Trial, home_in

import pitboss
import test_shared_live
import test_stream_usage as usages
from stage import Stage
from test_wire import strange_line
from tools import Home, program, read_records, wait_for

program()          # compiled before the benchmark's module asks for the plain file
import bench  # noqa: E402

MB = 1_000_000


# ---- R11: costs

def error_of_stream(chance: random.Random) -> float:
    """How wrong the cost or the tokens of an actor are, over hands with sub-agents, results and none."""
    events, want, cost = [], [0, 0, 0, 0], 0.0
    for hand in range(1, chance.randint(2, 5)):
        lines = usages.random_stream(chance)
        talk, truth = usages.fold(lines), usages.look_at(lines)
        want, cost = [a + b for a, b in zip(want, truth.usage)], cost + truth.cost_usd
        told = {"usage": list(talk.usage()), "cost_usd": talk.cost_usd(), "hand": hand}
        if chance.random() < 0.5:
            half = usages.fold(lines[:len(lines) // 2])
            events.append({**usages.told(tuple(half.usage()), half.cost_usd()), "hand": hand})
        events.append({**usages.ended((0, 0, 0, 0), 0.0, again="resume", cause="lost"), **told})
        events += [{**usages.DEALT, "hand": hand + 1}, {**usages.STARTED, "hand": hand + 1}]
    run = usages.play(*events)
    record = pitboss.record_of(run, run.actors["a"], "log")
    wrong = [abs(a - b) for a, b in zip(record["token_usage"].values(), want)]
    return max(*wrong, abs((record["cost_usd"] or 0.0) - cost))


def costs_add_up(trial: Trial) -> Outcome:
    count = trial.count(500)
    errors = [error_of_stream(random.Random(trial.first + n)) for n in range(count)]
    bad = [(trial.first + n, error) for n, error in enumerate(errors) if error > 1e-9]
    trial.faults += [f"stream {n}: wrong by {error}" for n, error in bad]
    return Outcome(f"{count} streams of several hands, error {max(errors):.0e}" if bad else
                   f"{count} streams of several hands, error 0", not bad)


# ---- R13: bad bytes

def bad_output(chance: random.Random, count: int) -> bytes:
    """Lines as an agent should not print them: pieces, accidents in good ones, bytes, nothing."""
    good = [json.dumps(e).encode() for e in usages.random_stream(chance)] or [b"{}"]
    lines = []
    for _ in range(count):
        kind = chance.random()
        line = strange_line(chance) if kind < 0.4 else bytearray(chance.choice(good))
        if 0.4 <= kind < 0.9:
            for _ in range(chance.randint(0, 3)):
                line[chance.randrange(len(line))] = chance.randrange(256)
        lines.append(bytes(line) if kind < 0.9 else chance.randbytes(chance.randint(0, 300)))
    return b"\n".join(lines)             # its last line has no end


def print_badly(root: Path, number: int, lines: int) -> int:
    """Agents of two formats print bad bytes; every byte is in the log, and the run comes to its end."""
    home, chance, sent = home_in(root), random.Random(number), {}
    text = "[run]\nmax_parallel = 4\n"
    for n, form in enumerate(("claude", "text", "claude", "text")):
        path = home.root / f"bytes{n}"
        path.write_bytes(bad_output(chance, lines // 4))
        sent[f"t{n}"] = path
        text += (f"[agent.a{n}]\ncommand = ['cat', '{path}']\nformat = '{form}'\n[[task]]\nid = 't{n}'\n"
                 f"agent = 'a{n}'\ndirectory = '{home.root}'\nuse_worktree = false\nprompt = 'x'\n")
    try:
        done = home.pitboss("dispatch", "-v", home.manifest(text), timeout=300)
        said = done.stdout + done.stderr
        assert done.returncode in (0, 1) and "Traceback" not in said and "bug in" not in said, said[-1500:]
        run_dir = home.run_dir()
        assert len(read_records(run_dir)) == 4
        for name, path in sent.items():
            log = (run_dir / "tasks" / name / "stdout.log").read_bytes()
            assert log == path.read_bytes(), f"the log of {name} has {len(log)} bytes"
        for args in (["status", run_dir.name], ["attach", run_dir.name, "t0"], ["status", run_dir.name, "--json"]):
            assert "Traceback" not in home.pitboss(*args, check=0).stderr
        return lines
    finally:
        home.end_everything()


def fold_badly(chance: random.Random, lines: int) -> int:
    """The same lines for the reader of every format there is."""
    for form in pitboss.FORMATS:
        talk = pitboss.Talk("m")
        for line in bad_output(chance, lines).split(b"\n"):
            pitboss.fold_line(talk, line, form)
        json.dumps([list(talk.usage()), talk.cost_usd(), talk.session_id, talk.last_text()], allow_nan=False)
    return lines * len(pitboss.FORMATS)


def talk_badly(root: Path, number: int, lines: int) -> int:
    """Strange lines to both sockets of a run, in the place of an actor, of an operator and of nobody."""
    run = Stage(home_in(root))
    try:
        ping = {"jsonrpc": "2.0", "method": "ping"}
        test_shared_live.talk_nonsense(run.lead(), lines // 2, test_shared_live.strange_call, ping)
        test_shared_live.talk_nonsense(run.operator(), lines // 2, test_shared_live.strange_op,
                                       {"op": "list_workers"})
        test_shared_live.knock(run, max(4, lines // 100))
        run.operator().op("cancel_run")
        run.settle(None)
        assert not (run.run / "sockets.log").exists(), (run.run / "sockets.log").read_text()[-1500:]
        return lines
    finally:
        run.end()
        run.home.end_everything()


def bad_bytes_harm_nobody(trial: Trial) -> Outcome:
    lines = trial.count(50_000, 400) // 4
    plays = (lambda root, n: print_badly(root, n, lines), lambda root, n: talk_badly(root, n, lines),
             lambda root, n: fold_badly(random.Random(n), lines // len(pitboss.FORMATS)),
             lambda root, n: print_badly(root, n, lines))
    done = trial.rounds(len(plays), lambda root, n: plays[n % len(plays)](root, n))
    return Outcome(f"{sum(done)} lines, {len(trial.faults)} crashes; log bytes = bytes sent",
                   len(done) == len(plays))


# ---- R14: memory

def write_long_log(path: Path, size: int) -> int:
    """A line of 20 MB, or of what fits into the first tenth, then lines as claude prints them; how many bytes."""
    long = min(20 * MB, size // 12)
    bench.write_log(path, size - long)
    rest = path.read_bytes()
    with path.open("wb") as file:
        file.write(json.dumps({"type": "user", "message": {"content": "x" * long}}).encode() + b"\n")
        file.write(rest)
    return path.stat().st_size


def memory_stays_flat(trial: Trial) -> Outcome:
    agents, size = 16, trial.count(250 * MB, 12 * MB)
    home = home_in(trial.root)
    try:
        log = home.root / "log.jsonl"
        total = agents * write_long_log(log, size)
        cat = f'[agent.cat]\ncommand = ["cat", "{log}"]\nformat = "claude"\n'
        seen = bench.watch_dispatch(home, bench.prepare(home, bench.manifest_of(cat, ["cat"] * agents, agents)), total)
    finally:
        home.end_everything()
    grown, is_short = seen.late_mb - seen.early_mb, size < 200 * MB      # its buffers fill at first
    return Outcome(f"{agents} agents x {total / agents / MB:.0f} MB: {seen.peak_mb:.0f} MB at most, "
                   f"{grown:+.1f} MB after the first tenth" + " (too short to tell)" * is_short,
                   seen.peak_mb < 80 and (grown < 3 or is_short))


# ---- R15: many agents

def cpu_of_run(home: Home, tasks: int) -> float:
    """CPU seconds of a dispatcher that deals so many agents that do nothing, 32 at a time."""
    text = bench.manifest_of(bench.NOOP, ["noop"] * tasks, cap=32)
    process = home.start("dispatch", "-q", bench.prepare(home, text), **bench.QUIET)
    wait_for(lambda: bench.has_ended(process.pid), 300, "the run")
    spent = bench.cpu_of(process.pid)
    assert process.wait() == 0, "a task failed"
    return spent


def idle_share(home: Home, seconds: float) -> float:
    """Per cent of a core that 32 silent agents cost."""
    text = bench.manifest_of(bench.SLEEPER, ["sleeper"] * 32, cap=32)
    process, _ = bench.start_and_wait(home, text, "hand_started", 32)
    before = bench.cpu_of(process.pid)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    spent = bench.cpu_of(process.pid) - before
    process.kill()
    process.wait()
    return 100 * spent / seconds


def one_box_is_enough(trial: Trial) -> Outcome:
    tasks, home, rounds = trial.count(500, 100), home_in(trial.root), 3
    try:
        slopes = sorted((cpu_of_run(home, tasks) - cpu_of_run(home, tasks // 5)) / (tasks - tasks // 5) * 1e3
                        for _ in range(rounds))
        idle = idle_share(home, max(20.0, 60 * trial.scale))
    finally:
        home.end_everything()
    return Outcome(f"{tasks} agents, cap 32: {slopes[rounds // 2]:.1f} ms CPU a task (median of {rounds}); "
                   f"idle {idle:.2f} % of a core", slopes[rounds // 2] <= 3 and idle < 0.5)
