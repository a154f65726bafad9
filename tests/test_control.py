"""The control socket as a client of another program sees it: what it is told unasked, and when.

tests/test_lead.py and tests/test_approvals.py have the operations one by one.
"""
from __future__ import annotations

import json

import pytest

import pitboss
from stage import gate
from test_lead import SHAPES, shape_faults
from tools import read_events


def counters_of(line: dict) -> dict:
    """A store_activity as {actor: (calls for the store, calls for leases)}."""
    assert shape_faults(line) == []
    assert all(set(row) == {"actor_id", "kv_ops", "lease_ops"} for row in line["counters"])
    return {row["actor_id"]: (row["kv_ops"], row["lease_ops"]) for row in line["counters"]}


def test_the_use_of_the_store_is_told_now_and_then_and_to_who_comes_later(stage):
    run = stage()
    lead, operator = run.lead(), run.operator()
    name = run.spawn(lead, "$ run sleep 600")
    worker = run.worker(name)
    for n in range(40):
        lead.call("kv_set", path="/shared/x", value=str(n))
    worker.call("kv_get", path="/shared/x")
    assert "forbidden" in worker.refused("kv_set", path="/ref/x", value="no")
    worker.call("lease_list")
    held = worker.call("lease_acquire", name="l", ttl_secs=60)
    worker.call("lease_release", lease_id=held["lease_id"])
    told = {}
    while told != {"boss": (40, 0), name: (2, 3)}:
        told.update(counters_of(operator.told("store_activity")))
    events = run.events("store_used")
    assert 1 <= len(events) <= 5
    assert all(b["at"] - a["at"] >= pitboss.STORE_TOLD_S - 0.1 for a, b in zip(events, events[1:]))
    late = run.operator()
    assert counters_of(late.told("store_activity")) == told
    lead.call("kv_get", path="/shared/x")                    # what came last is told before the end
    run.finish(0)
    assert counters_of(operator.told("store_activity"))["boss"] == (41, 0)
    assert pitboss.fold(read_events(run.run)).store_use == {"boss": (41, 0), name: (2, 3)}


def test_a_call_that_is_sent_again_is_counted_once(stage):
    run = stage()
    lead = run.lead(nonce="a" * 16)
    lead.call("kv_set", path="/shared/x", value="1")
    again = run.lead(nonce="a" * 16)
    assert again.call("kv_set", path="/shared/x", value="1") == {"version": 1}     # the same request id
    run.finish(0)
    assert pitboss.fold(read_events(run.run)).store_use == {"boss": (1, 0)}


def test_counts_go_on_under_the_next_dispatcher(stage, home):
    run = stage()
    run.lead().call("kv_set", path="/shared/x", value="1")
    run.operator().told("store_activity")
    run.process.kill()
    run.process.wait()
    (run.run / "sockets.json").unlink()
    run.process = home.start("resume", run.run.name, stdout=run.log, stderr=run.log)
    run._find_run()
    assert counters_of(run.operator().told("store_activity")) == {"boss": (1, 0)}
    run.lead(nonce="b" * 16).call("kv_set", path="/shared/y", value="1")
    run.finish(0)
    assert pitboss.fold(read_events(run.run)).store_use == {"boss": (2, 0)}


def test_who_comes_late_is_told_of_requests_subleads_and_counts_after_hello(stage, home):
    """And nothing else: what lies behind is in the files of the run."""
    run = stage(lead="allow_subleads = true")
    lead = run.lead()
    given = {"model": "claude-sonnet-4-6", "budget_usd": 1, "max_workers": 1}
    first = lead.call("spawn_sublead", prompt="$ say x", **given)["sublead_id"]
    lead.call("wait_actor", actor_id=first)
    second = lead.call("spawn_sublead", prompt=gate(home.root / "s"), **given)["sublead_id"]
    lead.call("wait_for_worker", task_id=lead.call("spawn_worker", prompt="$ fail x")["task_id"])
    lead.start("request_approval", {"summary": "may I"})
    asked = run.operator().told("approval_request")
    lead.call("kv_set", path="/shared/x", value="1")
    run.operator().told("store_activity")
    late = run.operator()
    number = 99
    late.say({"op": "list_workers", "id": number})
    lines = []
    while (line := late.hear()).get("id") != number:
        lines.append(line)
    assert {line["event"] for line in lines} == {"approval_request", "sublead_spawned", "store_activity"}
    assert lines[0] == asked and [x["sublead_id"] for x in lines if x["event"] == "sublead_spawned"] == [second]
    late.op("approve", request_id=asked["request_id"], approved=True)
    assert late.told("approval_resolved")["approved"] is True
    (home.root / "s").touch()
    assert late.told("sublead_terminated")["sublead_id"] == second
    run.finish(1)
    assert late.told("run_finished")["summary"] == {"tasks_total": 4, "tasks_failed": 1}


def test_every_event_that_is_sent_is_one_that_clients_know():
    """The names that the contract gives, and that a test of its shape exists for each."""
    source = open(pitboss.__file__, encoding="utf-8").read()
    control = source[source.index("# CONTROL: "):source.index("# VIEWS: ")]
    sent = {word for word in control.replace('"event": "', 'event="').split('event="')[1:]}
    names = {part.partition('"')[0] for part in sent}
    known = {"hello", "op_acked", "op_failed", "op_unknown", "op_unknown_state", "approval_request", "approval_resolved",
             "workers_snapshot", "store_activity", "sublead_spawned", "sublead_terminated", "worker_failed",
             "run_finished"}
    assert names == known
    assert set(SHAPES) | {"approval_request", "approval_resolved", "sublead_spawned", "sublead_terminated"} == known


@pytest.mark.parametrize("rules, words", [
    (None, ["rules", "required"]), ("x", ["rules"]), ([{"action": "maybe"}], ["rules[0].action", "block"]),
    ([{"match": {"colour": "red"}, "action": "block"}], ["colour"])])
def test_rules_that_cannot_be_are_named_and_the_old_ones_stay(stage, rules, words):
    run = stage(more='[[approval_policy]]\nmatch = { actor = "boss" }\naction = "block"\n')
    operator = run.operator()
    answer = operator.op("update_policy", **({} if rules is None else {"rules": rules}))
    assert answer["event"] == "op_failed" and shape_faults(answer) == []
    assert all(word in answer["error"] for word in words), answer
    assert run.operator().hello["policy_rules"] == operator.hello["policy_rules"] != []
    given = [{"match": {"actor": "b*", "category": None, "tool_name": None, "cost_over": None}, "action": "auto_approve"}]
    assert operator.op("update_policy", rules=given)["event"] == "op_acked"
    assert run.operator().hello["policy_rules"] == [{"match": {"actor": "b*"}, "action": "auto_approve"}]
    run.finish(0)


def test_a_journal_is_followed_line_by_line_as_it_grows(tmp_path):
    """A line that is half there is read when it is whole; a broken one before others is an error."""
    lines = [json.dumps({"seq": n, "at": float(n), "kind": "drained", "why": f"w{n}"}) + "\n" for n in range(1, 5)]
    path, follower = tmp_path / "journal.jsonl", pitboss.Follower(str(tmp_path))
    assert list(follower.news()) == []
    path.write_text(lines[0] + lines[1] + lines[2][:9])
    assert [(e["seq"], follower.run.draining) for e in follower.news()] == [(1, "w1"), (2, "w2")]
    assert list(follower.news()) == []
    path.write_text("".join(lines))
    assert [e["seq"] for e in follower.news()] == [3, 4] and follower.run.last_at == 4.0
    path.write_text("".join(lines) + "broken\n" + lines[0])
    with pytest.raises(pitboss.JournalError, match="at byte"):
        list(follower.news())
