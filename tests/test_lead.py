"""Runs with a lead, from outside: tools over the real socket, verbs, books, the control socket, commands.

The scripted lead waits (tests/stage.py), and the test acts in its place with its token; where it matters
that an agent calls through its own bridge, the lead's script does.
"""
from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

import json_schema
import pitboss
from stage import DEADLINE_S, Caller, Client, Stage, gate, value_of, words_of
from tools import Home, git, make_repo, processes_with, read_records, wait_for

ENDS = {"place_failed", "spawn_failed", "hand_skipped"}


def live_peaks(events: list[dict]) -> list[int]:
    """How many workers were live after each event that changed that, by the journal alone."""
    live, counts = set(), []
    for event in events:
        name = event.get("actor")
        if event["kind"] == "actor_added" and event["role"] == "worker":
            live.add(name)
        elif event["kind"] in ENDS or event["kind"] == "hand_ended" and event.get("status"):
            live.discard(name)
        else:
            continue
        counts.append(len(live))
    return counts


# ------------------------------------------------------------------ spawning: caps, budget, defaults

def test_the_worker_cap_is_refused_in_words_and_a_settled_worker_makes_room(stage, home):
    run = stage(workers=2)
    lead = run.lead()
    first = run.spawn(lead, gate(home.root / "g"))
    run.spawn(lead, "$ hang")
    assert lead.refused("spawn_worker", prompt="$ say x").startswith("worker cap reached: 2 active (max 2)")
    (home.root / "g").touch()
    assert lead.call("wait_for_worker", task_id=first)["status"] == "Success"
    third = lead.call("spawn_worker", prompt="$ say x")["task_id"]
    assert lead.call("wait_for_worker", task_id=third)["status"] == "Success"
    assert max(live_peaks(run.events())) == 2
    run.finish()


def test_paused_and_frozen_workers_count_against_the_cap(stage):
    run = stage(workers=2)
    lead = run.lead()
    one, two = run.spawn(lead, "$ run sleep 600"), run.spawn(lead, "$ run sleep 600")
    lead.call("pause_worker", task_id=one)
    lead.call("pause_worker", task_id=two, mode="freeze")
    assert "worker cap reached: 2 active (max 2)" in lead.refused("spawn_worker", prompt="$ say x")
    run.finish()


@pytest.mark.parametrize("cap", [1, 5])
def test_two_hundred_racing_spawns_never_exceed_the_cap(stage, home, cap):
    """Eight connections at once, half of the calls into a repository that git must be asked about first."""
    run = stage(workers=cap)
    other = make_repo(home.root / "other")
    answers, lock = [], threading.Lock()

    def race(number: int) -> None:
        lead = run.lead()
        ids = [lead.start("spawn_worker", {"prompt": "$ say hi", "directory": str(other if n % 2 else run.repo)})
               for n in range(25)]
        found = [lead.answer(i) for i in ids]
        with lock:
            answers.extend(found)

    threads = [threading.Thread(target=race, args=(n,)) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    dealt = [value_of(a)["task_id"] for a in answers if not a["result"]["isError"]]
    refused = [words_of(a) for a in answers if a["result"]["isError"]]
    assert len(answers) == 200 and len(dealt) + len(refused) == 200
    assert len(set(dealt)) == len(dealt) >= cap
    assert all(w.startswith(f"worker cap reached: {cap} active (max {cap})") for w in refused), set(refused)
    lead = run.lead()
    for name in dealt:
        assert lead.call("wait_for_worker", task_id=name)["status"] == "Success"
    peaks = live_peaks(run.events())
    assert max(peaks) == cap and peaks[-1] == 0
    assert lead.call("budget_status")["workers_live"] == 0
    records = run.finish()
    assert set(records) == {"boss", *dealt}


def test_the_budget_reserves_refuses_and_gives_back(stage, home):
    run = stage(budget=1.2)
    lead = run.lead()
    first = run.spawn(lead, gate(home.root / "g"))
    run.spawn(lead, "$ hang")
    books = lead.call("budget_status")
    assert books["reserved_usd"] == 1.0 and books["budget_usd"] == 1.2 and books["workers_live"] == 2
    words = lead.refused("spawn_worker", prompt="$ say x")
    found = re.match(r"budget exceeded: \$([\d.]+) spent \+ \$([\d.]+) reserved \+ \$([\d.]+) estimated "
                     r"> \$([\d.]+) budget", words)
    assert found and [float(x) for x in found.groups()][1:] == [1.0, 0.5, 1.2], words
    assert float(found[1]) == pytest.approx(books["spent_usd"], abs=0.01)
    assert "worker cap" not in words and len(words) > len(found[0])        # and what to do next
    (home.root / "g").touch()
    cost = lead.call("wait_for_worker", task_id=first)["cost_usd"]
    after = lead.call("budget_status")
    assert after["reserved_usd"] == 0.5 and after["workers_live"] == 1
    assert after["spent_usd"] == pytest.approx(books["spent_usd"] + cost, abs=0.01)
    third = lead.call("spawn_worker", prompt="$ hang")["task_id"]        # estimated by what the first cost
    assert lead.call("budget_status")["reserved_usd"] == pytest.approx(0.5 + cost)
    assert run.events("actor_added", actor=third)[0]["estimate"] == pytest.approx(cost)
    run.finish()


@pytest.mark.parametrize("model, usd", [("claude-opus-4-5", 2.0), ("claude-sonnet-4-6", 0.5),
                                        ("claude-haiku-4-5", 0.1)])
def test_the_first_estimate_goes_by_the_model(stage, model, usd):
    run = stage(budget=usd - 0.01)
    assert f"+ ${usd:.4f} estimated" in run.lead().refused("spawn_worker", prompt="$ say x", model=model)
    run.finish()


def test_later_estimates_are_the_upper_median_of_what_ran(stage):
    run = stage()
    lead = run.lead()
    costs = []
    for size in (1000, 30000, 8000, 60000):
        name = lead.call("spawn_worker", prompt=f"$ print {size} {size}")["task_id"]
        costs.append(lead.call("wait_for_worker", task_id=name)["cost_usd"])
    name = lead.call("spawn_worker", prompt="$ hang")["task_id"]
    assert len(set(costs)) == 4
    assert run.events("actor_added", actor=name)[0]["estimate"] == pytest.approx(sorted(costs)[2])
    run.finish()


def test_the_books_agree_with_the_records(stage):
    run = stage()
    lead = run.lead()
    names = [lead.call("spawn_worker", prompt=f"$ print {size} 500")["task_id"] for size in (1000, 5000, 20000)]
    records = [lead.call("wait_for_worker", task_id=name) for name in names]
    books = lead.call("budget_status")
    lead_usd = books["spent_usd"] - sum(r["cost_usd"] for r in records)
    assert books["reserved_usd"] == 0 and books["workers_live"] == 0 and lead_usd > 0
    final = run.finish()
    assert final["boss"]["cost_usd"] == pytest.approx(lead_usd, abs=0.01)
    assert {n: final[n] for n in names} == {r["task_id"]: r for r in records}
    assert run.summary()["total_cost_usd"] == pytest.approx(sum(r["cost_usd"] for r in final.values()))


def test_the_leads_own_spending_counts_while_it_runs(stage):
    run = stage(script="$ print 20000 2000\n$ hang", budget=0.51)
    lead = run.lead()
    wait_for(lambda: lead.call("budget_status")["spent_usd"] > 0.02, DEADLINE_S, "the lead's spending")
    assert "budget exceeded" in lead.refused("spawn_worker", prompt="$ say x")
    lead.call("spawn_worker", prompt="$ say x", model="claude-haiku-4-5")
    run.operator().op("cancel_run")
    run.settle(1)


def test_a_worker_has_what_its_lead_has(stage, home):
    run = stage(lead='model = "claude-haiku-4-5"\ntimeout_secs = 777\ntools = ["Bash"]\n'
                     'env = { COLOUR = "red", SHAPE = "round" }')
    lead = run.lead()
    asked = lead.call("spawn_worker", prompt="$ run echo $COLOUR $SHAPE $PITBOSS_TASK_ID >> out.txt")
    assert asked == {"task_id": asked["task_id"], "worktree_path": None}
    record = lead.call("wait_for_worker", task_id=asked["task_id"])
    assert (record["model"], record["agent"], record["role"]) == ("claude-haiku-4-5", "demo", "worker")
    assert record["parent_task_id"] == "boss"
    facts = run.events("actor_added", actor=asked["task_id"])[0]
    assert facts["timeout_s"] == 777 and facts["directory"] == str(run.repo)
    other = lead.call("spawn_worker", prompt="$ run echo $COLOUR $SHAPE >> out.txt", timeout_secs=33,
                      env={"SHAPE": "square"}, model="claude-opus-4-5", directory=".")["task_id"]
    assert lead.call("wait_for_worker", task_id=other)["model"] == "claude-opus-4-5"
    assert run.events("actor_added", actor=other)[0]["timeout_s"] == 33
    assert (run.repo / "out.txt").read_text() == f"red round {asked['task_id']}\nred square\n"
    run.finish()


def test_workers_get_worktrees_of_their_own_branch_and_the_path_is_told(stage):
    run = stage(defaults="", run="", lead="use_worktree = true")
    lead = run.lead()
    asked = lead.call("spawn_worker", prompt="$ write w.txt work\n$ commit w", branch="topic/one")
    record = lead.call("wait_for_worker", task_id=asked["task_id"])
    assert record["status"] == "Success" and record["branch"] == "topic/one" and record["worktree_path"] is None
    assert git(run.repo, "show", "topic/one:w.txt") == "work\n"
    kept = lead.call("spawn_worker", prompt="$ write w.txt loose")
    record = lead.call("wait_for_worker", task_id=kept["task_id"])
    assert record["worktree_path"] == kept["worktree_path"]
    assert Path(kept["worktree_path"], "w.txt").read_text() == "loose\n"
    run.finish()


def test_a_worker_in_another_repository_and_outside_of_one(stage, home):
    run = stage(lead="use_worktree = true")
    lead = run.lead()
    other = make_repo(home.root / "other")
    name = lead.call("spawn_worker", prompt="$ write w.txt x\n$ commit w", directory=str(other))["task_id"]
    record = lead.call("wait_for_worker", task_id=name)
    assert git(other, "show", f"{record['branch']}:w.txt") == "x\n"
    relative = lead.call("spawn_worker", prompt="$ write v.txt x\n$ commit v", directory="../other")["task_id"]
    assert lead.call("wait_for_worker", task_id=relative)["status"] == "Success"
    (home.root / "plain").mkdir()
    before = len(run.events("actor_added"))
    words = lead.refused("spawn_worker", prompt="$ say x", directory=str(home.root / "plain"))
    assert words.startswith("directory: ") and "git" in words
    words = lead.refused("spawn_worker", prompt="$ say x", directory=str(home.root / "missing"))
    assert words.startswith("directory: ") and "missing" in words
    words = lead.refused("spawn_worker", prompt="$ say x", directory=str(other / "file0.txt"))
    assert words.startswith("directory: ")
    assert len(run.events("actor_added")) == before
    run.finish()


def test_without_worktrees_a_worker_may_be_outside_of_a_repository(stage, home):
    run = stage()
    lead = run.lead()
    (home.root / "plain").mkdir()
    name = lead.call("spawn_worker", prompt="$ write x.txt here", directory="../plain")["task_id"]
    assert lead.call("wait_for_worker", task_id=name)["status"] == "Success"
    assert (home.root / "plain/x.txt").read_text() == "here\n"
    run.finish()


def test_a_prompt_of_a_megabyte_arrives_whole(stage):
    run = stage()
    lead = run.lead()
    text = "$ say got it\n" + "".join(f"{n:07d} ünï\n" for n in range(80_000)) + "the end"
    assert len(text.encode()) > 1 << 20
    name = lead.call("spawn_worker", prompt=text)["task_id"]
    assert lead.call("wait_for_worker", task_id=name)["final_message"] == "got it"
    assert run.heard(name) == [text]
    assert lead.call("worker_status", task_id=name)["prompt_preview"].startswith("$ say got it")
    run.finish()


# ------------------------------------------------------------------ waiting and looking

def test_wait_for_any_gives_the_first_that_settles_and_waits_time_out(stage, home):
    run = stage()
    lead = run.lead()
    names = [run.spawn(lead, gate(home.root / f"g{n}")) for n in range(3)]
    assert lead.call("wait_for_worker", task_id=names[0], timeout_secs=0) == {"settled": False, "state": "Running"}
    assert lead.call("wait_for_any", task_ids=names, timeout_secs=0.1) == {
        "settled": False, "states": {n: "Running" for n in names}}
    assert lead.call("kv_wait", path="/shared/x", timeout_secs=0.1) == {"settled": False, "entry": None}
    waiting = lead.start("wait_for_any", {"task_ids": names})
    (home.root / "g1").touch()
    answer = value_of(lead.answer(waiting))
    assert answer["task_id"] == names[1] and answer["record"]["status"] == "Success"
    again = lead.call("wait_for_any", task_ids=[names[2], names[1]])        # settled ones answer at once
    assert again["task_id"] == names[1]
    assert lead.call("wait_for_worker", target=names[1]) == again["record"]
    assert lead.call("wait_for_worker", actor_id=names[1]) == again["record"]
    run.finish()


def test_twelve_waits_of_one_connection_run_together(stage, home):
    run = stage()
    lead = run.lead()
    name = run.spawn(lead, gate(home.root / "g"))
    ids = [lead.start("wait_for_worker", {"task_id": name}) for _ in range(12)]
    assert lead.call("worker_status", task_id=name)["state"] == "Running"     # other calls are answered meanwhile
    (home.root / "g").touch()
    assert {value_of(lead.answer(i))["status"] for i in ids} == {"Success"}
    run.finish()


def test_a_cancelled_wait_is_not_answered_and_a_wait_of_another_connection_goes_on(stage, home):
    run = stage()
    lead, other = run.lead(), run.lead()
    name = run.spawn(lead, gate(home.root / "g"))
    gone, stays = lead.start("wait_for_worker", {"task_id": name}), other.start("wait_for_worker", {"task_id": name})
    lead.say({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": gone}})
    (home.root / "g").touch()
    assert value_of(other.answer(stays))["status"] == "Success"
    assert lead.call("wait_for_worker", task_id=name)["status"] == "Success"
    assert not any(line.get("id") == gone for line in lead.kept)
    run.finish()


def test_worker_status_and_list_workers_tell_how_workers_stand(stage, home):
    run = stage(workers=6)
    lead = run.lead()
    assert lead.call("list_workers") == {"workers": [], "subleads": []}
    one = run.spawn(lead, f"Do it well.\n$ say some words\n{gate(home.root / 'g')}")
    two = run.spawn(lead, "$ run sleep 600")
    three = run.spawn(lead, "$ run sleep 600")
    four = lead.call("spawn_worker", prompt="$ fail broken")["task_id"]
    lead.call("pause_worker", task_id=two)
    lead.call("pause_worker", task_id=three, mode="freeze")
    lead.call("wait_for_worker", task_id=four)
    status = wait_for(lambda: (s := lead.call("worker_status", task_id=one))["last_text_preview"] and s,
                      DEADLINE_S, "the worker's words")
    assert set(status) == {"state", "started_at", "partial_usage", "cost_usd", "last_text_preview", "prompt_preview"}
    assert status["state"] == "Running" and status["last_text_preview"] == "some words"
    assert status["prompt_preview"].startswith("Do it well.") and status["started_at"].endswith("Z")
    assert set(status["partial_usage"]) == {"input", "output", "cache_read", "cache_creation"}
    assert status["partial_usage"]["input"] > 0 and status["cost_usd"] > 0
    rows = lead.call("list_workers")["workers"]
    assert [(r["task_id"], r["state"]) for r in rows] == [
        (one, "Running"), (two, "Paused"), (three, "Frozen"), (four, "Failed")]
    assert all(set(r) == {"task_id", "state", "prompt_preview", "started_at"} for r in rows)
    failed = lead.call("worker_status", task_id=four)
    assert (failed["state"], failed["last_text_preview"]) == ("Failed", "broken")
    run.finish(1)


# ------------------------------------------------------------------ cancel, pause, continue, reprompt

def test_a_lead_cancels_its_worker_with_a_reason(stage):
    run = stage()
    lead = run.lead()
    name = run.spawn(lead, "$ run sleep 600")
    assert lead.call("cancel_worker", task_id=name, reason="not needed") == {"ok": True}
    record = lead.call("wait_for_worker", task_id=name)
    assert record["status"] == "Cancelled" and "not needed" in record["failure_reason"]["message"]
    assert "already" in lead.refused("cancel_worker", task_id=name)
    assert processes_with(f"{run.run.name}:{name}:") == {}
    records = run.finish(1)
    assert run.summary()["tasks_failed"] == 1 and records["boss"]["status"] == "Success"
    assert not any("[SYSTEM]" in text for text in run.heard("boss"))       # it knows what it did itself


def test_an_operators_reason_reaches_the_lead_as_a_message(stage, home):
    run = stage()
    lead = run.lead()
    name = run.spawn(lead, "$ run sleep 600")
    operator = run.operator()
    assert operator.op("cancel_worker", task_id=name, reason="wrong branch") == {
        "event": "op_acked", "op": "cancel_worker", "task_id": name}
    run.gate.touch()
    records = run.settle(1)
    told = [t for t in run.heard("boss") if t.startswith("[SYSTEM] ")]
    assert len(told) == 1 and name in told[0] and "wrong branch" in told[0]
    assert records[name]["status"] == "Cancelled" and records["boss"]["status"] == "Success"
    assert records["boss"]["hands"] == 1 and run.events("stop_decided", actor="boss") == []


def test_a_reason_waits_for_a_paused_lead(stage):
    run = stage()
    lead, operator = run.lead(), run.operator()
    name = run.spawn(lead, "$ run sleep 600")
    assert operator.op("pause_worker", task_id="boss")["event"] == "op_acked"
    operator.op("cancel_worker", task_id=name, reason="wrong branch")
    wait_for(lambda: run.events("closed", actor=name), DEADLINE_S, "the worker's end")
    assert run.events("hand_started", actor="boss")[-1]["hand"] == 1
    run.gate.touch()
    assert operator.op("continue_worker", task_id="boss")["event"] == "op_acked"
    records = run.settle(1)
    last = run.heard("boss")[-1]
    assert "[SYSTEM]" in last and "wrong branch" in last and name in last
    assert records["boss"]["hands"] == 2 and records["boss"]["pause_count"] == 1


def test_a_worker_without_a_reason_is_cancelled_in_silence(stage):
    run = stage()
    name = run.spawn(run.lead(), "$ run sleep 600")
    run.operator().op("cancel_worker", task_id=name)
    wait_for(lambda: run.events("closed", actor=name), DEADLINE_S, "the worker's end")
    run.finish(1)
    assert len(run.heard("boss")) == 1


def test_a_paused_worker_goes_on_in_its_session(stage, home):
    run = stage(lead="use_worktree = true")
    lead = run.lead()
    script = f"$ append p.txt a\n{gate(home.root / 'g')}\n$ append p.txt b\n$ commit p"
    name = lead.call("spawn_worker", prompt=script)["task_id"]
    log = run.run / "tasks" / name / "stdout.log"
    wait_for(lambda: log.exists() and log.read_bytes().count(b'"tool_use"') == 2, DEADLINE_S, "the gate")
    assert lead.call("pause_worker", task_id=name) == {"ok": True}
    assert lead.call("worker_status", task_id=name)["state"] == "Paused"
    assert processes_with(f"{run.run.name}:{name}:") == {}
    assert "Paused" in lead.refused("pause_worker", task_id=name)
    (home.root / "g").touch()
    assert lead.call("continue_worker", task_id=name) == {"ok": True}
    record = lead.call("wait_for_worker", task_id=name)
    assert (record["status"], record["hands"], record["pause_count"]) == ("Success", 2, 1)
    assert git(run.repo, "show", f"{record['branch']}:p.txt") == "a\nb\n"
    assert run.heard(name)[1:] == ["continue"]
    sessions = {e["session_id"] for e in run.events("hand_dealt", actor=name)}
    assert sessions == {record["claude_session_id"]}
    run.finish()


def test_continue_with_a_prompt_says_that_instead(stage):
    run = stage()
    lead = run.lead()
    name = run.spawn(lead, "$ run sleep 600")
    lead.call("pause_worker", task_id=name, mode="cancel")
    lead.call("continue_worker", task_id=name, prompt="$ say something else")
    record = lead.call("wait_for_worker", task_id=name)
    assert record["final_message"] == "something else" and run.heard(name)[1:] == ["$ say something else"]
    assert "Completed" in lead.refused("continue_worker", task_id=name)
    run.finish()


def states_of(marker: str) -> dict[int, str]:
    """Pid to the letter of its state, of the processes whose environment holds a marker."""
    found = {}
    for pid in processes_with(marker):
        try:
            found[pid] = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
    return found


def test_freezing_stops_every_process_and_continuing_lets_them_go_on(stage, home):
    run = stage()
    lead = run.lead()
    name = run.spawn(lead, f"{gate(home.root / 'g')}\n$ call kv_set {json.dumps({'path': '/shared/x', 'value': 'y'})}")
    marker = f"{run.run.name}:{name}:"
    wait_for(lambda: len(processes_with(marker)) >= 3, DEADLINE_S, "shim, agent and its shell")
    assert lead.call("pause_worker", task_id=name, mode="freeze") == {"ok": True}
    # one that waits for a busy processor stops before its next step, and shows R until then
    states = wait_for(lambda: set((found := states_of(marker)).values()) == {"T"} and found, DEADLINE_S, "all to stand still")
    assert len(states) >= 3, states
    assert lead.call("worker_status", task_id=name)["state"] == "Frozen"
    assert "Frozen" in lead.refused("reprompt_worker", task_id=name, prompt="x")
    assert lead.refused("pause_worker", task_id=name, mode="freeze")
    (home.root / "g").touch()
    assert lead.call("continue_worker", task_id=name) == {"ok": True}
    assert lead.call("wait_for_worker", task_id=name)["status"] == "Success"
    assert lead.call("kv_get", path="/shared/x")["entry"]["written_by"] == name
    run.finish()


def test_a_frozen_worker_is_given_its_prompt_after_the_thaw(stage):
    run = stage()
    lead = run.lead()
    name = run.spawn(lead, "$ run sleep 600")
    lead.call("pause_worker", task_id=name, mode="freeze")
    lead.call("continue_worker", task_id=name, prompt="$ say thawed")
    record = lead.call("wait_for_worker", task_id=name)
    assert (record["status"], record["final_message"], record["hands"]) == ("Success", "thawed", 1)
    run.finish()


def test_a_frozen_worker_can_be_cancelled(stage):
    run = stage()
    lead = run.lead()
    name = run.spawn(lead, "$ run sleep 600")
    lead.call("pause_worker", task_id=name, mode="freeze")
    lead.call("cancel_worker", task_id=name)
    assert lead.call("wait_for_worker", task_id=name)["status"] == "Cancelled"
    assert processes_with(f"{run.run.name}:{name}:") == {}
    run.finish(1)


def test_a_hanging_worker_is_redirected_by_its_input(stage):
    run = stage()
    lead = run.lead()
    name = run.spawn(lead, "$ say begun\n$ run sleep 600\n$ say never")
    log = run.run / "tasks" / name / "stdout.log"
    wait_for(lambda: b"sleep 600" in log.read_bytes(), DEADLINE_S, "the hanging tool")
    began = time.monotonic()
    assert lead.call("reprompt_worker", task_id=name, prompt="$ say redirected") == {"ok": True, "delivery": "input"}
    assert time.monotonic() - began < 15
    record = lead.call("wait_for_worker", task_id=name)
    assert (record["status"], record["final_message"], record["hands"]) == ("Success", "redirected", 1)
    assert run.events("stop_decided", actor=name) == []        # the interrupt did it, not the stop ladder
    assert record["reprompt_count"] == 1
    assert run.heard(name)[-1] == "$ say redirected"
    run.finish()


def test_a_worker_is_redirected_before_it_has_said_anything(stage):
    """Its turn has not begun when the order comes: the interrupt waits for it, and reaches it."""
    run = stage()
    lead = run.lead()
    name = lead.call("spawn_worker", prompt="$ run sleep 600\n$ say never")["task_id"]
    wait_for(lambda: lead.call("worker_status", task_id=name)["state"] == "Running", DEADLINE_S, "its process")
    assert lead.call("reprompt_worker", task_id=name, prompt="$ say redirected") == {"ok": True, "delivery": "input"}
    record = lead.call("wait_for_worker", task_id=name)
    assert (record["status"], record["final_message"], record["hands"]) == ("Success", "redirected", 1)
    assert run.events("stop_decided", actor=name) == []        # the interrupt did it, not the stop ladder
    run.finish()


@pytest.mark.parametrize("inbox, ends", [((), True), ((pitboss.Message("m", "x", True),), False)])
def test_who_took_a_message_up_late_is_not_dealt_again(inbox, ends):
    actor = pitboss.Actor("w", "worker", "demo", "m", "/d", False, 60, None, stop="redirect", inbox=inbox)
    talk = pitboss.Talk("m")
    talk.began, talk.results, talk.result = True, 2, {"type": "result", "is_error": False, "result": "redirected"}
    facts = pitboss.decide_hand_end(actor, talk, pitboss.Ending(0, None), 1000.0)
    assert facts == ({"status": "Success", "reason": None} if ends else {"again": "resume", "cause": "redirect"})


def test_messages_that_come_together_all_arrive(stage):
    """Two redirections at once, and two reasons for the lead before it has taken up the first."""
    run = stage()
    lead, operator = run.lead(), run.operator()
    names = [run.spawn(lead, "$ run sleep 600") for _ in range(3)]
    ids = [lead.start("reprompt_worker", {"task_id": names[0], "prompt": f"$ say {word}"}) for word in ("one", "two")]
    assert [value_of(lead.answer(i))["ok"] for i in ids] == [True, True]
    assert set(run.heard(names[0])[1:]) == {"$ say one", "$ say two"}
    assert lead.call("wait_for_worker", task_id=names[0])["status"] == "Success"
    for name in names[1:]:
        operator.op("cancel_worker", task_id=name, reason=f"no {name}")
    run.finish(1)
    told = "\n".join(run.heard("boss"))
    assert all(f"no {name}" in told for name in names[1:])


def test_an_agent_that_takes_no_input_is_redirected_by_a_new_hand(stage):
    run = stage(more='[agent.plain]\ncommand = ["sh", "-c", "grep -q GOON \\"$0\\" && echo went on && exit 0; '
                     'echo begun; exec sleep 600", "{prompt_file}"]\nformat = "text"')
    lead = run.lead()
    name = lead.call("spawn_worker", prompt="wait", agent="plain")["task_id"]
    log = run.run / "tasks" / name / "stdout.log"
    wait_for(lambda: log.exists() and b"begun" in log.read_bytes(), DEADLINE_S, "the agent")
    began = time.monotonic()
    assert lead.call("reprompt_worker", task_id=name, prompt="GOON") == {"ok": True, "delivery": "resume"}
    assert time.monotonic() - began < 30
    record = lead.call("wait_for_worker", task_id=name)
    assert (record["status"], record["hands"], record["reprompt_count"]) == ("Success", 2, 1)
    assert "went on" in record["final_message"]
    run.finish()


@pytest.mark.slow
def test_a_deaf_agent_is_redirected_by_a_new_hand_of_its_session(stage):
    """It takes the message and never echoes it: after ten seconds the stop ladder, then the session again."""
    run = stage()
    lead = run.lead()
    name = run.spawn(lead, "$ say begun\n$ ignore\n$ run sleep 600")
    log = run.run / "tasks" / name / "stdout.log"
    wait_for(lambda: b"sleep 600" in log.read_bytes(), DEADLINE_S, "the hanging tool")
    assert lead.call("reprompt_worker", task_id=name, prompt="$ say redirected") == {"ok": True, "delivery": "resume"}
    record = lead.call("wait_for_worker", task_id=name)
    assert (record["status"], record["final_message"], record["hands"]) == ("Success", "redirected", 2)
    assert {e["session_id"] for e in run.events("hand_dealt", actor=name)} == {record["claude_session_id"]}
    run.finish()


def test_a_paused_worker_is_reprompted_by_a_new_hand(stage):
    run = stage()
    lead = run.lead()
    name = run.spawn(lead, "$ run sleep 600")
    lead.call("pause_worker", task_id=name)
    assert lead.call("reprompt_worker", task_id=name, prompt="$ say other") == {"ok": True, "delivery": "resume"}
    record = lead.call("wait_for_worker", task_id=name)
    assert (record["status"], record["final_message"]) == ("Success", "other")
    assert "Completed" in lead.refused("reprompt_worker", task_id=name, prompt="more")
    run.finish()


@pytest.mark.slow
def test_frozen_and_paused_time_does_not_count_towards_the_timeout(stage, home):
    run = stage()
    lead = run.lead()
    script = gate(home.root / "g") + "\n$ sleep 1"          # long enough that somebody looks at the time
    frozen = run.spawn(lead, script, timeout_secs=4)
    lead.call("pause_worker", task_id=frozen, mode="freeze")
    paused = run.spawn(lead, script, timeout_secs=4)
    lead.call("pause_worker", task_id=paused)
    clock = run.spawn(lead, "$ hang", timeout_secs=6)        # begins later and is done for before they go on
    record = lead.call("wait_for_worker", task_id=clock)
    assert record["status"] == "TimedOut" and record["duration_ms"] >= 6000
    (home.root / "g").touch()
    for name in (frozen, paused):
        assert lead.call("worker_status", task_id=name)["state"] in ("Frozen", "Paused")
        lead.call("continue_worker", task_id=name)
        done = lead.call("wait_for_worker", task_id=name)
        assert done["status"] == "Success" and done["duration_ms"] >= 6000
    run.finish(1)


# ------------------------------------------------------------------ how a lead ends

def test_the_leads_success_ends_its_workers_and_is_a_success(stage):
    run = stage()
    lead = run.lead()
    names = [run.spawn(lead, "$ run sleep 600") for _ in range(3)]
    lead.call("pause_worker", task_id=names[1])
    lead.call("pause_worker", task_id=names[2], mode="freeze")
    records = run.finish(0)
    for name in names:
        assert records[name]["status"] == "Cancelled"
        assert records[name]["failure_reason"]["message"].startswith("the lead ended")
    summary = run.summary()
    assert (summary["tasks_total"], summary["tasks_failed"]) == (4, 0)
    assert processes_with(f"PITBOSS_RUN_ID={run.run.name}") == {}


def test_a_worker_that_failed_by_itself_fails_the_run(stage):
    run = stage()
    lead = run.lead()
    name = lead.call("spawn_worker", prompt="$ fail broken")["task_id"]
    lead.call("wait_for_worker", task_id=name)
    run.finish(1)
    assert run.summary()["tasks_failed"] == 1


def test_the_leads_failure_ends_its_workers_and_they_count(stage, home):
    run = stage(script=f"{gate(home.root / 'lead.gate')}\n$ fail no luck")
    lead = run.lead()
    name = run.spawn(lead, "$ run sleep 600")
    records = run.finish(1)
    assert (records["boss"]["status"], records[name]["status"]) == ("Failed", "Cancelled")
    assert records[name]["failure_reason"]["message"].startswith("the lead ended")
    assert run.summary()["tasks_failed"] == 2


@pytest.mark.slow
def test_a_lead_times_out_and_takes_its_workers_along(stage):
    run = stage(script="$ hang", run="lead_timeout_secs = 4")
    name = run.lead().call("spawn_worker", prompt="$ run sleep 600", timeout_secs=60)["task_id"]
    records = run.settle(1)
    assert (records["boss"]["status"], records[name]["status"]) == ("TimedOut", "Cancelled")
    assert run.summary()["tasks_failed"] == 2


def test_a_paused_lead_has_not_ended(stage, home):
    run = stage()
    lead, operator = run.lead(), run.operator()
    name = run.spawn(lead, f"{gate(home.root / 'g')}\n$ say worker done")
    assert operator.op("pause_worker", task_id="boss")["event"] == "op_acked"
    (home.root / "g").touch()
    wait_for(lambda: run.events("closed", actor=name), DEADLINE_S, "the worker's end")
    run.gate.touch()
    assert operator.op("continue_worker", task_id="boss")["event"] == "op_acked"
    records = run.settle(0)
    assert {r["status"] for r in records.values()} == {"Success"}
    assert f"{name}: Completed" in run.heard("boss")[-1]


def test_a_frozen_lead_leaves_its_workers_running(stage, home):
    run = stage()
    lead, operator = run.lead(), run.operator()
    name = run.spawn(lead, f"{gate(home.root / 'g')}\n$ say worker done")
    assert operator.op("pause_worker", task_id="boss", mode="freeze")["event"] == "op_acked"
    wait_for(lambda: {"T"} <= set(states_of(f"{run.run.name}:boss:").values()) <= {"T", "D"}, DEADLINE_S,
             "all to stand still")             # D: sh, while what it vforked is stopped
    (home.root / "g").touch()
    wait_for(lambda: run.events("closed", actor=name), DEADLINE_S, "the worker's end")
    assert operator.op("continue_worker", task_id="boss")["event"] == "op_acked"
    records = run.finish(0)
    assert {r["status"] for r in records.values()} == {"Success"}


def test_a_draining_run_takes_no_new_workers_and_lets_the_old_ones_end(stage, home):
    run = stage()
    lead = run.lead()
    name = run.spawn(lead, gate(home.root / "g"))
    run.process.send_signal(signal.SIGINT)
    wait_for(lambda: run.events("drained"), DEADLINE_S, "the drain")
    assert lead.refused("spawn_worker", prompt="$ say x").startswith("run is draining: no new workers accepted")
    (home.root / "g").touch()
    assert lead.call("wait_for_worker", task_id=name)["status"] == "Success"
    records = run.finish(130)
    assert records["boss"]["status"] == "Success"


def test_cancelling_the_run_ends_everything(stage, home):
    run = stage()
    lead = run.lead()
    names = [run.spawn(lead, "$ run sleep 600") for _ in range(3)]
    home.pitboss("cancel", run.run.name, check=0)
    records = run.settle(1)
    assert set(records) == {"boss", *names} and {r["status"] for r in records.values()} == {"Cancelled"}
    assert run.summary()["was_interrupted"] is True
    assert processes_with(f"PITBOSS_RUN_ID={run.run.name}") == {}


# ------------------------------------------------------------------ who is who

LEADS_ONLY = {"spawn_worker", "worker_status", "wait_for_worker", "wait_for_any", "list_workers", "cancel_worker",
              "pause_worker", "continue_worker", "reprompt_worker", "budget_status"}
SHARED = {"kv_get", "kv_set", "kv_cas", "kv_delete", "kv_list", "kv_wait", "lease_acquire", "lease_release",
          "lease_list", "run_lease_acquire", "run_lease_release"}


def tools_of(caller: Caller) -> dict:
    return {t["name"]: t for t in caller.ask("tools/list")["result"]["tools"]}


def test_a_worker_has_the_shared_tools_alone(stage):
    run = stage()
    lead = run.lead()
    name = run.spawn(lead, "$ hang")
    worker = run.worker(name)
    assert LEADS_ONLY | SHARED <= set(tools_of(lead)) and "spawn_sublead" not in tools_of(lead)
    assert set(tools_of(worker)) == SHARED
    for tool in sorted(LEADS_ONLY) + ["spawn_sublead", "no_such_tool"]:
        assert worker.refused(tool, task_id=name).startswith("forbidden: "), tool
    assert len(run.events("actor_added")) == 2
    run.finish()


def test_a_worker_that_asks_for_a_worker_through_its_own_bridge_is_refused(stage):
    run = stage()
    lead = run.lead()
    script = '$ call spawn_worker {"prompt": "$ say x"}\n$ call kv_set {"path": "/shared/x", "value": "mine"}'
    name = lead.call("spawn_worker", prompt=script)["task_id"]
    assert lead.call("wait_for_worker", task_id=name)["status"] == "Success"
    assert b"forbidden: a worker has no tool" in (run.run / "tasks" / name / "stdout.log").read_bytes()
    assert lead.call("kv_get", path="/shared/x")["entry"]["written_by"] == name
    assert len(run.events("actor_added")) == 2
    run.finish()


@pytest.mark.parametrize("actor, token", [("boss", "0" * 32), ("boss", ""), ("worker-1", "0" * 32),
                                          ("nobody", "0" * 32), ("../boss", ""), ("", "")])
def test_a_wrong_token_is_refused_and_the_connection_ends(house, actor, token):
    caller = house.kept(Caller(house.socket("mcp"), actor, token))
    assert "refused" in caller.greeting["error"]["message"]
    assert caller.hear() is None


def test_a_token_of_another_actor_is_refused(stage):
    run = stage()
    lead = run.lead()
    name = run.spawn(lead, "$ hang")
    for actor, owner in ((name, "boss"), ("boss", name)):
        caller = run.kept(Caller(run.socket("mcp"), actor, run.token(owner)))
        assert "error" in caller.greeting and caller.hear() is None
    run.finish()


def test_nothing_but_the_token_says_who_somebody_is(stage):
    """The role of the greeting, `_meta` and arguments change nothing."""
    run = stage()
    lead = run.lead()
    name = run.spawn(lead, "$ hang")
    worker = run.worker(name, role="lead")
    meta = {"actor_id": "boss", "actor_role": "lead", "token": run.token("boss")}
    number = worker.start("kv_set", {"path": "/peer/self/x", "value": "v"}, _meta=meta)
    value_of(worker.answer(number))
    assert lead.call("kv_get", path=f"/peer/{name}/x")["entry"]["written_by"] == name
    assert words_of(worker.answer(worker.start("spawn_worker", {"prompt": "$ say x"}, _meta=meta))).startswith("forbidden")
    assert "actor_id" in worker.refused("kv_set", path="/shared/x", value="v", actor_id="boss")
    assert set(tools_of(worker)) == SHARED
    run.finish()


def test_nobody_acts_on_itself_or_on_whom_there_is_not(house):
    lead = house.lead()
    for tool, more in (("cancel_worker", {}), ("pause_worker", {}), ("continue_worker", {}), ("worker_status", {}),
                       ("reprompt_worker", {"prompt": "x"}), ("wait_for_worker", {"timeout_secs": 1})):
        assert lead.refused(tool, task_id="boss", **more).startswith("forbidden: "), tool
        assert lead.refused(tool, task_id="worker-99", **more).startswith("unknown task_id: worker-99"), tool
    assert lead.refused("wait_for_any", task_ids=["worker-99"]).startswith("unknown task_id: worker-99")


# ------------------------------------------------------------------ bad input

@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """One run for all that changes nothing in it; it has one worker that hangs."""
    home = Home(tmp_path_factory.mktemp("house"))
    run = Stage(home, workers=2)
    run.spawn(run.lead(), "$ hang")
    yield run
    assert len(run.events("actor_added")) == 2, "what was refused has spawned a worker"
    assert not (run.run / "sockets.log").exists(), (run.run / "sockets.log").read_text()
    run.end()
    home.end_everything()


BAD_CALLS = [
    # tool                arguments                                             words of the refusal
    ("spawn_worker",      {},                                                   ["prompt", "required"]),
    ("spawn_worker",      {"prompt": ""},                                       ["prompt", "empty"]),
    ("spawn_worker",      {"prompt": " \n\t"},                                  ["prompt", "empty"]),
    ("spawn_worker",      {"prompt": 7},                                        ["prompt", "7", "text"]),
    ("spawn_worker",      {"prompt": None},                                     ["prompt"]),
    ("spawn_worker",      {"prompt": ["x"]},                                    ["prompt", "text"]),
    ("spawn_worker",      {"prompt": "x", "promt": "y"},                        ["promt", "prompt"]),
    ("spawn_worker",      {"prompt": "x", "timeout_secs": 0},                   ["timeout_secs", ">= 1"]),
    ("spawn_worker",      {"prompt": "x", "timeout_secs": -1},                  ["timeout_secs"]),
    ("spawn_worker",      {"prompt": "x", "timeout_secs": 1.5},                 ["timeout_secs", "integer"]),
    ("spawn_worker",      {"prompt": "x", "timeout_secs": True},                ["timeout_secs", "true"]),
    ("spawn_worker",      {"prompt": "x", "timeout_secs": "60"},                ["timeout_secs", "60"]),
    ("spawn_worker",      {"prompt": "x", "timeout_secs": 1 << 70},             ["timeout_secs"]),
    ("spawn_worker",      {"prompt": "x", "agent": "nobody"},                   ["agent", "nobody", "demo"]),
    ("spawn_worker",      {"prompt": "x", "tools": "Bash"},                     ["tools", "list"]),
    ("spawn_worker",      {"prompt": "x", "tools": [1]},                        ["tools", "texts"]),
    ("spawn_worker",      {"prompt": "x", "env": {"A": 1}},                     ["env"]),
    ("spawn_worker",      {"prompt": "x", "env": {"A=B": "1"}},                 ["A=B"]),
    ("spawn_worker",      {"prompt": "x", "env": {"": "1"}},                    ["env"]),
    ("spawn_worker",      {"prompt": "x", "env": {"A": "a\0b"}},                ["env"]),
    ("spawn_worker",      {"prompt": "x", "env": ["A"]},                        ["env"]),
    ("spawn_worker",      {"prompt": "x", "branch": "no..pe"},                  ["branch", "no..pe"]),
    ("spawn_worker",      {"prompt": "x", "branch": ""},                        ["branch"]),
    ("spawn_worker",      {"prompt": "x", "branch": "-x"},                      ["branch"]),
    ("spawn_worker",      {"prompt": "x", "directory": "/no/such/folder"},      ["directory", "/no/such/folder"]),
    ("spawn_worker",      {"prompt": "x", "directory": ""},                     ["directory"]),
    ("spawn_worker",      {"prompt": "x", "directory": "a\0b"},                 ["directory"]),
    ("spawn_worker",      {"prompt": "x", "directory": 3},                      ["directory"]),
    ("spawn_worker",      {"prompt": "x", "model": ""},                         ["model"]),
    ("spawn_worker",      {"prompt": "x\0y"},                                   ["prompt", "NUL"]),
    ("worker_status",     {},                                                   ["task_id", "required"]),
    ("worker_status",     {"task_id": ""},                                      ["task_id"]),
    ("worker_status",     {"task_id": 5},                                       ["task_id", "5"]),
    ("worker_status",     {"task_id": "worker-1", "target": "worker-2"},        ["task_id", "target"]),
    ("worker_status",     {"task_id": "x" * 5000},                              ["unknown task_id"]),
    ("wait_for_worker",   {"task_id": "worker-1", "timeout_secs": -1},          ["timeout_secs", ">= 0"]),
    ("wait_for_worker",   {"task_id": "worker-1", "timeout_secs": "1"},         ["timeout_secs"]),
    ("wait_for_any",      {"task_ids": []},                                     ["task_ids", "empty"]),
    ("wait_for_any",      {"task_ids": "worker-1"},                             ["task_ids", "list"]),
    ("wait_for_any",      {"task_ids": [1]},                                    ["task_ids"]),
    ("wait_for_any",      {},                                                   ["task_ids", "required"]),
    ("list_workers",      {"layer": "x"},                                       ["layer", "unknown"]),
    ("budget_status",     {"x": 1},                                             ["x", "unknown"]),
    ("cancel_worker",     {"task_id": "worker-1", "reason": 4},                 ["reason"]),
    ("pause_worker",      {"task_id": "worker-1", "mode": "stop"},              ["mode", "stop", "cancel, freeze"]),
    ("continue_worker",   {"task_id": "worker-1"},                              ["worker-1 is Running"]),
    ("reprompt_worker",   {"task_id": "worker-1"},                              ["prompt", "required"]),
    ("reprompt_worker",   {"task_id": "worker-1", "prompt": ""},                ["prompt", "empty"]),
    ("reprompt_worker",   {"task_id": "worker-1", "prompt": "  "},              ["prompt", "empty"]),
    ("kv_get",            {},                                                   ["path", "required"]),
    ("kv_get",            {"path": "shared/x"},                                 ["path", "/shared/"]),
    ("kv_get",            {"path": "/shared/../ref/x"},                         ["path", ".."]),
    ("kv_get",            {"path": "/shared//x"},                               ["path"]),
    ("kv_get",            {"path": "/other/x"},                                 ["path", "/shared/"]),
    ("kv_get",            {"path": "/peer/worker-99/x"},                        ["forbidden", "worker-99"]),
    ("kv_get",            {"path": "/sub/x/shared/y"},                          ["forbidden"]),
    ("kv_get",            {"path": "/leases/x"},                                ["forbidden", "lease_acquire"]),
    ("kv_set",            {"path": "/shared/x"},                                ["value", "required"]),
    ("kv_set",            {"path": "/shared/x", "value": 5},                    ["value", "5"]),
    ("kv_set",            {"path": "/shared/x", "value": None},                 ["value"]),
    ("kv_set",            {"path": "/shared/x", "value": [256]},                ["value", "bytes"]),
    ("kv_set",            {"path": "/shared/x", "value": [True]},               ["value"]),
    ("kv_set",            {"path": "/shared/x", "value": {"base64": "!"}},      ["value", "base64"]),
    ("kv_set",            {"path": "/shared/x", "value": {"a": 1}},             ["value"]),
    ("kv_set",            {"path": "/shared/x", "value": "x" * ((1 << 20) + 1)}, ["value", "1048577", "1048576"]),
    ("kv_set",            {"path": "/peer/worker-1/x", "value": "x"},           ["forbidden", "override_flag"]),
    ("kv_set",            {"path": "/shared/" + "x" * 2000, "value": "x"},      ["path", "1024"]),
    ("kv_cas",            {"path": "/shared/x", "expected_version": -1, "new_value": "x"}, ["expected_version"]),
    ("kv_cas",            {"path": "/shared/x", "expected_version": 0},         ["new_value", "required"]),
    ("kv_cas",            {"path": "/shared/x", "expected_version": 0, "value": "x"}, ["value", "new_value"]),
    ("kv_delete",         {"path": "/shared/x", "override_flag": "yes"},        ["override_flag", "true or false"]),
    ("kv_list",           {"glob": ""},                                         ["glob"]),
    ("kv_wait",           {"path": "/shared/x"},                                ["timeout_secs", "required"]),
    ("kv_wait",           {"path": "/shared/x", "timeout_secs": 0, "min_version": 0}, ["min_version"]),
    ("lease_acquire",     {"name": "x"},                                        ["ttl_secs", "required"]),
    ("lease_acquire",     {"name": "x", "ttl_secs": 0},                         ["ttl_secs"]),
    ("lease_acquire",     {"name": "", "ttl_secs": 1},                          ["name"]),
    ("lease_acquire",     {"name": "x", "ttl_secs": 1, "wait_secs": -1},        ["wait_secs"]),
    ("lease_release",     {"lease_id": "nothing"},                              ["unknown lease_id"]),
    ("run_lease_release", {},                                                   ["lease_id", "key"]),
    ("run_lease_acquire", {"name": "x", "ttl_secs": 1},                         ["name", "key"]),
    ("no_such_tool",      {},                                                   ["forbidden", "no_such_tool"]),
    ("spawn_wroker",      {"prompt": "x"},                                      ["spawn_worker"]),
    ("",                  {},                                                   ["forbidden"]),
]


@pytest.mark.parametrize("tool, arguments, words", BAD_CALLS,
                         ids=[f"{n}-{row[0]}" for n, row in enumerate(BAD_CALLS)])
def test_bad_arguments_are_named_and_change_nothing(house, tool, arguments, words):
    lead = house.clients[0]
    before = house.events("kv_written", "lease_granted", "lease_queued", "actor_added", "reprompted", "pause_decided")
    said = words_of(lead.answer(lead.start(tool, arguments)))
    assert all(word in said for word in words), said
    assert len(said) < 3000 and "Traceback" not in said
    assert before == house.events("kv_written", "lease_granted", "lease_queued", "actor_added", "reprompted",
                                  "pause_decided")
    assert lead.ask("ping")["result"] == {}


def line(method: str = "tools/call", number="n", **params) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params}).encode()


BAD_LINES = [
    # bytes of a line                                                      code       id
    (b"this is not JSON",                                                  -32700,    None),
    (b"\xff\xfe",                                                          -32700,    None),
    (b'{"jsonrpc":"2.0","id":"n","method":"ping"',                         -32700,    None),
    (b'{"jsonrpc":"2.0","id":"n","method":"ping","params":{"x":NaN}}',     -32700,    None),
    (b"[" * 100_000,                                                       -32700,    None),
    (b"7",                                                                 -32600,    None),
    (b"[]",                                                                -32600,    None),
    (b'{"id":"n","method":"ping"}',                                        -32600,    "n"),
    (b'{"jsonrpc":"1.0","id":"n","method":"ping"}',                        -32600,    "n"),
    (b'{"jsonrpc":"2.0","id":{},"method":"ping"}',                         -32600,    None),
    (line("no/method"),                                                    -32601,    "n"),
    (line("tools/call", name=7),                                           -32602,    "n"),
    (line("tools/call", name="kv_get", arguments=[]),                      -32602,    "n"),
    (line("tools/call", name="kv_get", arguments="x"),                     -32602,    "n"),
    (line("tools/call"),                                                   -32602,    "n"),
    (b'{"jsonrpc":"2.0","id":"n","method":"tools/call","params":[1]}',     -32602,    "n"),
    (b"x" * (17 << 20),                                                    -32600,    None),
]


@pytest.mark.parametrize("data, code, number", BAD_LINES, ids=range(len(BAD_LINES)))
def test_faults_of_the_protocol_are_answered_and_the_connection_lives(house, data, code, number):
    lead = house.lead()
    lead.say(data)
    answer = lead.hear()
    assert answer["error"]["code"] == code and answer["id"] == number, answer
    assert lead.call("budget_status")["max_workers"] == 2
    lead.close()


def test_a_line_of_almost_sixteen_mebibytes_is_taken(house):
    lead = house.lead()
    words = lead.refused("kv_set", path="/shared/x", value="x" * ((16 << 20) - 500))
    assert "1048576" in words
    lead.close()


# ------------------------------------------------------------------ schemas

def test_every_tool_says_what_it_is(house):
    lead = house.lead()
    for name, tool in tools_of(lead).items():
        assert set(tool) >= {"name", "title", "description", "inputSchema", "outputSchema", "annotations"}, name
        for word in ("inputSchema", "outputSchema"):
            list(json_schema.schemas_in(tool[word]))         # no keyword that the evaluator does not know
            assert tool[word]["type"] == "object"
        writes = name in ("kv_set", "kv_cas", "kv_delete", "lease_acquire", "lease_release", "run_lease_acquire",
                          "run_lease_release", "cancel_worker", "pause_worker", "continue_worker", "reprompt_worker")
        assert name not in LEADS_ONLY | SHARED or tool["annotations"]["readOnlyHint"] is not writes, name
    lead.close()


@pytest.mark.parametrize("number", range(len(BAD_CALLS)), ids=[f"{n}-{r[0]}" for n, r in enumerate(BAD_CALLS)])
def test_what_an_input_schema_refuses_is_refused(house, number):
    """A schema may let pass what a handler then refuses, never the other way round."""
    tool, arguments, words = BAD_CALLS[number]
    schema = tools_of(house.clients[0]).get(tool, {}).get("inputSchema")
    shape = {"required", "unknown"} & set(words)
    if schema and shape and "key" not in words:
        assert json_schema.faults(schema, arguments)


def test_every_result_is_what_its_output_schema_says(stage, home):
    """Every tool, in each of its shapes: settled or not, found or not, granted or refused."""
    run = stage(workers=8)
    lead = run.lead()
    tools, seen = tools_of(lead), set()

    def call(tool: str, **arguments) -> dict:
        assert json_schema.faults(tools[tool]["inputSchema"], arguments) == [], (tool, arguments)
        value = lead.call(tool, **arguments)
        assert json_schema.faults(tools[tool]["outputSchema"], value) == [], (tool, value)
        seen.add(tool)
        return value

    one = call("spawn_worker", prompt=gate(home.root / "g"))["task_id"]
    tree = call("spawn_worker", prompt="$ fail x", directory=str(run.repo), timeout_secs=60, tools=["Bash"],
                env={"A": "b"}, model="claude-haiku-4-5", agent="demo", branch="x/y")["task_id"]
    run.running(lead, one)
    assert call("wait_for_worker", task_id=tree)["status"] == "Failed"
    for name in (one, tree):
        call("worker_status", task_id=name)
    assert call("wait_for_worker", task_id=one, timeout_secs=0.01)["settled"] is False
    assert call("wait_for_any", task_ids=[one], timeout_secs=0.01)["settled"] is False
    assert call("wait_for_any", task_ids=[one, tree])["task_id"] == tree
    call("list_workers")
    call("budget_status")
    call("pause_worker", task_id=one, mode="freeze")
    call("continue_worker", task_id=one)
    call("pause_worker", task_id=one)
    call("continue_worker", task_id=one, prompt="go on")
    run.running(lead, one)
    assert call("reprompt_worker", task_id=one, prompt="$ say here\n$ hang")["delivery"] in ("input", "resume")
    call("cancel_worker", task_id=one, reason="enough")
    call("wait_for_worker", task_id=one)
    assert call("kv_get", path="/shared/x") == {"entry": None}
    for value in ("text", [0, 255], {"base64": "AAE="}):
        call("kv_set", path="/shared/x", value=value)
        assert call("kv_get", path="/shared/x")["entry"]["value"] == value
    assert call("kv_cas", path="/shared/x", expected_version=3, new_value="y") == {"version": 4, "swapped": True}
    assert call("kv_cas", path="/shared/x", expected_version=3, new_value="z") == {"version": 4, "swapped": False}
    entry = call("kv_wait", path="/shared/x", timeout_secs=5, min_version=4)["entry"]
    assert set(entry) == {"path", "value", "version", "written_by", "written_at"}
    assert call("kv_wait", path="/shared/x", timeout_secs=0.01, min_version=5) == {"settled": False, "entry": None}
    listed = call("kv_list", glob="/shared/*")
    assert set(listed["entries"][0]) == {"path", "version", "written_by", "written_at", "size_bytes"}
    assert call("kv_delete", path="/shared/x") == {"existed": True}
    assert call("kv_delete", path="/shared/x") == {"existed": False}
    lease = call("lease_acquire", name="l", ttl_secs=60)
    assert set(lease) == {"acquired", "lease_id", "version", "holder", "acquired_at", "expires_at"}
    rows = call("lease_list")["leases"]
    assert [set(r) for r in rows] == [{"name", "holder", "version", "expires_at", "waiting"}]
    call("lease_release", lease_id=lease["lease_id"])
    call("run_lease_acquire", key="l", ttl_secs=60, wait_secs=1)
    call("run_lease_release", key="l")
    worker = run.worker(run.spawn(lead, "$ hang"))
    worker.call("lease_acquire", name="l", ttl_secs=60)
    refused = call("lease_acquire", name="l", ttl_secs=60)
    assert set(refused) == {"acquired", "holder", "expires_at"} and refused["acquired"] is False
    assert call("lease_acquire", name="l", ttl_secs=60, wait_secs=0.05)["acquired"] is False
    assert seen == LEADS_ONLY | SHARED
    run.finish(1)


# ------------------------------------------------------------------ once

def test_a_call_that_is_sent_again_is_answered_and_not_done_again(stage):
    """The same nonce and request id from another connection: what a bridge does that has lost its dispatcher."""
    run = stage()
    nonce = "nonce-of-a-bridge"
    other = run.lead()
    calls = [("spawn_worker", {"prompt": "$ run sleep 600"}), ("kv_set", {"path": "/shared/x", "value": "a"}),
             ("kv_cas", {"path": "/shared/x", "expected_version": 1, "new_value": "b"}),
             ("lease_acquire", {"name": "l", "ttl_secs": 600}), ("kv_delete", {"path": "/shared/x"}),
             ("pause_worker", {"task_id": "worker-1"}), ("continue_worker", {"task_id": "worker-1"}),
             ("cancel_worker", {"task_id": "worker-1", "reason": "x"})]
    kinds = ("actor_added", "kv_written", "kv_deleted", "lease_granted", "lease_renewed", "pause_decided",
             "continue_decided", "stop_decided")
    for n, (tool, arguments) in enumerate(calls, 100):
        first = run.lead(nonce=nonce)
        said = value_of(first.answer(first.start(tool, arguments, id=n)))
        count = len(run.events(*kinds))
        again = run.lead(nonce=nonce)
        assert value_of(again.answer(again.start(tool, arguments, id=n))) == said, tool
        assert len(run.events(*kinds)) == count, tool
        if tool == "spawn_worker":
            run.running(other, said["task_id"])
    fresh = run.lead(nonce=nonce)
    assert value_of(fresh.answer(fresh.start("kv_set", {"path": "/shared/x", "value": "c"}, id=999)))["version"] == 3
    assert "already" in other.refused("cancel_worker", task_id="worker-1")
    run.finish(1)


def test_a_refused_spawn_that_is_sent_again_may_succeed(stage):
    """A refusal changes nothing, so nothing of it is kept: asked again, the call is decided anew."""
    run = stage(workers=1)
    lead = run.lead(nonce="nonce-of-a-bridge")
    name = run.spawn(lead, "$ run sleep 600")
    assert "worker cap" in words_of(lead.answer(lead.start("spawn_worker", {"prompt": "$ say x"}, id=500)))
    lead.call("cancel_worker", task_id=name)
    lead.call("wait_for_worker", task_id=name)
    again = run.lead(nonce="nonce-of-a-bridge")
    value_of(again.answer(again.start("spawn_worker", {"prompt": "$ say x"}, id=500)))
    run.finish(1)


# ------------------------------------------------------------------ the store and leases

def test_the_namespaces_of_the_store_hold_for_real_workers(stage):
    run = stage()
    lead = run.lead()
    names = [run.spawn(lead, "$ hang") for _ in range(2)]
    one, two = (run.worker(name) for name in names)
    lead.call("kv_set", path="/ref/plan", value="do it")
    assert one.call("kv_get", path="/ref/plan")["entry"]["value"] == "do it"
    assert one.refused("kv_set", path="/ref/plan", value="no").startswith("forbidden: ")
    one.call("kv_set", path="/peer/self/note", value="mine")
    assert lead.call("kv_get", path=f"/peer/{names[0]}/note")["entry"]["written_by"] == names[0]
    assert two.refused("kv_get", path=f"/peer/{names[0]}/note").startswith("forbidden: ")
    assert two.refused("kv_set", path=f"/peer/{names[0]}/note", value="x").startswith("forbidden: ")
    assert lead.call("kv_set", path=f"/peer/{names[0]}/note", value="lead's", override_flag=True) == {"version": 2}
    assert one.call("kv_get", path="/peer/self/note")["entry"]["value"] == "lead's"
    one.call("kv_set", path="/shared/x", value="a")
    assert two.call("kv_cas", path="/shared/x", expected_version=1, new_value="b")["swapped"] is True
    assert [e["path"] for e in two.call("kv_list", glob="/*")["entries"]] == ["/ref/plan", "/shared/x"]
    assert len(lead.call("kv_list", glob="/*")["entries"]) == 3
    run.finish()


def test_a_wait_for_a_value_ends_when_somebody_writes_it(stage):
    run = stage()
    lead = run.lead()
    worker = run.worker(run.spawn(lead, "$ hang"))
    waiting = lead.start("kv_wait", {"path": "/shared/x", "timeout_secs": 60, "min_version": 2})
    worker.call("kv_set", path="/shared/x", value="one")
    assert lead.call("kv_get", path="/shared/x")["entry"]["version"] == 1
    worker.call("kv_set", path="/shared/x", value="x" * 50_000)
    entry = value_of(lead.answer(waiting))["entry"]
    assert (entry["version"], entry["value"]) == (2, "x" * 50_000)
    run.finish()


def kill_hand(marker: str) -> list[int]:
    """SIGKILL to every process of a hand; those there were: one may just have started another."""
    pids = list(processes_with(marker))
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return pids


@pytest.mark.parametrize("how", ["ends", "cancel", "pause", "killed"])
def test_a_lease_is_free_when_its_holders_hand_ends(stage, home, how):
    run = stage()
    lead = run.lead()
    name = run.spawn(lead, gate(home.root / "g"))
    held = run.worker(name).call("lease_acquire", name="build", ttl_secs=600)
    run.worker(name).call("run_lease_acquire", key="deploy", ttl_secs=600)
    refused = lead.call("lease_acquire", name="build", ttl_secs=60)
    assert refused == {"acquired": False, "holder": name, "expires_at": held["expires_at"]}
    waiting = lead.start("lease_acquire", {"name": "build", "ttl_secs": 60, "wait_secs": 300})
    wide = lead.start("run_lease_acquire", {"key": "deploy", "ttl_secs": 60, "wait_secs": 300})
    wait_for(lambda: lead.call("lease_list")["leases"][0]["waiting"], DEADLINE_S, "the queue")
    if how == "ends":
        (home.root / "g").touch()
    elif how == "killed":
        wait_for(lambda: not kill_hand(f"{run.run.name}:{name}:1"), DEADLINE_S, "the end of its first hand")
    else:
        lead.call(f"{how}_worker", task_id=name)
    got = value_of(lead.answer(waiting, 30))
    assert got["acquired"] and got["holder"] == "boss" and got["version"] == held["version"] + 1
    assert value_of(lead.answer(wide, 30))["holder"] == "boss"
    run.finish(None)


def test_a_frozen_holder_keeps_its_lease_and_its_time_runs_out(stage):
    run = stage()
    lead = run.lead()
    name = run.spawn(lead, "$ run sleep 600")
    run.worker(name).call("lease_acquire", name="build", ttl_secs=3)
    lead.call("pause_worker", task_id=name, mode="freeze")
    assert lead.call("lease_acquire", name="build", ttl_secs=60)["acquired"] is False
    assert lead.call("lease_acquire", name="build", ttl_secs=60, wait_secs=60)["holder"] == "boss"
    run.finish()


def test_two_calls_of_one_actor_for_one_lease_are_both_answered(stage):
    run = stage()
    lead = run.lead()
    worker = run.worker(run.spawn(lead, "$ hang"))
    held = worker.call("lease_acquire", name="l", ttl_secs=600)
    ids = [lead.start("lease_acquire", {"name": "l", "ttl_secs": 60, "wait_secs": 300}) for _ in range(2)]
    wait_for(lambda: lead.call("lease_list")["leases"][0]["waiting"] == 2, DEADLINE_S, "the queue")
    worker.call("lease_release", lease_id=held["lease_id"])
    answers = [value_of(lead.answer(i, 20)) for i in ids]
    assert {a["holder"] for a in answers} == {"boss"} and all(a["acquired"] for a in answers)
    run.finish()


def test_waiters_for_a_lease_are_served_in_the_order_they_came(stage):
    run = stage()
    lead = run.lead()
    held = lead.call("lease_acquire", name="l", ttl_secs=600)
    names = [run.spawn(lead, "$ hang") for _ in range(3)]
    workers = {name: run.worker(name) for name in names}
    ids = {}
    for n, name in enumerate(names, 1):
        ids[name] = workers[name].start("lease_acquire", {"name": "l", "ttl_secs": 600, "wait_secs": 300})
        wait_for(lambda: lead.call("lease_list")["leases"][0]["waiting"] == n, DEADLINE_S, "the queue")
    gone = names[1]
    workers[gone].say({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": ids[gone]}})
    wait_for(lambda: lead.call("lease_list")["leases"][0]["waiting"] == 2, DEADLINE_S, "one less")
    lead.call("lease_release", lease_id=held["lease_id"])
    first = value_of(workers[names[0]].answer(ids[names[0]]))
    workers[names[0]].call("lease_release", lease_id=first["lease_id"])
    last = value_of(workers[names[2]].answer(ids[names[2]]))
    assert [held["version"], first["version"], last["version"]] == [1, 2, 3] and last["holder"] == names[2]
    run.finish()


def test_the_store_is_dumped_where_that_was_asked(stage):
    run = stage(run="dump_shared_store = true")
    lead = run.lead()
    lead.call("kv_set", path="/ref/a", value="text")
    lead.call("kv_set", path="/shared/b", value=[1, 2])
    lead.call("kv_set", path="/shared/c", value="x" * 100_000)
    lead.call("kv_set", path="/shared/d", value="gone")
    lead.call("kv_delete", path="/shared/d")
    run.finish()
    path = run.run / "shared-store.json"
    dump = json.loads(path.read_text())
    assert set(dump) == {"layers", "leases"} and set(dump["layers"]) == {"boss"}
    assert {p: e["value"] for p, e in dump["layers"]["boss"].items()} == {
        "/ref/a": "text", "/shared/b": [1, 2], "/shared/c": "x" * 100_000}
    assert all(set(e) == {"value", "version", "written_by", "written_at"} for e in dump["layers"]["boss"].values())
    assert path.stat().st_mode & 0o777 == 0o600


def test_without_being_asked_nothing_is_dumped(stage):
    run = stage()
    run.lead().call("kv_set", path="/ref/a", value="text")
    run.finish()
    assert not (run.run / "shared-store.json").exists()


# ------------------------------------------------------------------ the control socket

SHAPES = {      # event: (keys that are always there, keys that may be)
    "hello":            ({"server_version", "run_id", "run_kind", "workers", "policy_rules"}, set()),
    "op_acked":         ({"op"}, {"task_id", "delivery"}),
    "op_failed":        ({"op", "error"}, {"task_id"}),
    "op_unknown":       ({"op"}, set()),
    "op_unknown_state": ({"op", "task_id", "current_state"}, {"error"}),
    "workers_snapshot": ({"workers"}, set()),
    "store_activity":   ({"counters"}, set()),
    "worker_failed":    ({"task_id", "reason"}, {"parent_task_id"}),
    "run_finished":     ({"summary"}, set()),
}
WIRE_STATES = {"pending", "running", "paused", "frozen", "done_success", "done_failed", "done_timed_out",
               "done_cancelled", "done_spawn_failed", "done_approval_rejected", "done_approval_timed_out"}


def shape_faults(event: dict) -> list[str]:
    """What an event of the control socket has too much or too little."""
    if event.get("event") not in SHAPES:
        return [f"an event {event}"]
    needed, allowed = SHAPES[event["event"]]
    keys = set(event) - {"event", "id", "actor_path"}
    return [*(f"{event['event']} without {k}" for k in needed - keys),
            *(f"{event['event']} with {k}" for k in keys - needed - allowed),
            *(f"{event['event']}: {k} is null" for k in keys if event[k] is None)]


def test_the_first_line_is_hello_in_both_directions(house):
    operator = house.operator()
    hello = operator.hello
    assert shape_faults(hello) == [] and hello["event"] == "hello"
    assert hello["run_id"] == house.run.name and hello["run_kind"] == "hierarchical"
    assert hello["workers"] == ["boss", "worker-1"] and hello["policy_rules"] == []
    assert re.fullmatch(r"\d+\.\d+\.\d+", hello["server_version"])
    operator.say({"op": "hello", "client_version": "1", "id": 7})          # again: answered again
    assert operator.told("hello", id=7)


@pytest.mark.parametrize("first", [b'{"op":"list_workers"}', b'{"op":"cancel_run"}', b"nonsense", b"[]", b'{"op":7}',
                                   b'{"jsonrpc":"2.0","id":1,"method":"hello","params":{}}', b"x" * (17 << 20)],
                         ids=range(7))
def test_without_hello_there_is_nothing(house, first):
    client = house.kept(Client(house.socket("control")))
    client.say(first)
    answer = client.hear()
    assert answer["event"] == "op_failed" and answer["error"] and client.hear() is None


@pytest.mark.parametrize("number", [1, 0, -5, "x", "a long id" * 10])
def test_an_id_is_echoed_and_none_is_made_up(house, number):
    operator = house.operator()
    operator.say({"op": "list_workers", "id": number}, {"op": "list_workers"}, {"op": "no_such_op", "id": number})
    lines = [operator.find(lambda line: line["event"] != "store_activity") for _ in range(3)]
    assert sorted(str(x.get("id")) for x in lines) == sorted([str(number), "None", str(number)])
    assert all(shape_faults(x) == [] for x in lines)


@pytest.mark.parametrize("data", [
    b"nonsense", b"\xff\xfe\xfd", b"{", b"[]", b"7", b"null", b'"op"', b"{}", b'{"op":null}', b'{"op":["x"]}',
    b'{"op":"list_workers","x":NaN}', b"[" * 100_000, b"x" * (17 << 20)], ids=range(13))
def test_nonsense_is_answered_and_the_connection_lives(house, data):
    operator = house.operator()
    operator.say(data)
    answer = operator.find(lambda line: line["event"] != "store_activity")       # that may be told at any time
    assert answer["event"] == "op_failed" and shape_faults(answer) == [], answer
    assert operator.op("list_workers")["event"] == "workers_snapshot"
    operator.close()


@pytest.mark.parametrize("op, fields, event, words", [
    ("no_such_op",      {},                                         "op_unknown", []),
    ("",                {},                                         "op_unknown", []),
    ("cancel_worker",   {},                                         "op_failed", ["task_id", "required"]),
    ("cancel_worker",   {"task_id": 7},                             "op_failed", ["task_id", "7"]),
    ("cancel_worker",   {"task_id": None},                          "op_failed", ["task_id"]),
    ("cancel_worker",   {"task_id": {}},                            "op_failed", ["task_id"]),
    ("cancel_worker",   {"task_id": "nobody"},                      "op_failed", ["nobody", "worker-1"]),
    ("cancel_worker",   {"task_id": "worker-1", "reason": 1},       "op_failed", ["reason"]),
    ("pause_worker",    {"task_id": "worker-1", "mode": "stop"},    "op_failed", ["mode", "cancel, freeze"]),
    ("reprompt_worker", {"task_id": "worker-1"},                    "op_failed", ["prompt", "required"]),
    ("reprompt_worker", {"task_id": "worker-1", "prompt": " "},     "op_failed", ["prompt", "empty"]),
    ("reprompt_worker", {"task_id": "nobody", "prompt": "x"},       "op_failed", ["nobody"]),
    ("continue_worker", {"task_id": "../boss"},                     "op_failed", ["../boss"]),
])
def test_bad_operations_are_named(house, op, fields, event, words):
    operator = house.operator()
    answer = operator.op(op, **fields)
    assert answer["event"] == event and answer["op"] == op and shape_faults(answer) == [], answer
    assert all(word in answer["error"] for word in words), answer
    operator.close()


def test_an_operation_that_does_not_fit_the_state_says_the_state(stage):
    run = stage()
    lead, operator = run.lead(), run.operator()
    one = run.spawn(lead, "$ run sleep 600")
    done = lead.call("spawn_worker", prompt="$ say x")["task_id"]
    lead.call("wait_for_worker", task_id=done)
    for op, name, fields, state in (("continue_worker", one, {}, "running"),
                                    ("pause_worker", done, {}, "done_success"),
                                    ("cancel_worker", done, {}, "done_success"),
                                    ("reprompt_worker", done, {"prompt": "x"}, "done_success")):
        answer = operator.op(op, task_id=name, **fields)
        assert answer["event"] == "op_unknown_state" and answer["current_state"] == state, answer
        assert answer["op"] == op and answer["task_id"] == name and shape_faults(answer) == []
    run.finish()


def test_a_snapshot_shows_every_actor_in_the_words_of_the_wire(stage, home):
    run = stage(workers=8)
    lead, operator = run.lead(), run.operator()
    live = [run.spawn(lead, "$ run sleep 600") for _ in range(3)]
    ended = [lead.call("spawn_worker", prompt=p, timeout_secs=60)["task_id"] for p in ("$ say x", "$ fail x")]
    for name in ended:
        lead.call("wait_for_worker", task_id=name)
    late = lead.call("spawn_worker", prompt="$ hang", timeout_secs=1)["task_id"]
    lead.call("wait_for_worker", task_id=late)
    lead.call("pause_worker", task_id=live[1])
    lead.call("pause_worker", task_id=live[2], mode="freeze")
    answer = operator.op("list_workers")
    assert shape_faults(answer) == []
    rows = {r["task_id"]: r for r in answer["workers"]}
    assert {n: r["state"] for n, r in rows.items()} == dict(zip(
        ["boss", *live, *ended, late], ["running", "running", "paused", "frozen", "done_success", "done_failed",
                                        "done_timed_out"]))
    for name, row in rows.items():
        assert {"task_id", "state", "prompt_preview"} <= set(row) <= {
            "task_id", "state", "prompt_preview", "started_at", "parent_task_id", "session_id"}
        assert row.get("parent_task_id") == (None if name == "boss" else "boss") and row["session_id"]
    assert {r["state"] for r in rows.values()} <= WIRE_STATES
    run.finish(1)


def test_failures_and_the_end_are_told_to_every_client(stage):
    run = stage()
    lead = run.lead()
    operators = [run.operator() for _ in range(30)]
    failed = lead.call("spawn_worker", prompt="$ fail no luck")["task_id"]
    lead.call("wait_for_worker", task_id=failed)
    fine = lead.call("spawn_worker", prompt="$ say x")["task_id"]
    lead.call("wait_for_worker", task_id=fine)
    gone, unneeded = run.spawn(lead, "$ hang"), run.spawn(lead, "$ hang")
    lead.call("pause_worker", task_id=unneeded)
    login = lead.call("spawn_worker", prompt="$ auth")["task_id"]
    lead.call("wait_for_worker", task_id=login)
    assert lead.refused("spawn_worker", prompt="$ say x").startswith("api auth failed: ")
    assert operators[0].op("cancel_worker", task_id=gone, reason="enough")["event"] == "op_acked"
    lead.call("wait_for_worker", task_id=gone)
    run.finish(1)
    for operator in operators:
        lines = list(operator.kept)
        while (said := operator.hear()) is not None:
            lines.append(said)
        assert [f for x in lines for f in shape_faults(x)] == []
        told = {x["task_id"]: x for x in lines if x["event"] == "worker_failed"}
        assert set(told) == {failed, login, gone, unneeded}
        assert len([x for x in lines if x["event"] == "worker_failed"]) == 4
        assert {x["parent_task_id"] for x in told.values()} == {"boss"}
        assert told[failed]["reason"]["kind"] == "unknown" and "no luck" in told[failed]["reason"]["message"]
        assert told[login]["reason"]["kind"] == "auth_failure"
        assert told[gone]["reason"]["message"].startswith("enough")
        assert told[unneeded]["reason"] == {"kind": "unknown", "message": "the lead ended"}
        assert all(set(x["reason"]) <= {"kind", "message", "resets_at"} for x in told.values())
        assert lines[-1] == {"event": "run_finished", "summary": {"tasks_total": 6, "tasks_failed": 3}}


def test_a_client_that_never_reads_harms_nobody(stage):
    run = stage()
    lead, slow, other = run.lead(), run.operator(), run.operator()
    slow.sock.setblocking(False)
    ask, sent = b'{"op":"list_workers"}\n' * 1000, 0
    try:
        while sent < 200 << 20:
            sent += slow.sock.send(ask)
    except (BlockingIOError, BrokenPipeError, ConnectionResetError):
        pass
    assert 0 < sent < 200 << 20, "it was read from without end"
    assert other.op("list_workers")["event"] == "workers_snapshot"
    name = lead.call("spawn_worker", prompt="$ fail x")["task_id"]
    lead.call("wait_for_worker", task_id=name)
    assert other.told("worker_failed", task_id=name)
    run.finish(1)


def test_clients_may_go_in_the_middle_of_everything(stage):
    run = stage()
    lead = run.lead()
    name = run.spawn(lead, "$ run sleep 600")
    gone = run.operator()
    gone.say({"op": "pause_worker", "task_id": name})
    gone.close()
    half = run.operator()
    half.sock.sendall(b'{"op":"cancel_run"')
    half.close()
    wait_for(lambda: lead.call("worker_status", task_id=name)["state"] == "Paused", DEADLINE_S, "the pause")
    assert run.operator().op("continue_worker", task_id=name)["event"] == "op_acked"
    run.finish()
    assert not (run.run / "sockets.log").exists()


def test_every_verb_of_the_control_socket_works_on_a_lead(stage):
    run = stage(script="$ say begun\n$ run sleep 600")
    operator = run.operator()
    run.running(run.lead(), "boss")
    for op, fields in (("pause_worker", {"mode": "freeze"}), ("continue_worker", {}), ("pause_worker", {}),
                       ("continue_worker", {"prompt": "$ say again\n$ run sleep 600"})):
        answer = operator.op(op, task_id="boss", **fields)
        assert answer["event"] == "op_acked" and answer["task_id"] == "boss" and shape_faults(answer) == [], answer
    log = run.run / "tasks/boss/stdout.log"
    wait_for(lambda: log.read_bytes().count(b'"command":"sleep 600"') == 2, DEADLINE_S, "the lead at work again")
    answer = operator.op("reprompt_worker", task_id="boss", prompt="$ say the end")
    assert answer["event"] == "op_acked" and shape_faults(answer) == []
    records = run.settle(0)
    assert records["boss"]["final_message"] == "the end"
    assert (records["boss"]["pause_count"], records["boss"]["reprompt_count"]) == (2, 1)


def test_cancel_run_over_the_control_socket(stage):
    run = stage()
    lead, operator = run.lead(), run.operator()
    names = [run.spawn(lead, "$ run sleep 600") for _ in range(2)]
    assert operator.op("cancel_run", reason="lunch") == {"event": "op_acked", "op": "cancel_run"}
    told = operator.told("run_finished")
    assert told["summary"] == {"tasks_total": 3, "tasks_failed": 3}
    records = run.settle(1)
    assert {r["status"] for r in records.values()} == {"Cancelled"} and set(records) == {"boss", *names}
    assert all("lunch" in r["failure_reason"]["message"] for r in records.values())


def test_the_sockets_are_for_their_owner_alone_and_go_with_the_run(stage):
    run = stage()
    places = json.loads((run.run / "sockets.json").read_text())
    assert set(places) == {"mcp", "control"}
    assert {os.stat(p).st_mode & 0o777 for p in places.values()} == {0o600}
    run.finish()
    assert not any(os.path.lexists(p) for p in places.values()) and not (run.run / "sockets.json").exists()


# ------------------------------------------------------------------ commands

def test_validate_tells_mode_counts_and_house_rules(home):
    home.repo()
    path = home.manifest('[run]\nmax_workers = 3\nbudget_usd = 2.5\nlead_timeout_secs = 90\n[lead]\nid = "boss"\n'
                         'agent = "demo"\ndirectory = "repo"\nprompt = "x"\n')
    said = home.pitboss("validate", path, check=0).stdout
    assert said.startswith("OK: hierarchical")
    for words in ("1 lead", "max_workers=3", "budget_usd=2.5", "lead_timeout_secs=90"):
        assert words in said, said
    shown = json.loads(home.pitboss("validate", path, "--json", check=0).stdout)
    assert shown["mode"] == "hierarchical" and shown["ok"] is True
    assert (shown["max_workers"], shown["budget_usd"], shown["lead_timeout_secs"]) == (3, 2.5, 90)


@pytest.mark.parametrize("rules, words", [
    ("max_workers = 2\nbudget_usd = 0", ["budget_usd", "> 0"]),
    ("max_workers = 2\nbudget_usd = -1", ["budget_usd"]),
    ("max_workers = 2\nbudget_usd = nan", ["budget_usd"]),
    ('max_workers = 2\nbudget_usd = "5"', ["budget_usd"]),
    ("max_workers = 2", ["budget_usd", "required"]),
    ("budget_usd = 1", ["max_workers", "required"]),
    ("max_workers = 0\nbudget_usd = 1", ["max_workers", "1", "16"]),
    ("max_workers = 17\nbudget_usd = 1", ["max_workers", "16"]),
    ("max_workers = 2\nbudget_usd = 1\nlead_timeout_secs = 0", ["lead_timeout_secs", ">= 1"]),
])
def test_bad_house_rules_start_nothing(home, rules, words):
    home.repo()
    path = home.manifest(f'[run]\n{rules}\n[lead]\nid = "boss"\nagent = "demo"\ndirectory = "repo"\nprompt = "x"\n')
    for command in ("validate", "dispatch"):
        said = home.pitboss(command, path, check=2).stderr
        assert all(word in said for word in words) and "Traceback" not in said, said
    assert not home.runs.exists() or not list(home.runs.iterdir())


def test_resolved_json_names_the_lead(stage):
    run = stage(lead='model = "claude-haiku-4-5"')
    resolved = json.loads((run.run / "resolved.json").read_text())
    assert resolved["mode"] == "hierarchical" and resolved["tasks"] == []
    assert resolved["lead"]["id"] == "boss" and resolved["lead"]["model"] == "claude-haiku-4-5"
    assert resolved["lead"]["resume_session_id"] is None
    assert json.loads((run.run / "meta.json").read_text())["mode"] == "hierarchical"
    run.finish()


def test_status_list_and_attach_show_a_run_with_a_lead(stage, home):
    run = stage()
    lead = run.lead()
    one = run.spawn(lead, f"$ say hello from a worker\n{gate(home.root / 'g')}")
    two = run.spawn(lead, "$ run sleep 600")
    lead.call("pause_worker", task_id=two)
    run_id = run.run.name
    shown = json.loads(home.pitboss("status", run_id, "--json", check=0).stdout)
    assert (shown["mode"], shown["state"], shown["tasks_total"]) == ("hierarchical", "running", 3)
    rows = {a["task_id"]: a for a in shown["actors"]}
    assert {n: (r["status"], r["role"], r["parent_task_id"]) for n, r in rows.items()} == {
        "boss": (None, "lead", None), one: (None, "worker", "boss"), two: (None, "worker", "boss")}
    assert (rows[two]["state"].lower(), rows[one]["state"].lower()) == ("paused", "running")
    table = home.pitboss("status", run_id, check=0).stdout
    assert all(name in table for name in ("boss", one, two)) and "paused" in table.lower()
    listed = json.loads(home.pitboss("list", "--json", check=0).stdout)[0]
    assert (listed["run_id"], listed["mode"], listed["state"], listed["tasks_total"]) == (
        run_id, "hierarchical", "running", 3)
    assert listed["agents_alive"] == 2
    attached = home.start("attach", run_id[:13], one)
    (home.root / "g").touch()
    out = attached.communicate(timeout=DEADLINE_S)[0]
    assert attached.returncode == 0 and "> hello from a worker" in out
    assert "boss" in home.pitboss("attach", run_id, "nobody", check=3).stderr
    run.finish()
    shown = json.loads(home.pitboss("status", run_id, "--json", check=0).stdout)
    assert (shown["state"], shown["mode"], shown["tasks_failed"]) == ("complete", "hierarchical", 0)
    listed = json.loads(home.pitboss("list", "--json", check=0).stdout)[0]
    assert (listed["state"], listed["mode"], listed["agents_alive"]) == ("complete", "hierarchical", 0)


def test_the_verbs_as_commands(stage, home):
    run = stage()
    lead = run.lead()
    one, two = run.spawn(lead, "$ say begun\n$ run sleep 600"), run.spawn(lead, "$ run sleep 600")
    run_id = run.run.name
    state = lambda name: lead.call("worker_status", task_id=name)["state"]      # noqa: E731
    home.pitboss("pause", run_id, one, check=0)
    assert state(one) == "Paused"
    home.pitboss("pause", run_id, one, check=4)
    home.pitboss("continue", run_id, one, "--prompt", "$ say more\n$ run sleep 600", check=0)
    assert state(one) == "Running"
    home.pitboss("pause", run_id, one, "--freeze", check=0)
    assert state(one) == "Frozen"
    assert "Frozen" in home.pitboss("reprompt", run_id, one, "x", check=4).stderr
    home.pitboss("continue", run_id, one, check=0)
    home.pitboss("reprompt", run_id, one, "$ say the end", check=0)
    assert lead.call("wait_for_worker", task_id=one)["final_message"] == "the end"
    home.pitboss("cancel", run_id, two, "--reason", "wrong one", check=0)
    assert state(two) == "Cancelled"
    run.finish(1)
    assert any("wrong one" in text for text in run.heard("boss")[1:])


def test_commands_for_whom_it_is_too_late_or_who_is_not_there(stage, home):
    run = stage()
    lead, run_id = run.lead(), run.run.name
    one = lead.call("spawn_worker", prompt="$ say x")["task_id"]
    lead.call("wait_for_worker", task_id=one)
    for args in (("cancel", run_id, one), ("pause", run_id, one), ("continue", run_id, one),
                 ("reprompt", run_id, one, "x"), ("continue", run_id, "boss")):
        home.pitboss(*args, check=4)
    for args in (("cancel", run_id, "nobody"), ("pause", run_id, "nobody"), ("reprompt", run_id, "nobody", "x"),
                 ("continue", "ffff", one)):
        home.pitboss(*args, check=3)
    run.finish()
    home.pitboss("pause", run_id, one, check=4)


def test_a_finished_run_is_dealt_again_with_its_lead_alone(stage, home):
    run = stage(lead="use_worktree = true")
    lead = run.lead()
    name = lead.call("spawn_worker", prompt="$ fail x")["task_id"]
    lead.call("wait_for_worker", task_id=name)
    first = run.finish(1)
    said = home.pitboss("resume", run.run.name, check=0).stdout
    again = Path(said.splitlines()[-1])
    assert again != run.run
    records = {r["task_id"]: r for r in read_records(again)}
    assert set(records) == {"boss"} and records["boss"]["status"] == "Success"
    assert records["boss"]["claude_session_id"] == first["boss"]["claude_session_id"]
    assert json.loads((again / "meta.json").read_text())["resumed_from"] == run.run.name
    assert json.loads((again / "resolved.json").read_text())["lead"]["resume_session_id"] == \
        first["boss"]["claude_session_id"]
    assert "the lead of this run succeeded" in home.pitboss("resume", run.run.name, "--failed", check=4).stderr


def test_with_failed_a_lead_that_failed_is_dealt_again(stage, home):
    run = stage(script="$ fail x")
    run.settle(1)
    again = Path(home.pitboss("resume", run.run.name, "--failed", check=1).stdout.splitlines()[-1])
    assert [r["task_id"] for r in read_records(again)] == ["boss"]


def test_a_run_without_its_copy_of_the_program_gets_another_one(stage, home):
    """As after a copy of run folders that left it out: its agents are dealt again from there."""
    run = stage(script='$ call spawn_worker {"prompt": "$ say here"}\n$ call wait_for_worker {"task_id": "<1.task_id>"}\n$ run true')
    wait_for(lambda: run.events("hand_started", actor="boss"), DEADLINE_S, "the lead")
    run.process.kill()
    run.process.wait()
    home.end_everything()
    shutil.rmtree(run.run / "self")
    home.pitboss("resume", run.run.name, check=0)
    assert {r["status"] for r in read_records(run.run)} == {"Success"}


def test_a_killed_run_goes_on_in_place(stage, home):
    script = ('$ call spawn_worker {"prompt": "$ call kv_wait {\\"path\\": \\"/shared/go\\", \\"timeout_secs\\": 60}"}\n'
              '$ call wait_for_worker {"task_id": "<1.task_id>"}\n$ say all done')
    run = stage(script=script)
    wait_for(lambda: run.events("hand_started", actor="worker-1"), DEADLINE_S, "the worker")
    home.pitboss("resume", run.run.name, check=4)               # it is held
    run.process.kill()
    run.process.wait()
    listed = json.loads(home.pitboss("list", "--json", check=0).stdout)[0]
    assert listed["state"] == "stale" and listed["agents_alive"] == 2
    resumed = home.start("resume", run.run.name)
    old = len(run.events("dispatcher_started"))
    wait_for(lambda: len(run.events("dispatcher_started")) > old or resumed.poll() is not None, DEADLINE_S, "it")
    wait_for(lambda: (run.run / "sockets.json").exists(), DEADLINE_S, "the sockets")
    run.lead().call("kv_set", path="/shared/go", value="now")
    assert resumed.wait(DEADLINE_S) == 0, resumed.stderr.read()
    records = read_records(run.run)
    assert sorted(r["task_id"] for r in records) == ["boss", "worker-1"]
    assert {r["status"] for r in records} == {"Success"} and all(r["hands"] == 1 for r in records)
    assert next(r for r in records if r["task_id"] == "boss")["final_message"] == "all done"
