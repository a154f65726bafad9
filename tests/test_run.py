"""A run is the fold of its journal: the same every time, its books right whatever happened.

Two sources of events: journals of real runs (tests/data/journals, made by tests/record_journals.py), and
random histories in which a dispatcher, made of a few lines here, does what is owed, dies, is signalled and
comes back. After each event everything that is kept ready (counts, queues, what is owed) is worked out again
from scratch.
"""
from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from pathlib import Path

import pytest

import pitboss

JOURNALS = sorted((Path(__file__).resolve().parent / "data" / "journals").glob("*.jsonl"))
by_journal = pytest.mark.parametrize("path", JOURNALS, ids=lambda path: path.stem)


def events_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def tables_of(run: pitboss.RunState) -> dict:
    """Everything that a run holds, as a value; `fresh` is a note for a living dispatcher."""
    shared = {k: repr(v) if k != "stores" else {n: vars(store) for n, store in v.items()}
              for k, v in vars(run.shared).items()}
    return {**{k: v for k, v in vars(run).items() if k not in ("fresh", "shared")}, "shared": shared}


# ------------------------------------------------------------------ the books

def owed_from_scratch(run: pitboss.RunState, events: list[dict]) -> set[tuple]:
    """What must still happen, from how every actor stands and what was last told of it."""
    owed = set()
    for name, actor in run.actors.items():
        last = next((e["kind"] for e in reversed(events) if e.get("actor") == name
                     and e["kind"] in ("placed", "hand_dealt", "hand_voided", "hand_held", "hand_skipped",
                                      "hand_ended")), "")
        owed |= {(verb, name) for verb in {
            "waiting": (), "held": (), "placing": ("place",),
            "dealing": ("spawn",) if last == "hand_dealt" else ("deal",),
            "running": ("watch",), "stopping": ("watch", "stop"), "closing": ("close",),
            "paused": (), "frozen": ("watch",), "settled": ()}[actor.state]}
        # until the event that pays for it, whatever else happens meanwhile
        owed |= {(verb, name) for verb, states in (("freeze", ("frozen",)), ("thaw", ("running",)),
                                                   ("deliver", ("running", "stopping", "frozen")))
                 if actor.state in states and (verb, name) in run.owed}
    states = Counter(a.state for a in run.actors.values())
    at_work = sum(states[s] for s in ("placing", "dealing", "running", "stopping", "closing", "paused", "frozen"))
    nothing_starts = run.draining or run.halted or run.cancelled
    may_come = [a for a in run.actors.values() if a.state in ("waiting", "held")
                and getattr(run.holds.get(a.account), "kind", "") != "auth"]
    began = any(e["kind"] == "dispatcher_started" for e in events)
    at_its_end = began and not at_work and (nothing_starts or not may_come) and run.finished_at is None
    if at_its_end and (run.draining != "no_space" or ("finish", "") in run.owed):
        owed.add(("finish",
                  ""))       # where there is no room it is owed at the latest when somebody resumes it
    return owed | notices_from_scratch(run, events)


def notices_from_scratch(run: pitboss.RunState, events: list[dict]) -> set[tuple]:
    """The notifications that no sink has got yet, from what happened."""
    sinks = next((e["sinks"] for e in events if e.get("sinks")), {})
    told = {("run_dispatched", "run_dispatched")} if sinks else set()
    for e in events if sinks else ():
        actor = run.actors.get(e.get("actor", ""))
        if e["kind"] == "closed" and actor.status != "Success" and not is_needless(run, actor):
            told.add(("worker_failed", f"worker_failed:{actor.id}"))
        if e["kind"] in ("run_finished", "budget_exceeded"):
            told.add((e["kind"], e["kind"]))
    ranks = list(pitboss.SEVERITIES)
    owed = {f"{name} {notice}" for name, (wanted, least) in sinks.items() for kind, notice in told
            if kind in (wanted or pitboss.NOTICES)
            and ranks.index(pitboss.NOTICES[kind][0]) >= ranks.index(least)}
    return {("notify", key) for key in owed - {e["notice"] for e in events if e["kind"] == "notified"}}


def may_start(run: pitboss.RunState, account: str) -> bool:
    """Whether an account's hold lets another hand start: none does, but a probe one when none lives."""
    kind = run.holds[account].kind if account in run.holds else ""
    live = sum(pitboss.STATES[a.state].live and a.account == account for a in run.actors.values())
    return not kind or kind == "probe" and not live


def wrong_books(run: pitboss.RunState, events: list[dict]) -> list[str]:
    """What a run keeps ready and does not agree with its actors."""
    actors = run.actors.values()
    live = sum(pitboss.STATES[a.state].live for a in actors)
    free = run.facts.get("max_parallel", 0) - live
    expected = {
        "live": live, "held": sorted(a.id for a in actors if a.state == "held"),
        "live_by": dict(Counter(a.account for a in actors if a.account and pitboss.STATES[a.state].live)),
        "closing": sum(a.state == "closing" for a in actors),
        "failed": sum(bool(a.status) and not pitboss.STATUSES[a.status].good and not is_needless(run, a)
                      for a in actors),
        "waiting": [a.id for a in actors if a.state == "waiting"],
        "settled": sorted(a.id for a in actors if a.state == "settled"),
        "owed": owed_from_scratch(run, events),
        "seq": events[-1]["seq"], "last_at": events[-1]["at"],
    }
    found = {"live": run.live, "held": sorted(run.held), "live_by": {k: n for k, n in run.live_by.items() if n},
             "closing": run.closing, "failed": run.failed, "waiting": list(run.waiting),
             "settled": sorted(run.settled), "owed": set(run.owed), "seq": run.seq, "last_at": run.last_at}
    wrong = [f"{k} is {found[k]}, not {expected[k]}" for k in expected if found[k] != expected[k]]
    startable = [a for a in [*run.held, *run.waiting] if may_start(run, run.actors[a].account)]
    if free > 0 and startable and not (run.draining or run.halted or run.cancelled):
        wrong.append(f"{free} free slots while {startable} wait")
    if run.held and (run.halted or run.cancelled or run.draining not in ("", "no_space")):
        wrong.append(f"{list(run.held)} are held, and nothing more starts")
    wrong += [f"{a} is held by refused credentials" for a in run.held
              if getattr(run.holds.get(run.actors[a].account), "kind", "") == "auth"]
    if live > run.facts.get("max_parallel", 0):
        wrong.append(f"{live} actors hold a slot")
    for lead, layer in run.layers.items():
        workers = [a for a in actors if a.layer == lead and a.role == "worker"]
        ended = [a for a in workers if a.status]
        books = (len(workers) - len(ended), sum(a.estimate for a in workers if not a.status),
                 sum(a.cost_usd or 0.0 for a in ended))
        if max(abs(x - y) for x, y in zip(books, (layer.live, layer.reserved, layer.spent))) > 1e-9:
            wrong.append(f"{lead}: {layer} is not {books}")
        if run.costs[lead] != sorted(a.cost_usd or 0.0 for a in ended if a.hands):
            wrong.append(f"{lead}: {run.costs[lead]}")
        below = [a for a in actors if lead in parents_of(run, a)]
        if run.actors[lead].status and any(pitboss.STATES[a.state].live and not a.stop for a in below):
            wrong.append(f"{lead} has ended, and what is below it goes on")
        found_books, books = pitboss.books_of(run, lead), books_from_scratch(run, lead, events)
        if any(abs(x - y) > 1e-9 for x, y in zip(found_books, books)):
            wrong.append(f"{lead}: {found_books} is not {books}")
    ended = {e["request_id"]: e for e in events if e["kind"] in ("approval_decided", "approval_withdrawn")}
    begun = {e["request_id"]: e for e in events if e["kind"] in ("approval_asked", "approval_decided")}
    if list(run.approvals) != [name for name in begun if name not in ended] or set(run.decided) != set(ended):
        wrong.append(f"waiting: {list(run.approvals)}, decided: {list(run.decided)}")
    for a in actors:
        answers = [e["approved"] for e in ended.values() if e["actor"] == a.id and "approved" in e]
        asked = sum(e["actor"] == a.id for e in begun.values())
        if (a.asked, a.approved, a.rejected) != (asked, sum(answers), len(answers) - sum(answers)):
            wrong.append(f"{a.id}: {a.asked} asked, {a.approved} approved, {a.rejected} rejected")
        if bool(a.refusal) != (not answers[-1] if answers else False):
            wrong.append(f"{a.id}: {a.refusal!r} after {answers}")
        if a.id in run.layers and run.layers[a.id].planned != any(
                e["actor"] == a.id and e.get("approved") and e["form"] == "plan" for e in ended.values()):
            wrong.append(f"{a.id}: {run.layers[a.id]}")
    wrong += [f"{a.id}: a status {a.status!r} in state {a.state}" for a in actors
              if bool(a.status) != (a.state in ("closing", "settled"))]
    wrong += [f"{a.id}: {field} missing" for a in actors for field in ("started_at", "ended_at")
              if a.status and getattr(a, field) is None]
    return wrong


def parents_of(run: pitboss.RunState, actor: pitboss.Actor) -> list[str]:
    """The leads above an actor, the root last."""
    return [actor.parent, *parents_of(run, run.actors[actor.parent])] if actor.parent else []


def is_needless(run: pitboss.RunState, actor: pitboss.Actor) -> bool:
    """Whether an actor was cancelled because a lead above it had succeeded without it: the first that ended."""
    ended = [a for a in map(run.actors.get, reversed(parents_of(run, actor))) if a.status]
    return actor.stop == "lead_ended" and min(ended, key=lambda a: a.ended_at).status == "Success"


def books_from_scratch(run: pitboss.RunState, lead: str, events: list[dict]) -> tuple:
    """What a purse has, from what each actor was given and has used: budget, spent, reserved, live, most."""
    given = {e["actor"]: e for e in events if e["kind"] == "actor_added"}
    root = next(iter(run.layers))

    def purse_of(name: str) -> str:
        name = name if name in run.layers else run.actors[name].parent
        return root if given[name].get("read_down") else name

    purse, spent, reserved, live = purse_of(lead), 0.0, 0.0, 0
    for name, actor in run.actors.items():
        workers = [a for a in run.actors.values() if a.parent == name and a.role == "worker"]
        used = (actor.cost_usd or 0.0) + actor.hand_usd
        if purse_of(name) == purse and actor.role == "worker":
            spent, reserved = spent + (used if actor.status else 0.0), reserved + (0.0 if actor.status else actor.estimate)
            live += not actor.status
        elif purse_of(name) == purse:
            spent += used
        elif purse == root and actor.role == "sublead":
            used += sum(a.cost_usd or 0.0 for a in workers if a.status)
            envelope = given[name]["budget_usd"]
            over = bool(actor.status) and all(a.status for a in workers)
            reserved += 0.0 if over else envelope
            spent += used if over else max(0.0, used - envelope)
    return given[purse]["budget_usd"], spent, reserved, live, given[purse]["max_workers"]


@by_journal
def test_the_books_are_right_after_every_event(path):
    run, events = pitboss.RunState(), events_of(path)
    for n, event in enumerate(events, 1):
        pitboss.step(run, event)
        assert wrong_books(run, events[:n]) == [], event
    assert run.owed == {} and run.finished_at is not None and not run.live


@by_journal
def test_the_same_journal_makes_the_same_run(path):
    events = events_of(path)
    before = json.dumps(events)
    once, twice = pitboss.fold(events), pitboss.RunState()
    for event in events:
        pitboss.step(twice, event)
    assert tables_of(once) == tables_of(twice) and once.fresh == []
    assert json.dumps(events) == before, "an event is never changed"


@by_journal
def test_a_fold_may_stop_and_go_on_anywhere(path):
    """A run that was folded up to some event and went on is the run that was folded in one go."""
    events = events_of(path)
    for cut in range(1, len(events)):
        run = pitboss.fold(events[:cut])
        for event in events[cut:]:
            pitboss.step(run, event)
        assert tables_of(run) == tables_of(pitboss.fold(events))


@by_journal
def test_what_a_newer_version_adds_changes_nothing(path):
    events = events_of(path)
    richer = []
    for event in events:
        richer.append({**event, "from_the_future": {"x": [1]}})
        richer.append({"seq": event["seq"], "at": event["at"], "kind": "hand_blessed",
                       "actor": event.get("actor"), "by": "x"})
    run, plain = pitboss.fold(richer), pitboss.fold(events)
    assert run.facts.pop("from_the_future") == {"x": [1]}
    assert tables_of(run) == tables_of(plain)


def test_a_newer_format_is_refused_and_says_what_to_do():
    opened = events_of(JOURNALS[0])[0]
    with pytest.raises(pitboss.JournalError) as error:
        pitboss.fold([{**opened, "format": pitboss.JOURNAL_FORMAT + 1}])
    assert str(pitboss.JOURNAL_FORMAT + 1) in str(error.value) and "newer" in error.value.hint
    assert pitboss.fold([{**opened, "format": pitboss.JOURNAL_FORMAT}]).run_id == opened["run_id"]


def test_the_recorded_journals_show_every_kind_of_event_and_end():
    events = [e for path in JOURNALS for e in events_of(path)]
    assert {e["kind"] for e in events} == set(pitboss.EVENTS)
    assert {e["status"] for e in events if e.get("status")} | {"SpawnFailed"} == set(pitboss.STATUSES)
    assert {e["cause"] for e in events if e.get("again")} >= {"lost", "limit"}
    assert {e["hold"] for e in events if e["kind"] == "hold_began"} >= {"limit", "auth"}


@by_journal
def test_records_and_summaries_of_a_journal_are_whole(path):
    run = pitboss.fold(events_of(path))
    records = [pitboss.record_of(run, run.actors[name], f"/logs/{name}") for name in run.settled]
    for record in records:
        assert record["status"] in pitboss.STATUSES and record["ended_at"].endswith("Z")
        assert record["duration_ms"] >= 0 and record["log_path"] == f"/logs/{record['task_id']}"
        assert record["failure_reason"] is None or record["status"] != "Success"
    summary = pitboss.summary_of(run, records, {}, run.finished_at)
    assert summary["tasks_total"] == len(run.actors) == len(records) + summary["tasks_not_started"]
    assert summary["tasks_failed"] == sum(r["status"] != "Success" for r in records
                                          if not is_needless(run, run.actors[r["task_id"]]))
    json.dumps(summary, allow_nan=False)


EXIT_OF = {"plain": "failed", "crashed": "ok", "stopped": "interrupted", "cancelled": "failed",
           "halted": "failed", "limited": "ok", "told": "ok", "refused": "failed",
           "led": "failed", "tree": "failed", "heard": "failed", "approved": "failed"}


@by_journal
def test_the_exit_code_of_a_journal(path):
    assert pitboss.exit_code_of(pitboss.fold(events_of(path))) == EXIT_OF[path.stem]


# ------------------------------------------------------------------ random histories

class History:
    """A run and the simplest dispatcher that there can be: it does a thing that is owed, or is disturbed."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.run, self.events, self.dealt, self.at = pitboss.RunState(), [], set(), 1000.0
        self.led = self.chance.random() < 0.4
        self.record("run_opened", format=1, run_id="r", name="n", mode="hierarchical" if self.led else "flat",
                    max_parallel=99 if self.led else self.chance.randrange(1, 4),
                    halt_on_failure=self.chance.random() < 0.2, worktree_cleanup="on_success",
                    keep_children=False, **({"max_subleads": 3, "max_sublead_budget_usd": 1.5,
                                             "max_workers_across_tree": 5} if self.led else {}))
        if self.led:
            self.record("actor_added", actor="boss", role="lead", agent="demo", model="m", directory="/d",
                        timeout_s=60, use_worktree=False, branch=None, layer="boss", budget_usd=4.0, max_workers=3)
        for n in range(0 if self.led else self.chance.randrange(1, 7)):
            self.record("actor_added", actor=f"t{n}", role="task", agent="demo", model="m", directory="/d",
                        timeout_s=60,
                        use_worktree=self.chance.random() < 0.5, branch=None,
                        account=self.chance.choice(("", "x", "x", "y")))
        self.record("dispatcher_started", pid=1)

    def record(self, kind: str, **facts) -> None:
        self.at += self.chance.random()
        event = json.loads(json.dumps({"seq": len(self.events) + 1, "at": self.at, "kind": kind, **facts}))
        self.events.append(event)
        pitboss.step(self.run, event)
        wrong = wrong_books(self.run, self.events)
        assert wrong == [], [e["kind"] + " " + e.get("actor", "") for e in self.events] + wrong

    def go_on(self) -> None:
        """One more event: mostly something that is owed has happened."""
        if self.chance.random() < (0.1 if self.run.owed else 0.8) and self.pass_time():
            return
        if self.run.owed and self.chance.random() < 0.8:
            verb, actor = self.chance.choice(list(self.run.owed))
            getattr(self, f"do_{verb}")(actor)
        else:
            led = (self.disturb_spawn, self.disturb_spawn, self.disturb_worker, self.disturb_worker,
                   self.disturb_sublead) if self.led else ()
            self.chance.choice((self.disturb_restart, self.disturb_usage, self.disturb_time,
                                self.disturb_drain,
                                self.disturb_cancel, self.disturb_usage, self.disturb_hold,
                                self.disturb_account, self.disturb_usage, *led, *led))()

    def do_freeze(self, name: str) -> None:
        self.record("frozen", actor=name)

    def do_thaw(self, name: str) -> None:
        self.record("thawed", actor=name)

    def do_deliver(self, name: str) -> None:
        actor = self.run.actors[name]
        if actor.state == "running" and self.chance.random() < 0.5:
            return self.record("stop_decided", actor=name, why="redirect")
        self.record("delivered", actor=name, ids=[m.id for m in actor.inbox])

    def disturb_spawn(self) -> None:
        lead = self.chance.choice(list(self.run.layers))
        with contextlib.suppress(pitboss.ToolRefusal):
            estimate = pitboss.decide_spawn(self.run, lead, "sonnet")
            self.record("actor_added", actor=f"w{len(self.run.actors)}", role="worker", agent="demo", model="m",
                        directory="/d", timeout_s=60, use_worktree=self.chance.random() < 0.5, branch=None,
                        layer=lead, parent=lead, estimate=estimate, call=f"{lead}/n/{len(self.events)}",
                        answer={"task_id": "w"})
            self.check_caps()

    def disturb_sublead(self) -> None:
        down, budget = self.chance.random() < 0.4, self.chance.choice((0.3, 1.0, 1.5, 1.6))
        with contextlib.suppress(pitboss.ToolRefusal):
            envelope = pitboss.decide_sublead(self.run, "boss", None if down else budget)
            name = f"s{len(self.run.actors)}"
            self.record("actor_added", actor=name, role="sublead", agent="demo", model="m", directory="/d",
                        timeout_s=60, use_worktree=self.chance.random() < 0.5, branch=None, layer=name, parent="boss",
                        estimate=envelope, read_down=down, budget_usd=None if down else budget,
                        max_workers=0 if down else 2, call=f"boss/n/{len(self.events)}", answer={"sublead_id": name})
            self.check_caps()

    def check_caps(self) -> None:
        """What was just added had room."""
        live = [a for a in self.run.actors.values() if a.role == "worker" and not a.status]
        assert len(live) <= 5 and len(self.run.layers) <= 4
        for lead in self.run.layers:
            budget, spent, reserved, there, most = books_from_scratch(self.run, lead, self.events)
            assert there <= most and (there == 0 or lead != self.run.actors[self.events[-1]["actor"]].parent
                                      or spent + reserved <= budget + 1e-9)

    def disturb_worker(self) -> None:
        """A lead or an operator wants something of an actor: refused, or recorded."""
        actor = self.run.actors[self.chance.choice(list(self.run.actors))]
        message = pitboss.Message(f"m{len(self.events)}", "words", True)
        with contextlib.suppress(pitboss.ToolRefusal):
            kind, facts = self.chance.choice((
                lambda: ("pause_decided", pitboss.decide_pause(actor, "cancel")),
                lambda: ("pause_decided", pitboss.decide_pause(actor, "freeze")),
                lambda: ("continue_decided", pitboss.decide_continue(actor, None)),
                lambda: ("continue_decided", pitboss.decide_continue(actor, message)),
                lambda: ("reprompted", pitboss.decide_reprompt(actor, message)),
                lambda: ("stop_decided", pitboss.decide_stop(actor, "enough", False, message if actor.parent
                                                             else None))))()
            self.record(kind, **facts)

    def do_place(self, name: str) -> None:
        if self.chance.random() < 0.1:
            return self.record("place_failed", actor=name, message="no")
        self.record("placed", actor=name,
                    place={"path": "/w", "cwd": "/w", "branch": "b", "base": "c", "made": True,
                                                 "repo": "/r", "directory": "/d"})

    def do_deal(self, name: str) -> None:
        actor = self.run.actors[name]
        if actor.stop:
            return self.record("hand_skipped", actor=name)
        self.dealt.add((name, actor.hand + 1))
        self.record("hand_dealt", actor=name, hand=actor.hand + 1, how=actor.how, message_id="u", log_at=0,
                    session_id="s", carried=len(actor.inbox))

    def do_spawn(self, name: str) -> None:
        actor = self.run.actors[name]
        if (name, actor.hand) not in self.dealt and self.chance.random() < 0.5:
            return self.record("hand_voided", actor=name, hand=actor.hand)
        if (name, actor.hand) in self.dealt and actor.stop:
            return self.record("hand_skipped", actor=name)
        if (name, actor.hand) in self.dealt and not pitboss.may_start(self.run, actor.account, own=1):
            return self.record("hand_held", actor=name)
        if self.chance.random() < 0.1:
            return self.record("spawn_failed", actor=name, hand=actor.hand, message="no")
        self.record("hand_started", actor=name, hand=actor.hand, handle={"pid": 7})

    def do_watch(self, name: str) -> None:
        actor, talk = self.run.actors[name], pitboss.Talk()
        talk.began = self.chance.random() < 0.8
        talk.result = self.chance.choice((None, {"is_error": False}, {"is_error": True}))
        if not talk.result or talk.result["is_error"]:
            talk.error = self.chance.choice(("", "rate_limit", "rate_limit", "authentication_failed"))
            talk.resets_at = self.chance.choice((None, self.at + 5, self.at - 5))
        talk.answers = self.chance.randrange(2)
        end = self.chance.choice((pitboss.Ending(0), pitboss.Ending(1), pitboss.Ending(None, 9),
                                  pitboss.Ending(None, vanished=True)))
        facts = pitboss.decide_hand_end(actor, talk, end, self.at)
        hold = pitboss.decide_hold(self.run, actor, talk, facts.get("reason"), self.at, self.chance.random())
        if hold:
            self.record("hold_began", **hold)
        self.record("hand_ended", actor=name, hand=actor.hand, code=end.code, signal=end.signal,
                    usage=[1, 2, 0, 0],
                    cost_usd=0.5, session_id="s", final=None, log_at=9, lived_s=1.0, skipped=0, **facts)

    do_stop = do_watch

    def do_close(self, name: str) -> None:
        self.record("closed", actor=name, leftovers=[], path=None, branch=None, rescue_ref=None, kept=None,
                    restore=None)

    def do_finish(self, _: str) -> None:
        self.record("run_finished", ended_at=self.at, tasks_total=len(self.run.actors),
                    tasks_failed=self.run.failed)

    def disturb_restart(self) -> None:
        self.dealt.clear()
        self.record("dispatcher_started", pid=2)

    def pass_time(self) -> bool:
        """The first hold that time ends, ends; one that waits for an answer gets it.  False: there is none."""
        for hold in list(self.run.holds.values()):
            ended = pitboss.decide_hold_end(hold, self.at + 20000)
            if hold.kind == "probe":
                ended = "hold_ended", {"account": hold.account, "why": "answered"}
            if ended:
                self.record(ended[0], **ended[1])
                return True
        return False

    def disturb_hold(self) -> None:
        """Another run told of an account."""
        told = pitboss.Health(self.chance.choice("xy"), self.chance.choice(("ok", "limit", "auth")), self.at,
                              self.at + 9, True, 1, "another")
        event = pitboss.decide_told(self.run, told, self.at)
        if event:
            self.record(event[0], **event[1])

    def disturb_account(self) -> None:
        name = self.chance.choice(list(self.run.actors))
        if self.run.actors[name].state != "settled":
            self.record("account_changed", actor=name, account=self.chance.choice("xy"))

    def running(self) -> list[str]:
        return [a.id for a in self.run.actors.values() if a.state == "running"]

    def disturb_usage(self) -> None:
        for name in self.running()[:1]:
            self.record("usage", actor=name, hand=1, usage=[1, 1, 1, 1], cost_usd=0.25, log_at=1)

    def disturb_time(self) -> None:
        for name in self.running()[:1]:
            why = self.chance.choice(("timeout", "linger"))
            self.record("stop_decided", actor=name, why=why, done=why == "linger")

    def disturb_drain(self) -> None:
        why = self.chance.choice(("signal", "no_space"))
        if not self.run.draining:
            self.record("drained", why=why, **({"signal": "INT"} if why == "signal" else {}))

    def disturb_cancel(self) -> None:
        if not self.run.cancelled:
            self.record("cancelled", why="operator", reason="words", done=self.running()[:1])


@pytest.mark.parametrize("seed", range(8))
def test_random_histories_keep_their_books(seed):
    """Whatever happens in whatever order, every run comes to an end at which nothing is owed."""
    for number in range(60):
        history = History(seed * 1000 + number)
        for _ in range(400):
            if history.run.finished_at is not None:
                break
            history.go_on()
        else:
            raise AssertionError(f"{history.run.owed} is still owed after 400 events")
        assert history.run.owed == {}
        if history.led:                # all that was spent is booked on the root, and nothing is reserved
            books, actors = pitboss.books_of(history.run, "boss"), history.run.actors.values()
            assert books.reserved_usd == books.workers_live == 0
            assert abs(books.spent_usd - sum(a.cost_usd or 0.0 for a in actors)) < 1e-9
        assert tables_of(pitboss.fold(history.events)) == tables_of(history.run)


def test_a_cancelled_run_deals_nothing_more():
    for number in range(300):
        history = History(number)
        for _ in range(history.chance.randrange(30)):
            history.go_on()
        if history.run.finished_at is not None:
            continue
        if not history.run.cancelled:
            history.record("cancelled", why="operator", reason="", done=[])
        began = len(history.events)
        while history.run.finished_at is None:
            verb, actor = history.chance.choice(list(history.run.owed) or [("", "")])
            if not verb:
                history.disturb_restart()        # it drained for want of room: somebody takes it over
                continue
            getattr(history, f"do_{verb}")(actor)
        assert "hand_dealt" not in {e["kind"] for e in history.events[began:]}, number


# ------------------------------------------------------------------ size

def test_a_hundred_thousand_events_fold():
    """Many actors, many hands: nothing is left over in the tables, and every actor has its record."""
    def history():
        yield {"kind": "run_opened", "format": 1, "run_id": "r", "name": "n", "mode": "flat",
               "max_parallel": 8}
        names = [f"t{n}" for n in range(2000)]
        for name in names:
            yield {"kind": "actor_added", "actor": name, "role": "task", "agent": "demo", "model": "m",
                   "directory": "/d",
                   "use_worktree": False, "timeout_s": 60, "branch": None}
        yield {"kind": "dispatcher_started", "pid": 1}
        for name in names:
            yield {"kind": "hand_dealt", "actor": name, "hand": 1, "how": "prompt", "message_id": "u",
                   "log_at": 0, "session_id": "s"}
            yield {"kind": "hand_started", "actor": name, "hand": 1, "handle": {"pid": 7}}
            for n in range(45):
                yield {"kind": "usage", "actor": name, "hand": 1, "usage": [n, n, 0, 0], "cost_usd": 0.1}
            yield {"kind": "hand_ended", "actor": name, "hand": 1, "code": 0, "usage": [50, 50, 0, 0],
                   "cost_usd": 0.5,
                   "lived_s": 1.0, "status": "Success"}
            yield {"kind": "closed", "actor": name}
        yield {"kind": "run_finished", "ended_at": 9.0}
    events = [{"seq": n, "at": float(n), **e} for n, e in enumerate(history(), 1)]
    assert len(events) > 100_000
    run = pitboss.fold(events)
    assert len(run.settled) == 2000 and run.live == run.closing == run.failed == 0
    assert run.owed == {} and run.waiting == {} and run.fresh == []
    assert wrong_books(run, events[-1:]) == []
    assert sum(sum(a.usage) for a in run.actors.values()) == 2000 * 100
