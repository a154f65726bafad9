"""Everything at once: a tree with plans, an approval, a limit and a cancel, whose dispatcher dies twice.

The scripted agents call through bridges of their own; the verdict comes from the records, the journal's lines and what
the agents were told.
"""
from __future__ import annotations

import json
import signal
from collections import Counter

import pytest

import checker
import tree_checker
from stage import DEADLINE_S, gate
from test_subleads import MODEL, call, tree  # noqa: F401 (a fixture)
from tools import read_records, wait_for

WORKERS = 3
RULES = '[[approval_policy]]\nmatch = { actor = "boss→sublead-*", category = "plan" }\naction = "auto_approve"\n'
ENVELOPE_USD = 3.0


def sublead_script(letter: str, gates, more: list[str]) -> str:
    """A plan, three workers, something more, and a wait for each worker."""
    workers = [f"$ print 4000 500\n{gate(gates / f'{letter}{n}')}\n$ say done" for n in range(WORKERS)]
    spawned = [n + 2 for n in range(WORKERS)]             # the numbers of the calls
    return "\n".join([call("propose_plan", plan={"summary": f"What {letter} does", "risks": ["few"]}),
                      *(call("spawn_worker", prompt=script) for script in workers), *more,
                      *(call("wait_for_worker", task_id=f"<<{n}.task_id>>") for n in spawned), f"$ say {letter} is done"])


def root_script(gates) -> str:
    limit = {"a": [gate(gates / "limit"), "$ limit 1.5 1"], "b": []}
    return "\n".join([
        call("propose_plan", plan={"summary": "The whole", "risks": ["many"], "rollback": "none"}),
        *(call("spawn_sublead", prompt=sublead_script(letter, gates, limit[letter]), model=MODEL,
               budget_usd=ENVELOPE_USD, max_workers=WORKERS) for letter in "ab"),
        call("request_approval", summary="Merge it"),
        call("wait_actor", actor_id="<2.sublead_id>"), call("wait_actor", actor_id="<3.sublead_id>"),
        call("budget_status"), "$ say the tree is done"])


class Play:
    """The run, and what an operator does to it."""

    def __init__(self, run, home) -> None:
        self.run, self.home = run, home

    def kill_and_resume(self, meanwhile=lambda: None) -> None:
        self.run.process.send_signal(signal.SIGKILL)
        self.run.process.wait(DEADLINE_S)
        meanwhile()
        before = len(self.run.events("dispatcher_started"))
        self.run.process = self.home.start("resume", self.run.run.name, stdout=self.run.log, stderr=self.run.log)
        wait_for(lambda: len(self.run.events("dispatcher_started")) > before, DEADLINE_S, "the next dispatcher")

    def asked(self, summary: str) -> str:
        """The id of a request, when it is there."""
        return wait_for(lambda: self.run.events("approval_asked", summary=summary), DEADLINE_S, summary)[0]["request_id"]


def check_approvals(run) -> list[str]:
    """Every request has one decision, of whom it should be, and its asker was told that."""
    decided = run.events("approval_decided")
    faults = [f"{n} decisions of {name}" for name, n in Counter(e["request_id"] for e in decided).items() if n != 1]
    by = Counter((e["actor"], e["by"]) for e in decided)
    want = Counter({("boss", "operator"): 1, ("boss", "file"): 1, ("sublead-1", "policy"): 1, ("sublead-2", "policy"): 1})
    faults += [] if by == want else [f"decided: {dict(by)}"]
    waited = [e["request_id"] for e in run.events("approval_asked")]
    faults += [f"never decided: {name}" for name in waited if name not in {e["request_id"] for e in decided}]
    for actor in ("boss", "sublead-1", "sublead-2"):
        told = [c.result for c in tree_checker.calls_of(run.run, actor) if c.tool in ("propose_plan", "request_approval")]
        journal = [e["answer"] for e in decided if e["actor"] == actor]
        faults += [] if told == journal else [f"{actor} was told {told}, the journal has {journal}"]
    return faults


def check_envelopes(run) -> list[str]:
    """What the root was told of its sub-leads is what their layers' records cost, and the rest came back."""
    records, faults = {r["task_id"]: r for r in read_records(run.run)}, []
    calls = [c for c in tree_checker.calls_of(run.run, "boss")]
    for told in (c.result["Sublead"] for c in calls if c.tool == "wait_actor"):
        name = told["sublead_id"]
        spent = sum(r["cost_usd"] or 0 for r in records.values() if name in (r["task_id"], r["parent_task_id"]))
        if abs(told["spent_usd"] - spent) > 1e-9 or abs(told["unspent_usd"] + spent - ENVELOPE_USD) > 1e-9:
            faults.append(f"{name}: told {told['spent_usd']} spent and {told['unspent_usd']} not, records: {spent}")
    books = calls[-1].result
    if books["reserved_usd"] or books["workers_live"] or not books["spent_usd"]:
        faults.append(f"at the end: {books}")
    return faults


@pytest.mark.slow
def test_a_tree_with_everything_at_once_ends_with_exact_books(tree, home):  # noqa: F811
    gates = home.root / "gates"
    gates.mkdir()
    run = tree(script=root_script(gates), run="require_plan_approval = true", budget=8.0, more=RULES)
    play = Play(run, home)
    plan = play.asked("The whole")
    assert not run.events("actor_added", role="sublead"), "no plan, no spawn"
    play.kill_and_resume()                                 # while the plan waits
    home.pitboss("approve", run.run.name, plan, check=0)
    merge = play.asked("Merge it")
    wait_for(lambda: len(run.events("hand_started")) == 3 + 2 * WORKERS, DEADLINE_S, "everybody")
    below = {lead: [e["actor"] for e in run.events("actor_added", parent=lead)] for lead in ("sublead-1", "sublead-2")}
    victim = below["sublead-2"][2]
    home.pitboss("cancel", run.run.name, victim, "--reason", "no more of that", check=0)
    (gates / "a0").touch()
    (gates / "limit").touch()
    wait_for(lambda: run.events("hold_began"), DEADLINE_S, "the limit")

    def answer_meanwhile() -> None:
        path = run.run / "approvals" / f"{merge}.json"
        path.with_suffix(".new").write_text('{"approved": true, "comment": "while nobody was there"}')
        path.with_suffix(".new").rename(path)

    play.kill_and_resume(answer_meanwhile)                 # in the hold
    for letter in "ab":
        for n in range(WORKERS):
            (gates / f"{letter}{n}").touch()
    records = run.settle(1)
    assert len(records) == 3 + 2 * WORKERS
    assert {name: r["status"] for name, r in records.items() if r["status"] != "Success"} == {victim: "Cancelled"}
    assert {name: r["hands"] for name, r in records.items() if r["hands"] != 1} == {"sublead-1": 2}
    assert [e["cause"] for e in run.events("hand_ended", actor="sublead-1") if e.get("again")] == ["limit"]
    counted = {name: (r["approvals_requested"], r["approvals_approved"]) for name, r in records.items()
               if r["approvals_requested"]}
    assert counted == {"boss": (2, 2), "sublead-1": (1, 1), "sublead-2": (1, 1)}
    assert check_approvals(run) == [] and check_envelopes(run) == []
    assert [*tree_checker.check_money(run.run), *tree_checker.check_keys(run.run), *checker.check_journal(run.run),
            *checker.check_records(run.run, list(records)), *checker.check_processes(run.run.name)] == []
    spent = sum(e["cost_usd"] for e in run.events("hand_ended"))
    assert abs(json.loads((run.run / "summary.json").read_text())["total_cost_usd"] - spent) < 1e-9 and spent > 0
