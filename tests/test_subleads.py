"""Sub-leads, from outside: their purses, pools and stores, who may act on whom, and what ends with whom.

As in test_lead.py the scripted leads wait and the test acts in their places; where the dispatcher dies, the
scripts call through bridges of their own.
"""
from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from stage import DEADLINE_S, Caller, Stage, gate, value_of, words_of
from test_crash import FAULTS, state_of
from test_lead import shape_faults
from tools import PYTHON, processes_with, read_events, read_records, wait_for

MODEL = "claude-sonnet-4-6"
ALLOWED = "allow_subleads = true\n"


class Tree(Stage):
    """A run whose lead may spawn sub-leads; theirs wait until the run's end."""

    def sublead(self, lead: Caller, script: str = "$ run sleep 600", **arguments) -> tuple[str, Caller]:
        """Spawn a sub-lead that is at work; its id, and a client that acts in its place."""
        if not arguments.get("read_down"):
            arguments = {"budget_usd": 10, "max_workers": 4, **arguments}
        name = lead.call("spawn_sublead", prompt=script, model=MODEL, **arguments)["sublead_id"]
        self.running(lead, name)
        return name, self.worker(name, role="sublead")


@pytest.fixture
def tree(home):
    """A function that puts on a run whose lead may spawn sub-leads."""
    open_trees = []

    def put_on(lead: str = "", **options) -> Tree:
        open_trees.append(Tree(home, lead=ALLOWED + lead, **options))
        return open_trees[-1]

    yield put_on
    for one in open_trees:
        one.end()


def names_of(caller: Caller) -> set[str]:
    return {tool["name"] for tool in caller.ask("tools/list")["result"]["tools"]}


# ------------------------------------------------------------------ who has which tools, who acts on whom

def test_only_the_root_has_spawn_sublead_and_only_where_the_manifest_allows_it(tree, stage, home):  # noqa: F811
    run = tree()
    lead = run.lead()
    name, sub = run.sublead(lead)
    worker = sub.call("spawn_worker", prompt="$ run sleep 600")["task_id"]
    assert names_of(lead) == names_of(sub) | {"spawn_sublead"} and "wait_actor" in names_of(sub)
    assert not {"spawn_sublead", "wait_actor"} & names_of(run.worker(worker, role="worker"))
    for caller in (sub, run.worker(worker, role="worker")):       # depth 2 and no deeper
        words = caller.refused("spawn_sublead", prompt="x", model=MODEL, budget_usd=1, max_workers=1)
        assert words.startswith("forbidden: ") and "spawn_sublead" in words
    run.finish(0)


def test_without_leave_there_is_no_spawn_sublead(stage):  # noqa: F811
    run = stage()
    lead = run.lead()
    assert "spawn_sublead" not in names_of(lead)
    assert lead.refused("spawn_sublead", prompt="x", model=MODEL).startswith("forbidden: ")
    assert run.events("actor_added", role="sublead") == []
    run.finish()


def test_the_root_acts_on_all_below_it_and_a_sublead_on_its_own_workers(tree, home):
    run = tree()
    lead = run.lead()
    one, sub = run.sublead(lead)
    two, other = run.sublead(lead)
    mine, theirs = run.spawn(sub, "$ run sleep 600"), run.spawn(other, "$ run sleep 600")
    roots = run.spawn(lead, "$ run sleep 600")
    for name in (theirs, roots, two, one, "boss"):
        for tool in ("cancel_worker", "pause_worker", "worker_status", "wait_for_worker"):
            assert sub.refused(tool, task_id=name).startswith("forbidden: "), (tool, name)
    assert sub.refused("cancel_worker", task_id="worker-99").startswith("unknown task_id: worker-99")
    assert lead.refused("cancel_worker", task_id="boss").startswith("forbidden: ")
    assert sub.call("worker_status", task_id=mine)["state"] == "Running"
    assert lead.call("worker_status", task_id=mine)["state"] == "Running"
    assert lead.call("pause_worker", task_id=mine) == {"ok": True}
    assert lead.call("continue_worker", task_id=mine) == {"ok": True}
    assert lead.call("pause_worker", target=one, mode="freeze") == {"ok": True}
    assert lead.call("continue_worker", actor_id=one) == {"ok": True}
    told = lead.call("cancel_worker", task_id=theirs, reason="not that way")       # its own lead is told
    assert told == {"ok": True}
    wait_for(lambda: any(e["told"][1].startswith(f"[SYSTEM] {theirs} was cancelled: not that way")
                         for e in run.events("stop_decided", actor=theirs)), DEADLINE_S, "the reason")
    wait_for(lambda: (run.run / "tasks" / two / "messages").is_dir(), DEADLINE_S, "the message")
    listed = lead.call("list_workers")
    assert [w["task_id"] for w in listed["workers"]] == [roots]
    assert [s["sublead_id"] for s in listed["subleads"]] == [one, two]
    assert [w["task_id"] for w in sub.call("list_workers")["workers"]] == [mine]
    assert sub.call("list_workers")["subleads"] == []
    run.finish(1)


# ------------------------------------------------------------------ caps and purses

def test_what_is_refused_and_in_which_words(tree):
    run = tree(lead="max_subleads = 2\nmax_sublead_budget_usd = 3\nmax_total_workers = 3", budget=5.0)
    lead = run.lead()

    def refused(**arguments) -> str:
        return lead.refused("spawn_sublead", prompt="$ say x", model=MODEL, **arguments)

    assert refused(max_workers=1).startswith("budget_usd: is required")
    assert refused(budget_usd=1).startswith("max_workers: is required")
    assert "max_workers" in refused(budget_usd=1, max_workers=17) and "budget_usd" in refused(budget_usd=0, max_workers=1)
    assert refused(budget_usd=3.5, max_workers=1).startswith(
        "spawn_sublead: budget_usd $3.5000 exceeds per-sublead cap $3.0000")
    assert lead.refused("spawn_sublead", prompt="  ", model=MODEL, budget_usd=1, max_workers=1).startswith("prompt: ")
    assert lead.refused("spawn_sublead", prompt="x", budget_usd=1, max_workers=1).startswith("model: is required")
    assert "initial_ref" in refused(budget_usd=1, max_workers=1, initial_ref={"a/../b": "x"})
    assert "initial_ref" in refused(budget_usd=1, max_workers=1, initial_ref=["x"])
    assert "A=B" in refused(budget_usd=1, max_workers=1, env={"A=B": "x"})
    one, sub = run.sublead(lead, budget_usd=3, max_workers=2)
    words = refused(budget_usd=2.5, max_workers=1)
    found = re.match(r"budget exceeded: \$([\d.]+) spent \+ \$([\d.]+) reserved \+ \$([\d.]+) estimated "
                     r"> \$([\d.]+) budget", words)
    assert found and [float(x) for x in found.groups()][1:] == [3.0, 2.5, 5.0], words
    two, other = run.sublead(lead, budget_usd=0.4, max_workers=2)
    assert refused(budget_usd=0.1, max_workers=1).startswith("sublead cap reached: 2 spawned (max 2)")
    assert "budget exceeded: " in other.refused("spawn_worker", prompt="$ say x")       # 0.50 of its own 0.40
    for _ in range(2):
        sub.call("spawn_worker", prompt="$ run sleep 600")
    assert sub.refused("spawn_worker", prompt="$ say x").startswith("worker cap reached: 2 active (max 2)")
    last = lead.call("spawn_worker", prompt="$ run sleep 600", model="claude-haiku-4-5")["task_id"]
    assert lead.refused("spawn_worker", prompt="$ say x", model="claude-haiku-4-5").startswith(
        "tree worker cap reached: 3 live (max 3)")
    assert other.refused("spawn_worker", prompt="$ say x", model="claude-haiku-4-5").startswith(
        "tree worker cap reached: 3 live (max 3)")
    lead.call("cancel_worker", task_id=last)
    lead.call("wait_for_worker", task_id=last)
    assert other.call("spawn_worker", prompt="$ run sleep 600", model="claude-haiku-4-5")
    assert lead.call("cancel_worker", task_id=two) == {"ok": True}
    assert lead.call("wait_actor", actor_id=two)["Sublead"]["outcome"] == "cancel"
    assert refused(budget_usd=0.1, max_workers=1).startswith("sublead cap reached: 2 spawned (max 2)")    # ended ones count
    run.operator().op("cancel_run")
    run.settle(1)
    assert {e["actor"] for e in run.events("actor_added", role="sublead")} == {one, two}


@pytest.mark.slow
def test_an_envelope_is_reserved_and_what_was_not_spent_returns_once(tree, home):
    run = tree(budget=10.0)
    lead = run.lead()
    name, sub = run.sublead(lead, gate(home.root / "s"), budget_usd=6, max_workers=2)
    assert lead.call("budget_status")["reserved_usd"] == 6
    assert sub.call("budget_status") == {"budget_usd": 6, "spent_usd": sub.call("budget_status")["spent_usd"],
                                         "reserved_usd": 0, "workers_live": 0, "max_workers": 2}
    record = sub.call("wait_for_worker", task_id=sub.call("spawn_worker", prompt="$ print 9000 900")["task_id"])
    left = run.spawn(sub, "$ ignore\n$ run sleep 600")
    books = lead.call("budget_status")                    # what is spent from the envelope stays within it
    assert books["reserved_usd"] == 6 and books["spent_usd"] < record["cost_usd"] and books["workers_live"] == 0
    assert lead.call("wait_actor", actor_id=name, timeout_secs=0.1) == {"settled": False, "state": "Running"}
    (home.root / "s").touch()
    ended = lead.call("wait_actor", actor_id=name)["Sublead"]
    whole = {r["task_id"]: r for r in read_records(run.run)}
    spent = sum(whole[n]["cost_usd"] or 0 for n in (name, record["task_id"], left))
    assert whole[left]["failure_reason"]["message"].startswith("the lead ended")     # and it had settled by then
    assert ended["outcome"] == "success" and ended["record"] == whole[name]
    assert ended["spent_usd"] == pytest.approx(spent) and ended["unspent_usd"] == pytest.approx(6 - spent)
    for _ in range(2):
        books = lead.call("budget_status")
        assert books["reserved_usd"] == 0
        own = books["spent_usd"] - spent
        assert 0 < own < 0.01
    assert lead.call("wait_for_worker", task_id=name) == whole[name]
    records = run.finish(0)
    assert run.summary()["total_cost_usd"] == pytest.approx(sum(r["cost_usd"] or 0 for r in records.values()))


def test_what_a_sublead_overspends_is_booked_on_the_root(tree, home):
    run = tree(budget=0.6)
    lead = run.lead()
    slowly = "$ loop 30\n$ print 2000 2000\n$ sleep 0.1\n$ end\n"
    name, sub = run.sublead(lead, slowly + gate(home.root / "s"), budget_usd=0.001, max_workers=2)
    wait_for(lambda: lead.call("budget_status")["spent_usd"] > 0.1, DEADLINE_S, "its spending")   # while it runs
    told = [e["at"] for e in run.events("usage", actor=name)]
    assert min(b - a for a, b in zip(told, told[1:])) < 5, "each look at the root's budget looks at its sub-leads"
    assert lead.call("budget_status")["reserved_usd"] == 0.001
    over = sub.call("budget_status")["spent_usd"]
    assert lead.call("budget_status")["spent_usd"] >= over - 0.001 > 0.09
    assert "budget exceeded" in sub.refused("spawn_worker", prompt="$ say x", model="claude-haiku-4-5")
    assert "budget exceeded" in lead.refused("spawn_worker", prompt="$ say x", model="claude-sonnet-4-6")      # 0.1 + 0.5 > 0.6
    (home.root / "s").touch()
    ended = lead.call("wait_actor", actor_id=name)["Sublead"]
    assert ended["unspent_usd"] == 0 and ended["spent_usd"] == ended["record"]["cost_usd"] > 0.04
    books = lead.call("budget_status")
    assert books["reserved_usd"] == 0 and books["spent_usd"] == pytest.approx(ended["spent_usd"], abs=0.01)
    run.finish(0)


def test_read_down_shares_the_purse_and_the_pool_and_shows_its_store(tree, home):
    run = tree(workers=2, budget=20.0)
    lead = run.lead()
    name, sub = run.sublead(lead, gate(home.root / "s"), read_down=True, initial_ref={"plan": "look"})
    closed, other = run.sublead(lead, budget_usd=1, max_workers=1)
    assert lead.call("budget_status")["reserved_usd"] == 1
    run.spawn(sub, gate(home.root / "s"))
    run.spawn(lead, gate(home.root / "s"))
    theirs, mine = sub.call("budget_status"), lead.call("budget_status")
    assert (theirs["budget_usd"], theirs["max_workers"], theirs["workers_live"]) == (20, 2, 2)
    assert theirs["reserved_usd"] == mine["reserved_usd"] == 2.0
    for caller in (lead, sub):
        assert caller.refused("spawn_worker", prompt="$ say x").startswith("worker cap reached: 2 active (max 2)")
    sub.call("kv_set", path="/shared/found", value="gold")
    sub.call("kv_set", path="/peer/self/note", value="mine")
    other.call("kv_set", path="/shared/found", value="lead")
    assert lead.call("kv_get", path=f"/sub/{name}/shared/found")["entry"]["value"] == "gold"
    assert lead.call("kv_get", path=f"/sub/{name}/peer/{name}/note")["entry"]["value"] == "mine"
    assert lead.call("kv_get", path=f"/sub/{name}/ref/plan")["entry"]["value"] == "look"
    assert lead.call("kv_get", path="/shared/found")["entry"] is None
    assert [e["path"] for e in lead.call("kv_list", glob="/sub/*")["entries"]] == [
        f"/sub/{name}/peer/{name}/note", f"/sub/{name}/ref/plan", f"/sub/{name}/shared/found"]
    assert lead.refused("kv_get", path=f"/sub/{closed}/shared/found").startswith("forbidden: ")
    assert lead.refused("kv_set", path=f"/sub/{name}/shared/found", value="x").startswith("forbidden: ")
    assert sub.refused("kv_get", path=f"/sub/{closed}/shared/found").startswith("forbidden: ")
    assert other.call("kv_get", path="/shared/found")["entry"]["value"] == "lead"
    (home.root / "s").touch()
    ended = lead.call("wait_actor", target=name)["Sublead"]
    assert ended["unspent_usd"] == 0 and ended["spent_usd"] > 0
    listed = {s["sublead_id"]: s for s in lead.call("list_workers")["subleads"]}
    assert listed[name] == {"sublead_id": name, "state": "Completed", "spent_usd": ended["spent_usd"], "budget_usd": None}
    records = run.finish(0)
    assert records[name]["status"] == "Success" and records[closed]["status"] == "Cancelled"


def test_one_hundred_racing_spawns_exceed_no_cap_and_no_purse(tree):
    run = tree(lead="max_subleads = 4\nmax_workers_across_tree = 5", budget=12.0, workers=3)
    lead = run.lead()
    name, sub = run.sublead(lead, budget_usd=4, max_workers=3)
    down, below = run.sublead(lead, read_down=True)
    answers, lock = [], threading.Lock()

    def race(caller: Caller, subleads: bool) -> None:
        ids = [caller.start(*(("spawn_sublead", {"prompt": "$ run sleep 600", "model": MODEL, "budget_usd": 3,
                                                 "max_workers": 2}) if subleads and n % 3 == 0 else
                              ("spawn_worker", {"prompt": "$ run sleep 600"}))) for n in range(20)]
        found = [caller.answer(i) for i in ids]
        with lock:
            answers.extend(found)

    callers = [(lead, True), (run.lead(), True), (sub, False), (run.worker(name, role="sublead"), False), (below, False)]
    threads = [threading.Thread(target=race, args=pair) for pair in callers]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert len(answers) == 100
    refused = {words_of(a).partition(":")[0] for a in answers if a["result"]["isError"]}
    assert refused <= {"worker cap reached", "tree worker cap reached", "sublead cap reached", "budget exceeded"}
    assert "tree worker cap reached" in refused and "sublead cap reached" in refused
    dealt = [value_of(a) for a in answers if not a["result"]["isError"]]
    assert sum("task_id" in d for d in dealt) == 5 and sum("sublead_id" in d for d in dealt) <= 2
    live, per_layer, subleads = set(), {}, 0
    for e in run.events():
        if e["kind"] == "actor_added" and e["role"] == "worker":
            live.add(e["actor"])
            pool = "boss" if e["parent"] == down else e["parent"]
            per_layer[pool] = per_layer.get(pool, 0) + 1
        subleads += e["kind"] == "actor_added" and e["role"] == "sublead"
        assert len(live) <= 5 and per_layer.get("boss", 0) <= 3 and per_layer.get(name, 0) <= 3 and subleads <= 4
    books = lead.call("budget_status")
    assert books["spent_usd"] + books["reserved_usd"] <= 12.0 and books["workers_live"] == per_layer.get("boss", 0)
    run.operator().op("cancel_run")
    records = run.settle(1)
    assert len(records) == len(run.events("actor_added")) and {r["status"] for r in records.values()} == {"Cancelled"}
    assert not processes_with(f"PITBOSS_RUN_ID={run.run.name}")


# ------------------------------------------------------------------ what a sub-lead has

def test_defaults_come_from_the_manifest_and_from_the_root(tree, home):
    run = tree(more="[sublead_defaults]\nbudget_usd = 2.5\nlead_timeout_secs = 99\n[lead.sublead_defaults]\nmax_workers = 3\n",
               lead='timeout_secs = 55\ntools = ["Bash"]\nenv = { COLOUR = "red", SHAPE = "round" }\n',
               run="lead_timeout_secs = 500")
    lead = run.lead()
    name = lead.call("spawn_sublead", prompt="$ run echo $COLOUR $SHAPE $PITBOSS_TASK_ID > out.txt\n$ run sleep 600",
                     model="claude-opus-4-5", env={"SHAPE": "square"}, tools=["Read"])["sublead_id"]
    facts = run.events("actor_added", actor=name)[0]
    assert (facts["budget_usd"], facts["max_workers"], facts["timeout_s"], facts["read_down"]) == (2.5, 3, 99, False)
    assert (facts["role"], facts["parent"], facts["model"], facts["agent"]) == ("sublead", "boss", "claude-opus-4-5", "demo")
    assert facts["directory"] == str(run.repo) and facts["estimate"] == 2.5
    plan = json.loads((run.run / "tasks" / name / "task.json").read_text())
    assert plan["tools"] == ["Read"] and plan["env"] == {"COLOUR": "red", "SHAPE": "square"}
    wait_for(lambda: (run.repo / "out.txt").exists() and (run.repo / "out.txt").read_text().strip(), DEADLINE_S, "it")
    assert (run.repo / "out.txt").read_text() == f"red square {name}\n"
    other = lead.call("spawn_sublead", prompt="$ say x", model=MODEL, budget_usd=1, max_workers=1,
                      lead_timeout_secs=7)["sublead_id"]
    facts = run.events("actor_added", actor=other)[0]
    assert (facts["budget_usd"], facts["max_workers"], facts["timeout_s"]) == (1, 1, 7)
    sub = run.worker(name, role="sublead")
    worker = run.spawn(sub, "$ run sleep 600")             # a worker has what its own lead has
    facts = run.events("actor_added", actor=worker)[0]
    assert (facts["model"], facts["timeout_s"], facts["parent"], facts["layer"]) == ("claude-opus-4-5", 55, name, name)
    assert json.loads((run.run / "tasks" / worker / "task.json").read_text())["tools"] == ["Read"]
    run.finish(0)


def test_the_roots_time_is_a_subleads_unless_somebody_says_otherwise(tree):
    run = tree(run="lead_timeout_secs = 500")
    lead = run.lead()
    name, _ = run.sublead(lead)
    assert run.events("actor_added", actor=name)[0]["timeout_s"] == 500
    timed, _ = run.sublead(lead, lead_timeout_secs=1)
    assert lead.call("wait_actor", actor_id=timed)["Sublead"]["outcome"] == "timeout"
    run.finish(1)


def test_initial_ref_is_there_before_it_starts_text_as_text_and_the_rest_as_json(tree):
    run = tree(script='$ call spawn_sublead {"prompt": "$ call kv_get {\\"path\\": \\"/ref/text\\"}", '
                      f'"model": "{MODEL}", "budget_usd": 1, "max_workers": 1, "initial_ref": '
                      '{"text": "as it is", "deep/list": [1, {"a": null}], "big": "' + "x" * 9000 + '"}}\n'
                      '$ call wait_actor {"actor_id": "<1.sublead_id>"}\n' + gate(Path("/dev/null")))
    run.settle(0)
    written = {e["path"]: e for e in run.events("kv_written")}
    added = run.events("actor_added", actor="sublead-1")[0]["seq"]
    assert all(e["layer"] == "sublead-1" and e["actor"] == "boss" and e["seq"] < added for e in written.values())
    assert written["/ref/text"]["value"] == "as it is" and written["/ref/deep/list"]["value"] == '[1, {"a": null}]'
    assert written["/ref/big"]["size_bytes"] == 9000
    log = (run.run / "tasks/sublead-1/stdout.log").read_text()
    assert "as it is" in log


def test_a_sublead_gets_worktrees_as_a_worker_does(tree):
    run = tree(lead="use_worktree = true")
    lead = run.lead()
    name, sub = run.sublead(lead, "$ write s.txt loose\n$ run sleep 600")
    place = run.events("placed", actor=name)[0]["place"]
    assert place["branch"] == f"pitboss/{run.run.name[:8]}/{name}" and os.path.isdir(place["path"])
    worker = sub.call("spawn_worker", prompt="$ write w.txt x\n$ commit w")["task_id"]
    assert sub.call("wait_for_worker", task_id=worker)["status"] == "Success"
    records = run.finish(0)
    assert records[name]["worktree_path"] == place["path"] and Path(place["path"], "s.txt").read_text() == "loose\n"


# ------------------------------------------------------------------ ends

@pytest.mark.slow
def test_cancelling_a_sublead_takes_its_workers_and_what_is_spawned_meanwhile(tree, home):
    run = tree(workers=8)
    lead = run.lead()
    name, sub = run.sublead(lead, "$ ignore\n$ run sleep 600", budget_usd=50, max_workers=16)
    bystander = run.spawn(lead, gate(home.root / "b"))
    workers = [run.spawn(sub, "$ ignore\n$ run sleep 600") for _ in range(2)]
    asked = [sub.start("spawn_worker", {"prompt": "$ ignore\n$ run sleep 600"}) for _ in range(3)]
    assert lead.call("cancel_worker", task_id=name, reason="enough") == {"ok": True}
    asked += [sub.start("spawn_worker", {"prompt": "$ ignore\n$ run sleep 600"}) for _ in range(3)]
    ended = lead.call("wait_actor", actor_id=name)["Sublead"]
    added = {e["actor"] for e in run.events("actor_added", parent=name)}
    assert set(workers) <= added and ended["outcome"] == "cancel"
    records = {r["task_id"]: r for r in read_records(run.run)}
    assert added <= set(records) and {records[n]["status"] for n in (*added, name)} == {"Cancelled"}
    assert all(records[n]["failure_reason"]["message"].startswith("the lead ended") for n in added)
    assert records[name]["failure_reason"]["message"].startswith("enough")
    assert not [n for n in (*added, name) if processes_with(f"{run.run.name}:{n}:")]
    assert lead.call("worker_status", task_id=bystander)["state"] == "Running"
    assert lead.call("budget_status")["reserved_usd"] == 0.5                  # the bystander's
    (home.root / "b").touch()
    lead.call("wait_for_worker", task_id=bystander)
    records = run.finish(1)
    assert run.summary()["tasks_failed"] == 1 + len(added)                    # a sub-lead that failed to end well


@pytest.mark.slow
@pytest.mark.parametrize("ending, code", [("", 0), ("$ fail no", 1)], ids=["success", "failure"])
def test_the_roots_end_takes_the_whole_tree(tree, home, ending, code):
    run = tree(script=gate(home.root / "lead.gate") + "\n" + ending)
    lead = run.lead()
    name, sub = run.sublead(lead)
    paused, resting = run.sublead(lead)
    workers = [run.spawn(sub, "$ ignore\n$ run sleep 600"), run.spawn(resting, "$ run sleep 600")]
    lead.call("pause_worker", task_id=paused)
    records = run.finish(code)
    assert {records[n]["status"] for n in (name, paused, *workers)} == {"Cancelled"}
    assert {records[n]["failure_reason"]["message"].partition(";")[0] for n in (name, paused, *workers)} == {"the lead ended"}
    assert run.summary()["tasks_failed"] == (5 if code else 0) and run.summary()["tasks_total"] == 5
    assert not processes_with(f"PITBOSS_RUN_ID={run.run.name}")


def test_a_sublead_that_succeeds_needs_its_workers_no_more_and_one_that_fails_lost_them(tree, home):
    run = tree()
    lead = run.lead()
    good, sub = run.sublead(lead, gate(home.root / "g"))
    bad, other = run.sublead(lead, gate(home.root / "g") + "\n$ fail no")
    for caller in (sub, other):
        run.spawn(caller, "$ run sleep 600")
    (home.root / "g").touch()
    assert lead.call("wait_actor", actor_id=good)["Sublead"]["outcome"] == "success"
    assert lead.call("wait_actor", actor_id=bad)["Sublead"]["outcome"] == "error"
    run.finish(1)
    assert run.summary()["tasks_failed"] == 2


@pytest.mark.slow
def test_a_run_that_is_cancelled_takes_all_that_is_spawned_meanwhile(tree):
    run = tree()
    lead = run.lead()
    name, sub = run.sublead(lead, "$ ignore\n$ run sleep 600", budget_usd=50, max_workers=16)
    for _ in range(3):
        sub.start("spawn_worker", {"prompt": "$ ignore\n$ run sleep 600"})
    operator = run.operator()
    operator.say({"op": "cancel_run", "reason": "all off"})
    late = [sub.start("spawn_worker", {"prompt": "$ ignore\n$ run sleep 600"}) for _ in range(3)]
    late.append(lead.start("spawn_sublead", {"prompt": "$ ignore\n$ hang", "model": MODEL, "budget_usd": 1, "max_workers": 1}))
    records = run.settle(1)
    added = {e["actor"] for e in run.events("actor_added")}
    assert set(records) == added and {r["status"] for r in records.values()} == {"Cancelled"} and len(late) == 4
    assert not processes_with(f"PITBOSS_RUN_ID={run.run.name}")


def test_a_draining_run_takes_no_subleads(tree):
    run = tree()
    lead = run.lead()
    name, sub = run.sublead(lead)
    run.process.send_signal(signal.SIGINT)
    wait_for(lambda: run.events("drained"), DEADLINE_S, "the drain")
    words = lead.refused("spawn_sublead", prompt="$ say x", model=MODEL, budget_usd=1, max_workers=1)
    assert words.startswith("run is draining: no new workers accepted")
    assert sub.refused("spawn_worker", prompt="$ say x").startswith("run is draining: no new workers accepted")
    run.finish(130)


def test_a_paused_sublead_has_not_ended_and_its_workers_go_on(tree, home):
    run = tree()
    lead = run.lead()
    name, sub = run.sublead(lead)
    worker = run.spawn(sub, gate(home.root / "w"))
    lead.call("pause_worker", task_id=name)
    assert lead.call("wait_actor", actor_id=name, timeout_secs=0) == {"settled": False, "state": "Paused"}
    (home.root / "w").touch()
    assert lead.call("wait_actor", actor_id=worker)["Worker"]["status"] == "Success"
    assert lead.call("budget_status")["reserved_usd"] == 10
    lead.call("continue_worker", task_id=name)
    heard = wait_for(lambda: run.heard(name)[1:], DEADLINE_S, "its next hand")[0]
    assert f"- {worker}: Completed" in heard            # what settled meanwhile is told
    run.finish(0)


def test_leases_of_a_sublead_and_its_workers_are_free_when_they_end(tree):
    run = tree()
    lead = run.lead()
    name, sub = run.sublead(lead)
    worker = run.worker(run.spawn(sub, "$ run sleep 600"), role="worker")
    assert sub.call("lease_acquire", name="x", ttl_secs=600)["acquired"]
    assert lead.call("lease_acquire", name="x", ttl_secs=600)["acquired"]     # another layer's is another lease
    assert sub.call("run_lease_acquire", key="tree", ttl_secs=600)["acquired"]
    assert worker.call("run_lease_acquire", key="deep", ttl_secs=600)["acquired"]
    assert worker.call("lease_acquire", name="x", ttl_secs=1)["holder"] == name
    asked = [lead.start("run_lease_acquire", {"key": key, "ttl_secs": 60, "wait_secs": 60}) for key in ("tree", "deep")]
    lead.call("cancel_worker", task_id=name)
    assert all(value_of(lead.answer(i))["holder"] == "boss" for i in asked)
    run.finish(1)


@pytest.mark.parametrize("who", ["boss", "sublead-1"])
def test_a_killed_lead_is_dealt_again_and_knows_whom_it_spawned(tree, who):
    run = tree()
    lead = run.lead()
    name, sub = run.sublead(lead)
    worker = run.spawn(sub, "$ run sleep 600")
    known, name = {"boss": f"- {name} (sub-lead): Running", name: f"- {worker}: Running"}[who], who
    for pid in processes_with(f"{run.run.name}:{name}:"):
        with contextlib.suppress(ProcessLookupError):          # it went with its parent
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(run.events("hand_started", actor=name)) == 2, DEADLINE_S, "the next hand")
    heard = wait_for(lambda: run.heard(name)[1:], DEADLINE_S, "what it was told")[0]
    assert "You were started again" in heard and known in heard and heard.count("\n- ") == 1
    assert lead.call("worker_status", task_id=worker)["state"] == "Running"
    run.finish(0)


# ------------------------------------------------------------------ operators

@pytest.mark.slow
def test_operators_are_told_of_subleads(tree, home):
    run = tree()
    lead, operator = run.lead(), run.operator()
    name, sub = run.sublead(lead, gate(home.root / "s"), budget_usd=3, max_workers=2)
    told = operator.told("sublead_spawned")
    assert told == {"event": "sublead_spawned", "sublead_id": name, "budget_usd": 3, "max_workers": 2,
                    "read_down": False, "actor_path": ["boss", name]}
    down, _ = run.sublead(lead, read_down=True)
    told = operator.told("sublead_spawned")
    assert told == {"event": "sublead_spawned", "sublead_id": down, "read_down": True, "actor_path": ["boss", down]}
    worker = sub.call("spawn_worker", prompt="$ fail no")["task_id"]
    failed = operator.told("worker_failed")
    assert failed["task_id"] == worker and failed["parent_task_id"] == name and shape_faults(failed) == []
    assert failed["actor_path"] == ["boss", name, worker]
    hangs = run.spawn(sub, "$ ignore\n$ run sleep 600")
    late = run.operator()                                   # who comes later is told which live
    assert [late.told("sublead_spawned")["sublead_id"] for _ in range(2)] == [name, down]
    shown = operator.op("list_workers")["workers"]
    assert {w["task_id"]: w.get("parent_task_id") for w in shown} == {
        "boss": None, name: "boss", down: "boss", worker: name, hangs: name}
    assert operator.op("pause_worker", task_id=down)["event"] == "op_acked"
    assert operator.op("continue_worker", task_id=down)["event"] == "op_acked"
    (home.root / "s").touch()
    ended = operator.told("sublead_terminated")
    settled = lead.call("wait_actor", actor_id=name)["Sublead"]
    settled.pop("record")
    assert ended == {"event": "sublead_terminated", **settled, "actor_path": ["boss", name]}
    assert operator.op("cancel_worker", task_id=down)["event"] == "op_acked"
    assert operator.told("sublead_terminated")["outcome"] == "cancel"
    run.finish(1)
    rest = []
    while (line := operator.hear()) is not None:
        rest.append(line)
    assert not [e for e in rest if e["event"] == "sublead_terminated"], "each is told once"


def test_status_shows_the_tree_in_its_order(tree, home):
    run = tree()
    lead = run.lead()
    name, sub = run.sublead(lead)
    first = run.spawn(lead, "$ run sleep 600")
    second = run.spawn(sub, "$ run sleep 600")
    lines = home.pitboss("status", run.run.name, check=0).stdout.splitlines()
    shown = [w for line in lines for w in line.split() if w in ("boss", name, first, second)]
    assert shown == ["boss", name, second, first]
    run.finish(0)


# ------------------------------------------------------------------ manifests

HOUSE = '[run]\nmax_workers = 2\nbudget_usd = 1.5\n[defaults]\nagent = "demo"\nuse_worktree = false\n'
LEAD = '[lead]\nid = "l"\ndirectory = "."\nprompt = "x"\n'


@pytest.mark.parametrize("text, said", [
    (ALLOWED, ["lead.allow_subleads", "sublead_defaults.budget_usd"]),
    (ALLOWED + "[lead.sublead_defaults]\nbudget_usd = 1\n", ["lead.allow_subleads", "sublead_defaults.max_workers"]),
    (ALLOWED + "[sublead_defaults]\nread_down = true\n", []),
    (ALLOWED + "[sublead_defaults]\nmax_workers = 2\n[lead.sublead_defaults]\nbudget_usd = 1\n", []),
    (ALLOWED + "max_sublead_budget_usd = 0.5\n[sublead_defaults]\nmax_workers = 2\nbudget_usd = 1\n",
     ["lead.max_sublead_budget_usd", "refused"]),
    ("max_subleads = 2\n", ["lead.max_subleads", "allow_subleads"]),
    ("[sublead_defaults]\nmax_workers = 2\n", ["lead.sublead_defaults", "allow_subleads"])])
def test_validate_warns_of_what_cannot_work(home, text, said):
    done = home.pitboss("validate", home.manifest(HOUSE + LEAD + text), check=0)
    warned = [line for line in done.stderr.splitlines() if "sublead" in line]
    assert len(warned) == bool(said) and all(words in warned[0] for words in said), done.stderr


def test_defaults_in_two_places_that_differ_are_named_with_both(home):
    text = HOUSE + LEAD + ALLOWED + "[sublead_defaults]\nbudget_usd = 1\n[lead.sublead_defaults]\nbudget_usd = 2\n"
    done = home.pitboss("validate", home.manifest(text), check=2)
    assert "lead.sublead_defaults.budget_usd (line 15): found 2, but sublead_defaults.budget_usd" in done.stderr
    assert "is 1" in done.stderr


def test_validate_shows_the_rules_of_subleads(home):
    text = HOUSE + LEAD + ALLOWED + "max_subleads = 3\nmax_total_workers = 9\n[sublead_defaults]\nread_down = true\n"
    shown = home.pitboss("validate", home.manifest(text), check=0).stdout
    assert "allow_subleads" in shown and "max_subleads=3" in shown and "max_workers_across_tree=9" in shown
    told = json.loads(home.pitboss("validate", "--json", home.manifest(text), check=0).stdout)
    assert told["subleads"] == {"allow_subleads": True, "max_subleads": 3, "max_workers_across_tree": 9,
                                "sublead_defaults": {"read_down": True}}


# ------------------------------------------------------------------ death and resume

def call(tool: str, /, **arguments) -> str:
    return f"$ call {tool} {json.dumps(arguments)}"


def tree_script(home, gates: Path) -> str:
    """A root that spawns two sub-leads, each of which spawns three workers and waits for them."""
    def sublead(letter: str) -> str:
        workers = [f"$ print 4000 500\n{gate(gates / f'{letter}{n}')}\n$ say done" for n in range(3)]
        return "\n".join([*(call("spawn_worker", prompt=w) for w in workers),
                          *(call("wait_for_worker", task_id=f"<<{n + 1}.task_id>>") for n in range(3)),
                          call("kv_set", path="/shared/done", value=letter), "$ say all three"])

    return "\n".join([
        *(call("spawn_sublead", prompt=sublead(letter), model=MODEL, budget_usd=3, max_workers=3,
               initial_ref={"letter": letter}) for letter in "ab"),
        call("wait_actor", actor_id="<1.sublead_id>"), call("wait_actor", actor_id="<2.sublead_id>"),
        call("budget_status"), "$ say the tree is done"])


def test_a_tree_whose_dispatcher_dies_twice_ends_with_exact_books(tree, home):
    gates = home.root / "gates"
    gates.mkdir()
    run = tree(script=tree_script(home, gates), budget=8.0)
    workers = lambda: [e["actor"] for e in run.events("actor_added", role="worker")]  # noqa: E731

    def resume():
        started = len(run.events("dispatcher_started"))
        process = home.start("resume", run.run.name)
        wait_for(lambda: len(run.events("dispatcher_started")) > started or process.poll() is not None, DEADLINE_S, "it")
        return process

    wait_for(lambda: len(workers()) == 6 and len(run.events("hand_started")) == 9, DEADLINE_S, "six workers")
    run.process.kill()
    run.process.wait()
    second = resume()
    home.pitboss("cancel", run.run.name, "sublead-2", "--reason", "no more of that", check=0)
    (gates / "a0").touch()
    wait_for(lambda: any(e["actor"] in workers() and e.get("status") == "Success" for e in run.events("hand_ended")),
             DEADLINE_S, "one worker done")
    second.kill()
    second.wait()
    for n in (1, 2):
        (gates / f"a{n}").touch()
    third = resume()
    assert third.wait(DEADLINE_S) == 1, third.stderr.read()
    records = {r["task_id"]: r for r in read_records(run.run)}
    assert len(records) == 9 and all(r["hands"] == 1 for r in records.values())
    parents = {n: r["parent_task_id"] for n, r in records.items()}
    below = {s: {n for n, p in parents.items() if p == s} for s in ("sublead-1", "sublead-2")}
    assert all(len(names) == 3 for names in below.values())
    assert {records[n]["status"] for n in ("boss", "sublead-1", *below["sublead-1"])} == {"Success"}
    assert {records[n]["status"] for n in ("sublead-2", *below["sublead-2"])} == {"Cancelled"}
    results = [json.loads(block["content"]) for line in (run.run / "tasks/boss/stdout.log").read_bytes().splitlines()
               for event in [json.loads(line)] if event["type"] == "user" and not event.get("isReplay")
               for block in event["message"]["content"]]
    one, two, books = results[2]["Sublead"], results[3]["Sublead"], results[4]
    for name, told in (("sublead-1", one), ("sublead-2", two)):
        spent = sum(records[n]["cost_usd"] or 0 for n in (name, *below[name]))
        assert told["sublead_id"] == name and told["spent_usd"] == pytest.approx(spent, abs=1e-9)
        assert told["unspent_usd"] == pytest.approx(3 - spent, abs=1e-9)
        assert told["record"]["cost_usd"] == records[name]["cost_usd"]
    assert (one["outcome"], two["outcome"]) == ("success", "cancel")
    assert books["reserved_usd"] == 0 and books["workers_live"] == 0
    own = [e["cost_usd"] for e in run.events("usage", "hand_ended", actor="boss")]
    assert min(abs(books["spent_usd"] - one["spent_usd"] - two["spent_usd"] - usd) for usd in own) < 1e-9
    total = sum(r["cost_usd"] or 0 for r in records.values())
    assert run.summary()["total_cost_usd"] == pytest.approx(total, abs=1e-9)
    assert run.summary()["tasks_failed"] == 4
    keys = [e["call"] for e in run.events("actor_added") if "call" in e]
    assert len(keys) == len(set(keys)) == 8
    assert not processes_with(f"PITBOSS_RUN_ID={run.run.name}")


@pytest.mark.parametrize("moment", ['journal:"path":"/ref/two".before', 'journal:"path":"/ref/two".after',
                                    'journal:"role":"sublead".half', 'journal:"role":"sublead".after'])
def test_a_spawn_that_a_dispatcher_did_not_finish_happens_once_and_whole(home, moment):
    """Where the first one died before the spawn was written, nobody finds what it had written for it."""
    home.repo("repo", 1)
    sub = [call("kv_get", path="/ref/one"), call("kv_get", path="/ref/two"), "$ say I have both"]
    script = [call("spawn_sublead", prompt="\n".join(sub), model=MODEL, budget_usd=1, max_workers=1,
                   initial_ref={"one": "first", "two": "second"}),
              call("wait_actor", actor_id="<1.sublead_id>"), "$ say done"]
    manifest = home.manifest(HOUSE + LEAD.replace('"."', '"repo"').replace('"x"', json.dumps("\n".join(script))) + ALLOWED)
    process = subprocess.Popen([PYTHON, str(FAULTS), moment, "1", "--", "dispatch", str(manifest)], env=home.env,
                               cwd=home.root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: state_of(process.pid) == "T", DEADLINE_S, "the moment")
    process.kill()
    process.wait()
    run = home.run_dir()
    home.pitboss("resume", run.name, check=0)
    added = [e["actor"] for e in read_events(run) if e["kind"] == "actor_added" and e["role"] == "sublead"]
    records = {r["task_id"]: r for r in read_records(run)}
    assert len(added) == 1 and set(records) == {"l", *added} and (run / "tasks" / added[0]).is_dir()
    assert {r["status"] for r in records.values()} == {"Success"}
    written = [(e["path"], e["value"], e["version"]) for e in read_events(run)
               if e["kind"] == "kv_written" and e["layer"] == added[0]]
    assert written == [("/ref/one", "first", 1), ("/ref/two", "second", 1)]
    log = (run / "tasks" / added[0] / "stdout.log").read_text()
    assert "first" in log and "second" in log


def test_a_finished_run_tells_its_lead_the_sessions_of_its_subleads(tree, home):
    run = tree(script="\n".join([
        call("kv_get", path="/ref/resume/subleads"),
        call("spawn_sublead", prompt="$ fail not yet", model=MODEL, budget_usd=1, max_workers=1),
        call("wait_actor", actor_id="<2.sublead_id>"), "$ fail no"]))
    session = run.settle(1)["sublead-1"]["claude_session_id"]
    assert session and not run.events("kv_written")
    home.pitboss("resume", run.run.name, check=1)
    again = home.run_dir()
    written = [e for e in read_events(again) if e["kind"] == "kv_written"]
    assert [(e["layer"], e["path"]) for e in written] == [("boss", "/ref/resume/subleads")]
    assert json.loads(written[0]["value"]) == {"sublead-1": session}
    assert "actor_added" not in [e["kind"] for e in read_events(again) if e["seq"] <= written[0]["seq"]]
    assert session in (again / "tasks/boss/stdout.log").read_text()            # it read it there
    assert [r["role"] for r in read_records(again)] == ["sublead", "lead"]     # only the lead was dealt; it spawned


def test_a_sublead_goes_on_in_a_session_and_in_its_worktree(tree, home):
    run = tree(lead="use_worktree = true")
    lead = run.lead()
    first = lead.call("spawn_sublead", prompt="$ write s.txt draft\n$ fail not yet", model=MODEL, budget_usd=1,
                      max_workers=1)["sublead_id"]
    had = lead.call("wait_actor", actor_id=first)["Sublead"]["record"]
    again = lead.call("spawn_sublead", prompt="$ run cat s.txt\n$ say on", model=MODEL, budget_usd=1, max_workers=1,
                      resume_session_id=had["claude_session_id"])["sublead_id"]
    record = lead.call("wait_actor", actor_id=again)["Sublead"]["record"]
    assert record["status"] == "Success" and record["claude_session_id"] == had["claude_session_id"]
    assert run.events("placed", actor=again)[0]["place"]["path"] == had["worktree_path"]
    assert run.events("hand_dealt", actor=again)[0]["how"] == "again"
    run.finish(1)
