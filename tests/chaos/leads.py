"""R10, R12 and R17: caps and purses under racing spawns, the store under deaths, and protocol errors."""
from __future__ import annotations

import json
import random
import threading
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

from trial import Outcome, Trial, home_in, let_pass

import test_shared_live
from stage import Caller, Stage, gate, words_of
from test_shared_live import Bridged
from test_subleads import ALLOWED, Tree
from tools import read_events

CAP, BUDGET_USD, SPAWNS, CENT = 8, 1.0, 200, 1e-6
REFUSALS = ("worker cap reached", "tree worker cap reached", "budget exceeded")


# ---- R10: caps and purses

class Books(NamedTuple):
    """What a journal says of a tree: live workers at most, USD spent, by how much the worst estimate was wrong."""
    peak: int
    spent_usd: float
    error_usd: float


def read_books(events: list[dict]) -> Books:
    """Added up from the events alone; an envelope is no cost of its own."""
    live, peak, estimates, costs = set(), 0, {}, {}
    for event in events:
        actor = event.get("actor")
        if event["kind"] == "actor_added":
            estimates[actor] = event.get("estimate", 0.0) if event["role"] == "worker" else None
            live |= {actor} if event["role"] == "worker" else set()
        elif event["kind"] in ("usage", "hand_ended"):
            costs[actor, event["hand"]] = event["cost_usd"] or 0.0
        if event["kind"] in ("place_failed", "spawn_failed", "hand_skipped") or event.get("status"):
            live.discard(actor)
        peak = max(peak, len(live))
    spent = Counter()
    for (actor, _), cost in costs.items():
        spent[actor] += cost
    over = [spent[actor] - usd for actor, usd in estimates.items() if usd is not None]
    return Books(peak, sum(spent.values()), max(over, default=0.0))


def race_spawns(root: Path, number: int) -> Books:
    """Five connections of three layers ask for 200 workers at once, cheap ones or dear ones."""
    home, chance = home_in(root), random.Random(number)
    dear = number % 2 == 1
    run = Tree(home, lead=f"{ALLOWED}max_workers_across_tree = {CAP}", budget=BUDGET_USD, workers=CAP,
               defaults='model = "claude-haiku-4-5"')
    try:
        lead = run.lead()
        one, other = (run.sublead(lead, budget_usd=0.3, max_workers=CAP) for _ in range(2))
        callers = [lead, run.lead(), one[1], other[1], run.worker(one[0], role="sublead")]
        answers, lock = [], threading.Lock()

        def race(caller: Caller, seed: int) -> None:
            own = random.Random(seed)
            for _ in range(4):
                asked = [caller.start("spawn_worker", {"prompt": f"$ print {own.randint(2000, 90000)} 3000"
                                                       if dear else "$ say hi"})
                         for _ in range(SPAWNS // len(callers) // 4)]
                found = [caller.answer(n) for n in asked]
                with lock:
                    answers.extend(found)
                let_pass(own.uniform(0, 0.5))

        threads = [threading.Thread(target=race, args=(caller, chance.random())) for caller in callers]
        [t.start() for t in threads]
        [t.join(120) for t in threads]
        assert len(answers) == SPAWNS, f"{len(answers)} answers"
        refused = {words_of(a).partition(":")[0] for a in answers if a["result"]["isError"]}
        assert refused <= set(REFUSALS), refused
        run.finish(None)
        books = read_books(read_events(run.run))
        assert books.peak <= CAP, f"{books.peak} workers were live"
        assert books.spent_usd <= BUDGET_USD + max(books.error_usd, 0) + CENT, books
        return books
    finally:
        run.end()
        home.end_everything()


def caps_hold(trial: Trial) -> Outcome:
    count = trial.count(20, 2)
    books = trial.rounds(count, race_spawns)
    peak, spent = (max((row[n] for row in books), default=0) for n in (0, 1))
    return Outcome(f"{len(books)} of {count} races of {SPAWNS}: {peak} live at most (cap {CAP}), "
                   f"{spent:.2f} USD spent at most", len(books) == count and peak == CAP)


# ---- R12: the store

def share(root: Path, number: int, calls: int) -> int:
    """16 clients, many of which die while they are answered; how many calls were judged."""
    home = home_in(root)
    run = Stage(home, workers=test_shared_live.WORKERS, run="dump_shared_store = true")
    try:
        test_shared_live.check_run(run, calls, max(300, 2 * calls), dies=0.03 if calls > 500 else 0.1)
        return calls * test_shared_live.CLIENTS
    finally:
        run.end()
        home.end_everything()


def store_is_correct(trial: Trial) -> Outcome:
    calls, lanes = trial.count(2000, 60), trial.lanes
    trial.lanes = 1
    good = trial.rounds(1, lambda root, n: share(root, n, calls))
    trial.lanes = lanes
    return Outcome(f"{test_shared_live.CLIENTS} clients × {calls} operations with deaths, "
                   f"{'0 violations' if good else 'violated'}", bool(good))


# ---- R17: MCP

class Ask(NamedTuple):
    """A line that a lead's client says, and whether an answer is the right one."""
    line: Callable
    is_right: Callable


def call_of(tool: str, arguments: str) -> Callable:
    return lambda number: (f'{{"jsonrpc":"2.0","id":{number},"method":"tools/call",'
                           f'"params":{{"name":"{tool}","arguments":{arguments}}}}}').encode()


def method_of(method: str, params: str = "{}") -> Callable:
    return lambda number: f'{{"jsonrpc":"2.0","id":{number},"method":"{method}","params":{params}}}'.encode()


def is_good(answer: dict) -> bool:
    return answer.get("result", {}).get("isError") is False


def is_refusal(answer: dict) -> bool:
    return answer.get("result", {}).get("isError") is True


def is_fault(*codes: int) -> Callable:
    return lambda answer: answer.get("error", {}).get("code") in codes


ASKS = [
    Ask(method_of("ping"), lambda answer: answer.get("result") == {}),
    Ask(method_of("tools/list"), lambda answer: len(answer["result"]["tools"]) > 10),
    Ask(call_of("kv_set", '{"path":"/shared/x","value":"y"}'), is_good),
    Ask(call_of("kv_get", '{"path":"/shared/x"}'), is_good),
    Ask(call_of("list_workers", "{}"), is_good),
    Ask(call_of("budget_status", "{}"), is_good),
    Ask(call_of("wait_for_worker", '{"task_id":"worker-1","timeout_secs":0.05}'), is_good),
    Ask(call_of("kv_wait", '{"path":"/shared/never","timeout_secs":0.05}'), is_good),
    Ask(call_of("lease_acquire", '{"name":"l","ttl_secs":1}'), is_good),
    Ask(call_of("worker_status", '{"task_id":"nobody"}'), is_refusal),
    Ask(call_of("lease_release", '{"lease_id":"none"}'), is_refusal),
    Ask(call_of("kv_set", '{"path":"/other/x","value":"y"}'), is_refusal),
    Ask(call_of("kv_set", '{"path":7}'), lambda a: is_refusal(a) or is_fault(-32602)(a)),
    Ask(call_of("spawn_worker", '{"promt":"x"}'), lambda a: is_refusal(a) or is_fault(-32602)(a)),
    Ask(call_of("spawn_worker", "[]"), is_fault(-32602)),
    Ask(call_of("no_such_tool", "{}"), is_refusal),
    Ask(method_of("tools/cal"), is_fault(-32601)),
    Ask(method_of("tools/call", "[]"), is_fault(-32602)),
]
ODD_LINES = (b"{", b"nonsense", b"\xff\xfe", b'{"jsonrpc":"2.0"', b"[" * 1000)       # answered with id null


class Talk:
    """One connection of a lead that asks a great deal, and counts what was answered wrongly."""

    def __init__(self, link: Caller, seed: int) -> None:
        self.link, self.chance = link, random.Random(seed)
        self.number, self.wrong = 1000, []

    def batch(self, count: int) -> None:
        """So many lines at once, then all their answers, each once and the right one."""
        asked, odd, lines = {}, 0, []
        for _ in range(count):
            if self.chance.random() < 0.05:
                lines.append(self.chance.choice(ODD_LINES))
                odd += 1
            else:
                self.number += 1
                asked[self.number] = self.chance.choice(ASKS)
                lines.append(asked[self.number].line(self.number))
        self.link.say(*lines)
        while asked or odd:
            answer = self.link.hear()
            assert answer is not None, "the connection was ended"
            if answer.get("id") is None and "error" in answer and odd:
                odd -= 1
            elif answer.get("id") in asked:
                ask = asked.pop(answer["id"])
                if not ask.is_right(answer):
                    self.wrong.append(f"{ask.line(0)!r} was answered {json.dumps(answer)[:200]}")
            elif "method" not in answer:
                self.wrong.append(f"nobody asked for {json.dumps(answer)[:200]}")

    def wait_too_long(self) -> None:
        """A wait that the client gives up and asks for again; the other calls go on."""
        self.number += 1
        self.link.say(call_of("wait_for_worker", '{"task_id":"worker-1"}')(self.number))
        self.batch(5)
        self.link.say({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": self.number}})

    def work(self, count: int) -> int:
        done = 0
        while done < count:
            self.wait_too_long()
            self.batch(min(60, max(1, count - done - 6)))
            done += 66
        return done


def talk_on(root: Path, number: int, calls: int) -> int:
    """A lead with two connections to the socket and two bridges asks and asks; at the end its worker ends."""
    home = home_in(root)
    run = Stage(home)
    try:
        lead, opened = run.lead(), home.root / "workers.gate"
        run.spawn(lead, gate(opened))
        links = [run.lead(), run.lead(), Bridged(run, "boss", "n1"), Bridged(run, "boss", "n2")]
        talks, done, failed = [Talk(link, number * 10 + n) for n, link in enumerate(links)], [], []

        def work(talk: Talk) -> None:
            try:
                done.append(talk.work(calls // len(links)))
            except Exception as error:  # boundary: told by the thread that waits
                failed.append(error)

        threads = [threading.Thread(target=work, args=(talk,)) for talk in talks]
        [t.start() for t in threads]
        [t.join(600) for t in threads]
        wrong = [*map(str, failed), *(fault for talk in talks for fault in talk.wrong)]
        assert not wrong, "; ".join(wrong[:3])
        opened.touch()
        assert lead.call("wait_for_worker", task_id="worker-1")["status"] == "Success"
        [link.close() for link in links[2:]]
        run.finish()
        assert not (run.run / "sockets.log").exists(), (run.run / "sockets.log").read_text()[-1000:]
        return sum(done)
    finally:
        run.end()
        home.end_everything()


def mcp_never_wedges(trial: Trial) -> Outcome:
    calls = trial.count(10_000, 400)
    good = trial.rounds(1, lambda root, n: talk_on(root, n, calls))
    return Outcome(f"{sum(good)} calls, {0 if good else 'some'} protocol errors", bool(good))
