"""Approvals from outside: tools, control socket, commands, dropped files, the plan gate, a dispatcher that dies.

The scripted lead waits (tests/stage.py), and the test asks in its place with its token.
"""
from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from stage import DEADLINE_S, Operator, Stage, value_of, words_of
from tools import PYTHON, read_events, read_records, wait_for

FAULTS = Path(__file__).resolve().parent / "faults.py"

PLAN = {"summary": "Rewrite it", "risks": ["it may be late"], "resources": ["two workers"]}


def asked(operator: Operator, **facts) -> dict:
    """The next request that an operator is told of."""
    return operator.told("approval_request", **facts)


def drop(run: Stage, name: str, text: str) -> Path:
    """A file in the folder of approvals, whole at once."""
    path = run.run / "approvals" / name
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").rename(path)
    return path


def listed(home, run: Stage) -> list[dict]:
    return json.loads(home.pitboss("approvals", run.run.name, "--json", check=0).stdout)


def told_all(run: Stage) -> list[dict]:
    return run.events("approval_asked")


def counters(record: dict) -> tuple:
    return tuple(record[f"approvals_{word}"] for word in ("requested", "approved", "rejected"))


def kill(run: Stage) -> None:
    run.process.send_signal(signal.SIGKILL)
    run.process.wait(DEADLINE_S)


def resume(run: Stage) -> None:
    """Another dispatcher takes the run over."""
    run.process = run.home.start("resume", run.run.name, stdout=run.log, stderr=run.log)
    wait_for(lambda: any(e["kind"] == "dispatcher_started" and e["pid"] == run.process.pid for e in run.events()),
             DEADLINE_S, "the next dispatcher")


# ------------------------------------------------------------------ answers of an operator

@pytest.mark.parametrize("given, answer", [
    ({"approved": True}, {"approved": True}),
    ({"approved": True, "comment": "quickly"}, {"approved": True, "comment": "quickly"}),
    ({"approved": True, "edited_summary": "do half"}, {"approved": True, "edited_summary": "do half"}),
    ({"approved": False, "reason": "not today", "comment": None}, {"approved": False, "reason": "not today"})])
def test_an_operator_answers_over_the_control_socket(stage, given, answer):
    run = stage()
    lead, operator, other = run.lead(), run.operator(), run.operator()
    call = lead.start("request_approval", {"summary": "Delete the cache", "plan": PLAN})
    told = asked(operator)
    assert told == {"event": "approval_request", "request_id": told["request_id"], "task_id": "boss",
                    "summary": "Delete the cache", "plan": PLAN, "kind": "action", "actor_path": ["boss"]}
    assert operator.op("approve", request_id=told["request_id"], **given) == {"event": "op_acked", "op": "approve"}
    assert value_of(lead.answer(call)) == answer
    for client in (operator, other):
        assert client.told("approval_resolved") == {"event": "approval_resolved", "by": "operator",
                                                    "request_id": told["request_id"], "approved": given["approved"]}
    again = operator.op("approve", request_id=told["request_id"], approved=True)
    assert again["event"] == "op_failed" and "by an operator" in again["error"]
    assert len(run.events("approval_decided")) == 1


def test_what_was_never_asked_and_answers_that_are_none_are_named(stage):
    operator = stage().operator()
    for fields, words in (({"request_id": "x", "approved": True}, "unknown request_id: x; nothing waits"),
                          ({"request_id": "x"}, "approved: is required"), ({"approved": True}, "request_id: is required"),
                          ({"request_id": "x", "approved": "yes"}, "approved: found"),
                          ({"request_id": "x", "approved": True, "colour": "red"}, "colour: unknown key")):
        answer = operator.op("approve", **fields)
        assert answer["event"] == "op_failed" and words in answer["error"], answer


def test_a_client_that_comes_later_is_told_what_waits(stage):
    run = stage()
    lead, first = run.lead(), run.operator()
    lead.start("request_approval", {"summary": "one"})
    lead.start("propose_plan", {"plan": PLAN})
    known = {asked(first, summary=words)["request_id"] for words in ("one", PLAN["summary"])}
    late = run.operator()
    assert {asked(late)["request_id"], asked(late)["request_id"]} == known


def test_counters_and_the_record(stage):
    run = stage(more='[[approval_policy]]\nmatch = { tool_name = "Read" }\naction = "auto_approve"\n'
                     '[[approval_policy]]\nmatch = { tool_name = "Bash" }\naction = "auto_reject"\n')
    lead, operator = run.lead(), run.operator()
    assert lead.call("request_approval", summary="x", tool_name="Bash") == {
        "approved": False, "reason": "auto-rejected by policy"}
    assert lead.call("request_approval", summary="x", ttl_secs=0.05) == {
        "approved": False, "from_ttl": True, "comment": "no operator available"}
    call = lead.start("request_approval", {"summary": "x"})
    operator.op("approve", request_id=asked(operator, summary="x")["request_id"], approved=False)
    waiting = [e["request_id"] for e in run.events("approval_asked")][-1]
    operator.op("approve", request_id=waiting, approved=False)
    assert value_of(lead.answer(call))["approved"] is False
    assert lead.call("request_approval", summary="x", tool_name="Read") == {"approved": True}
    records = run.finish()
    assert counters(records["boss"]) == (4, 1, 3) and records["boss"]["status"] == "Success"


# ------------------------------------------------------------------ time

@pytest.mark.parametrize("fields, answer", [
    ({"ttl_secs": 0.05}, {"approved": False, "from_ttl": True, "comment": "no operator available"}),
    ({"timeout_secs": 0.05}, {"approved": False, "from_ttl": True, "comment": "no operator available"}),
    ({"timeout_secs": 600, "ttl_secs": 0.05, "fallback": "auto_approve"},
     {"approved": True, "from_ttl": True, "comment": "no operator available"})])
def test_when_its_time_is_over_the_fallback_answers(stage, fields, answer):
    run = stage()
    lead, operator = run.lead(), run.operator()
    assert lead.call("request_approval", summary="x", **fields) == answer
    told = asked(operator)
    late = operator.op("approve", request_id=told["request_id"], approved=True)
    assert late["event"] == "op_failed" and "its time being over" in late["error"]
    assert operator.told("approval_resolved")["by"] == "time"


def test_the_fallback_block_goes_on_waiting(stage, home):
    run = stage()
    lead, operator = run.lead(), run.operator()
    call = lead.start("request_approval", {"summary": "x", "ttl_secs": 0.05, "fallback": "block"})
    wait_for(lambda: run.events("approval_kept"), DEADLINE_S, "the end of its time")
    [waiting] = listed(home, run)
    assert waiting["expires_at"] is None
    operator.op("approve", request_id=waiting["request_id"], approved=True)
    assert value_of(lead.answer(call)) == {"approved": True}


def test_without_a_time_of_its_own_the_leads_counts(stage):
    run = stage(lead="lead_timeout_secs = 1234")
    run.lead().start("propose_plan", {"plan": PLAN})
    asked(run.operator())
    assert run.events("approval_asked")[0]["ttl_s"] == 1234


# ------------------------------------------------------------------ rules

def test_rules_answer_at_once_and_can_be_replaced(stage, home):
    run = stage(run='approval_policy = "auto_reject"', more='[[approval_policy]]\n'
                'match = { actor = "bo*", category = "cost", cost_over = 5 }\naction = "block"\n')
    lead, operator = run.lead(), run.operator()
    rules = [{"match": {"actor": "bo*", "category": "cost", "cost_over": 5}, "action": "block"}]
    assert operator.hello["policy_rules"] == rules
    no = {"approved": False, "reason": "auto-rejected by policy"}
    assert lead.call("request_approval", summary="x", cost_estimate=5) == no
    call = lead.start("request_approval", {"summary": "dear", "cost_estimate": 5.5})
    told = asked(operator, summary="dear")
    # null stands for absent, as the Rust tool writes it
    news = [{"match": {"actor": None, "category": None, "tool_name": None, "cost_over": None}, "action": "auto_approve"}]
    assert operator.op("update_policy", rules=news)["event"] == "op_acked"
    assert run.operator().hello["policy_rules"] == [{"match": {}, "action": "auto_approve"}]
    assert lead.call("request_approval", summary="x", cost_estimate=5) == {"approved": True}
    operator.op("approve", request_id=told["request_id"], approved=True)
    assert value_of(lead.answer(call)) == {"approved": True}
    for bad, words in (([{"action": "ask"}], "rules[0].action: found"), ([1], "rules: found"),
                       ([{"action": "block", "match": {"actr": "x"}}], "rules[0].match.actr: unknown key")):
        answer = operator.op("update_policy", rules=bad)
        assert answer["event"] == "op_failed" and words in answer["error"]
    kill(run)
    shown = json.loads(home.pitboss("policy", run.run.name, "--json", check=0).stdout)
    assert shown == {"policy_rules": [{"match": {}, "action": "auto_approve"}], "approval_policy": "auto_reject"}
    resume(run)
    assert run.operator().hello["policy_rules"] == [{"match": {}, "action": "auto_approve"}]
    run.finish()


@pytest.mark.parametrize("policy, answer", [("auto_approve", {"approved": True}),
                                            ("auto_reject", {"approved": False, "reason": "auto-rejected by policy"})])
def test_without_a_rule_the_runs_policy_answers_whether_or_not_somebody_watches(stage, policy, answer):
    run = stage(lead=f'default_approval_policy = "{policy}"')
    operator = run.operator()
    assert run.lead().call("propose_plan", plan=PLAN) == answer
    assert operator.told("approval_resolved")["by"] == "policy"


# ------------------------------------------------------------------ the plan gate

def test_nothing_is_spawned_before_a_plan_was_approved(stage):
    run = stage(run="require_plan_approval = true")
    lead, operator = run.lead(), run.operator()
    refused = lead.refused("spawn_worker", prompt="$ say x")
    assert refused.startswith("plan approval required: call propose_plan")
    for approved in (False, True):
        call = lead.start("propose_plan", {"plan": PLAN})
        told = asked(operator)
        assert (told["kind"], told["plan"], told["summary"]) == ("plan", PLAN, PLAN["summary"])
        operator.op("approve", request_id=told["request_id"], approved=approved)
        assert value_of(lead.answer(call)) == {"approved": approved}
        if not approved:
            assert lead.refused("spawn_worker", prompt="$ say x") == refused
    call = lead.start("request_approval", {"summary": "x", "plan": PLAN})
    operator.op("approve", request_id=asked(operator)["request_id"], approved=True)
    assert value_of(lead.answer(call)) == {"approved": True}
    assert lead.call("wait_for_worker", task_id=lead.call("spawn_worker", prompt="$ say x")["task_id"])["status"] == "Success"
    run.finish()


def test_an_approval_of_something_else_is_no_plan(stage):
    run = stage(run='require_plan_approval = true\napproval_policy = "auto_approve"')
    lead = run.lead()
    assert lead.call("request_approval", summary="x", plan=PLAN) == {"approved": True}
    assert "plan approval required" in lead.refused("spawn_worker", prompt="$ say x")


@pytest.mark.parametrize("arguments, words", [
    ({}, "plan: is required"), ({"plan": "do it"}, "plan: found"), ({"plan": {}}, "plan.summary: is required"),
    ({"plan": {"summary": "x", "risk": []}}, "plan.risk: unknown key; did you mean risks?"),
    ({"plan": PLAN, "timeout_secs": 0}, "timeout_secs: found 0; allowed: a number > 0"),
    ({"plan": PLAN, "fallback": "block"}, "fallback: unknown key")])
def test_arguments_that_are_wrong_are_named(house, arguments, words):
    assert words in house.refused("propose_plan", **arguments)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A lead whose run several tests share, for what changes nothing."""
    from tools import Home

    place = Home(tmp_path_factory.mktemp("house"))
    run = Stage(place)
    yield run.lead()
    run.end()
    place.end_everything()


def test_workers_have_no_approvals(stage):
    run = stage()
    worker = run.worker(run.spawn(run.lead(), "$ hang"), role="worker")
    for tool in ("request_approval", "propose_plan", "permission_prompt"):
        assert worker.refused(tool, summary="x").startswith("forbidden: a worker has no tool")
    assert run.lead().refused("permission_prompt", tool_name="Bash", input={}).startswith("forbidden: ")


# ------------------------------------------------------------------ permission_prompt

def permission(answer: dict) -> dict:
    """What a permission prompt was answered: one block of text and nothing else."""
    result = answer["result"]
    assert result.keys() == {"content", "isError"} and result["isError"] is False
    [block] = result["content"]
    assert block.keys() == {"type", "text"}
    return json.loads(block["text"])


def test_a_permission_is_answered_in_one_block_of_text(stage):
    run = stage(lead='permission_routing = "path_b"', more='[[approval_policy]]\n'
                'match = { actor = "boss→worker-*", tool_name = "Read" }\naction = "auto_approve"\n')
    lead, operator = run.lead(), run.operator()
    worker = run.worker(run.spawn(lead, "$ hang"), role="worker")
    shown = {t["name"]: t for t in worker.ask("tools/list")["result"]["tools"]}
    assert "outputSchema" not in shown["permission_prompt"] and "propose_plan" not in shown
    given = {"command": "rm x" + "y" * 9000}
    ask = {"tool_name": "Bash", "input": given, "tool_use_id": "toolu_1"}
    assert permission(worker.answer(worker.start("permission_prompt", {**ask, "tool_name": "Read"}))) == {
        "behavior": "allow", "updatedInput": given}
    for fields, answer in (({"approved": True}, {"behavior": "allow", "updatedInput": given}),
                           ({"approved": True, "edited_summary": '{"command": "ls"}'},
                            {"behavior": "allow", "updatedInput": {"command": "ls"}}),
                           ({"approved": False, "reason": "no"}, {"behavior": "deny", "message": "no"}),
                           ({"approved": False, "interrupt": True},
                            {"behavior": "deny", "message": "an operator rejected it", "interrupt": True})):
        call = worker.start("permission_prompt", ask)
        told = asked(operator, task_id="worker-1")
        assert told["summary"] == "Bash " + json.dumps(given), "all of what will be done is shown"
        if "edited_summary" in fields:
            bad = operator.op("approve", request_id=told["request_id"], approved=True, edited_summary="ls")
            assert bad["event"] == "op_failed" and "a JSON object" in bad["error"]
        assert operator.op("approve", request_id=told["request_id"], **fields)["event"] == "op_acked"
        assert permission(worker.answer(call)) == answer


# ------------------------------------------------------------------ commands

def test_the_queue_as_commands(stage, home):
    run = stage()
    lead, name = run.lead(), run.run.name
    assert home.pitboss("approvals", name, check=0).stdout == "nothing waits for an operator\n"
    assert listed(home, run) == []
    yes = lead.start("request_approval", {"summary": "Spend\nit", "cost_estimate": 2.5})
    no = lead.start("propose_plan", {"plan": PLAN})
    wait_for(lambda: len(told_all(run)) == 2, DEADLINE_S, "both requests")
    first, second = listed(home, run)
    assert (first["task_id"], first["summary"], first["kind"], first["plan"], first["category"]) == (
        "boss", "Spend\nit", "action", None, "cost")
    assert (second["kind"], second["plan"], second["category"]) == ("plan", PLAN, "plan")
    assert first["created_at"].endswith("Z") and first["expires_at"] > first["created_at"]
    text = home.pitboss("approvals", name, check=0).stdout
    assert "Spend it" in text and "risks: it may be late" in text and "$2.50" in text
    status = home.pitboss("status", name, check=0).stdout
    assert first["request_id"] in status
    seen = json.loads(home.pitboss("status", name, "--json", check=0).stdout)
    assert [a["request_id"] for a in seen["approvals"]] == [first["request_id"], second["request_id"]]
    done = home.pitboss("approve", name, first["request_id"][:8], "--comment", "fine", "--edit", "spend 1", check=0)
    assert "approved" in done.stderr
    assert value_of(lead.answer(yes)) == {"approved": True, "comment": "fine", "edited_summary": "spend 1"}
    home.pitboss("reject", name, second["request_id"], "--reason", "no", check=0)
    assert value_of(lead.answer(no)) == {"approved": False, "reason": "no"}
    assert "approved by an operator" in home.pitboss("reject", name, first["request_id"], check=4).stderr
    assert "unknown request_id" in home.pitboss("approve", name, "nobody", check=3).stderr
    assert home.pitboss("approve", "ffff", "x", check=3).stderr


def test_the_rules_as_commands(stage, home):
    run = stage(run='approval_policy = "auto_reject"')
    lead, name = run.lead(), run.run.name
    rules = home.manifest('[[approval_policy]]\nmatch = { tool_name = "Ba*" }\naction = "auto_approve"\n', "rules.toml")
    assert home.pitboss("policy", name, check=0).stdout == "-  auto_reject  whatever no rule matches\n"
    home.pitboss("policy", name, "--set", rules, check=0)
    assert lead.call("request_approval", summary="x", tool_name="Bash") == {"approved": True}
    assert "0  auto_approve  tool_name Ba*" in home.pitboss("policy", name, check=0).stdout
    for text, words in (("[[aproval_policy]]\naction = 'block'", "unknown table; did you mean approval_policy?"),
                        ("[[approval_policy]]", "action (line 1): is required"), ("", "there is none"), ("x", "it is not TOML")):
        assert words in home.pitboss("policy", name, "--set", home.manifest(text, "bad.toml"), check=2).stderr
    assert "0  auto_approve" in home.pitboss("policy", name, check=0).stdout, "what is wrong changes nothing"
    home.pitboss("policy", name, "--set", home.manifest("approval_policy = []", "none.toml"), check=0)
    assert lead.call("request_approval", summary="x", tool_name="Bash")["approved"] is False


def test_rules_can_be_tried(home):
    rules = home.manifest('[run]\napproval_policy = "auto_approve"\n'
                          '[[approval_policy]]\nmatch = { actor = "boss→*", cost_over = 2 }\naction = "block"\n'
                          '[[approval_policy]]\nmatch = { category = "plan" }\naction = "auto_reject"\n')

    def tried(*args) -> list[str]:
        return home.pitboss("policy", "test", rules, *args, check=0).stdout.splitlines()

    assert tried("--actor", "boss→worker-1", "--cost", "3") == [
        "0  block  actor boss→*, cost_over 2  matches", "block"]
    assert tried("--actor", "boss→worker-1", "--cost", "2", "--category", "plan") == [
        "0  block  actor boss→*, cost_over 2  does not match: cost_over 2: the cost is 2 USD",
        "1  auto_reject  category plan  matches", "auto_reject"]
    assert tried("--actor", "boss")[-2:] == ["-  auto_approve  no rule matches", "auto_approve"]
    found = json.loads(home.pitboss("policy", "test", rules, "--actor", "boss", "--category", "plan", "--json",
                                    check=0).stdout)
    assert (found["action"], found["rule"]) == ("auto_reject", 1)
    assert "--actor" in home.pitboss("policy", "test", rules, check=2).stderr


# ------------------------------------------------------------------ files

def test_a_file_decides_a_request(stage):
    run = stage()
    lead = run.lead()
    call = lead.start("request_approval", {"summary": "x"})
    wait_for(lambda: told_all(run), DEADLINE_S, "the request")
    path = drop(run, f"{told_all(run)[0]['request_id']}.json", '{"approved": true, "comment": "by file"}')
    assert value_of(lead.answer(call)) == {"approved": True, "comment": "by file"}
    assert run.events("approval_decided")[0]["by"] == "file"
    wait_for(lambda: not path.exists(), DEADLINE_S, "the end of the file")
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("text", ['{"approved": tru', '{"approved": "yes"}', '{"approved": true, "x": 1}', "[]", ""])
def test_a_file_that_says_nothing_is_put_aside_and_one_that_grows_is_waited_for(stage, text):
    run = stage()
    lead = run.lead()
    call = lead.start("request_approval", {"summary": "x"})
    wait_for(lambda: told_all(run), DEADLINE_S, "the request")
    name = told_all(run)[0]["request_id"]
    folder = run.run / "approvals"
    stranger = drop(run, "nobody.json", '{"approved": true}')
    bad = drop(run, f"{name}.json", text)
    wait_for(lambda: (folder / f"{name}.json.bad").exists() and (folder / "nobody.json.bad").exists(), DEADLINE_S,
             "what was put aside")
    assert not bad.exists() and not stranger.exists() and not run.events("approval_decided")
    with open(bad, "w") as f:                    # in two parts, as a slow editor would
        f.write('{"approved": false,')
        f.flush()
        f.write(' "reason": "no"}')
    assert value_of(lead.answer(call)) == {"approved": False, "reason": "no"}


def test_half_a_file_is_not_there_yet(stage):
    run = stage()
    lead = run.lead()
    slow, *others = [lead.start("request_approval", {"summary": str(n)}) for n in range(3)]
    wait_for(lambda: len(told_all(run)) == 3, DEADLINE_S, "the requests")
    name, *more = [e["request_id"] for e in told_all(run)]
    half = drop(run, f"{name}.json", '{"approved": true, "comment"')
    for other, call in zip(more, others):            # each of these was seen by another look at the folder
        drop(run, f"{other}.json", '{"approved": true}')
        assert value_of(lead.answer(call)) == {"approved": True}
    assert half.exists()
    with open(half, "a") as f:
        f.write(': "whole"}')
    assert value_of(lead.answer(slow)) == {"approved": True, "comment": "whole"}


def test_a_file_that_came_in_time_counts_though_nobody_was_there(stage):
    run = stage()
    lead = run.lead()
    lead.start("request_approval", {"summary": "x", "ttl_secs": 2})
    lead.start("request_approval", {"summary": "y", "ttl_secs": 2})
    wait_for(lambda: len(told_all(run)) == 2, DEADLINE_S, "the requests")
    events = told_all(run)
    kill(run)
    for event, moment in zip(events, (1.9, 2.1)):
        path = drop(run, f"{event['request_id']}.json", '{"approved": true}')
        os.utime(path, (event["at"] + moment, event["at"] + moment))
    wait_for(lambda: time.time() > events[-1]["at"] + 2.2, DEADLINE_S, "the end of their time")
    resume(run)
    wait_for(lambda: len(run.events("approval_decided")) == 2, DEADLINE_S, "the decisions")
    decided = {e["request_id"]: (e["approved"], e["by"]) for e in run.events("approval_decided")}
    assert [decided[e["request_id"]] for e in events] == [(True, "file"), (False, "time")]


# ------------------------------------------------------------------ who ends soon after a no

LEAVING = "$ call request_approval {args}\n$ say then I go"


@pytest.mark.parametrize("args, approved, status", [
    ({}, False, "ApprovalRejected"), ({}, True, "Success"), ({"ttl_secs": 0.05}, None, "ApprovalTimedOut")])
def test_who_leaves_soon_after_a_no_leaves_because_of_it(stage, args, approved, status):
    script = LEAVING.replace("{args}", json.dumps({"summary": "x", **args}))
    run = stage(script=script)
    if approved is not None:
        operator = run.operator()
        operator.op("approve", request_id=asked(operator)["request_id"], approved=approved)
    record = run.settle(0 if status == "Success" else 1)["boss"]
    assert record["status"] == status and record["final_message"] == "then I go"
    assert counters(record) == (1, int(bool(approved)), int(not approved))
    assert (record["failure_reason"] is None) == (status == "Success")


def test_who_is_cancelled_after_a_no_is_cancelled(stage):
    run = stage(run='approval_policy = "auto_reject"')
    run.lead().call("request_approval", summary="x")
    run.operator().op("cancel_worker", task_id="boss")
    assert run.settle(1)["boss"]["status"] == "Cancelled"


def test_the_state_is_told_in_the_words_of_the_wire(stage, home):
    run = stage(script=LEAVING.replace("{args}", '{"summary": "x"}'), run='approval_policy = "auto_reject"')
    assert run.settle(1)["boss"]["status"] == "ApprovalRejected"
    assert "ApprovalRejected" in home.pitboss("status", run.run.name, check=0).stdout


# ------------------------------------------------------------------ notifications

def test_a_request_is_notified_of_and_it_is_said_that_nobody_watches(stage):
    run = stage(more='[[notification]]\nkind = "log"\nevents = ["approval_request", "approval_pending"]\n')
    lead = run.lead()
    path = run.run / "notifications.jsonl"

    def told() -> list[tuple]:
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        assert all(row["severity"] == "warning" and row["event"]["task_id"] == "boss" and row["dedup_key"].endswith(
            f":{row['event']['kind']}:{row['event']['request_id']}") for row in rows)
        return sorted((row["event"]["kind"], row["event"]["summary"]) for row in rows)

    lead.start("request_approval", {"summary": "alone"})
    wait_for(lambda: told() == [("approval_pending", "alone"), ("approval_request", "alone")], DEADLINE_S, "both")
    operator = run.operator()
    lead.start("request_approval", {"summary": "watched"})
    asked(operator, summary="watched")
    wait_for(lambda: len(told()) == 3, DEADLINE_S, "the third")
    assert ("approval_request", "watched") in told()


# ------------------------------------------------------------------ calls that nobody waits for

def test_a_call_that_is_given_up_withdraws_its_request(stage, home):
    run = stage()
    lead, operator = run.lead(), run.operator()
    call = lead.start("request_approval", {"summary": "x"})
    told = asked(operator)
    lead.say({"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": call}})
    assert operator.told("approval_resolved")["by"] == "withdrawn"
    assert listed(home, run) == []
    late = operator.op("approve", request_id=told["request_id"], approved=True)
    assert late["event"] == "op_failed" and "gave up" in late["error"]


def test_a_request_ends_with_the_hand_that_asked(stage, home):
    run = stage(script='$ call request_approval {"summary": "x"}')
    operator = run.operator()
    asked(operator)
    operator.op("pause_worker", task_id="boss")
    assert operator.told("approval_resolved")["by"] == "withdrawn"
    assert listed(home, run) == []
    run.operator().op("cancel_run")
    run.settle(1)


# ------------------------------------------------------------------ a dispatcher that dies

def test_a_request_outlives_dispatchers_and_is_answered_once(stage, home):
    """The lead's own bridge asks; the dispatcher is killed after the request, and after the decision."""
    run = stage(script='$ call request_approval {"summary": "x"}\n$ say was told <1.comment>\n$ sleep 0.2')
    asked(run.operator())
    kill(run)
    [waiting] = listed(home, run)
    assert "pitboss resume" in home.pitboss("approve", run.run.name, waiting["request_id"], check=4).stderr
    resume(run)
    operator = run.operator()
    assert asked(operator)["request_id"] == waiting["request_id"]
    os.kill(run.process.pid, signal.SIGSTOP)            # its answer will be written down, if at all, as one line
    operator.say({"op": "approve", "id": 7, "request_id": waiting["request_id"], "approved": True, "comment": "yes"})
    os.kill(run.process.pid, signal.SIGCONT)
    wait_for(lambda: run.events("approval_decided"), DEADLINE_S, "the decision")
    kill(run)
    resume(run)
    record = run.settle(0)["boss"]
    assert counters(record) == (1, 1, 0) and record["hands"] == 1
    assert len(run.events("approval_asked")) == len(run.events("approval_decided")) == 1
    log = (run.run / "tasks/boss/stdout.log").read_text()
    assert log.count('\\"comment\\":\\"yes\\"') + log.count('"comment":"yes"') >= 1


def test_an_answer_that_was_not_delivered_is_delivered_by_the_next_dispatcher(stage):
    """The caller goes away before the answer, and asks again with its key after the dispatcher's death."""
    run = stage()
    nonce = "0123456789abcdef"
    lead, operator = run.lead(nonce=nonce), run.operator()
    call = lead.start("request_approval", {"summary": "x"})
    told = asked(operator)
    lead.close()
    operator.op("approve", request_id=told["request_id"], approved=True)
    kill(run)
    resume(run)
    again = run.lead(nonce=nonce)
    again.start("request_approval", {"summary": "x"}, id=call)
    assert value_of(again.answer(call)) == {"approved": True}
    assert len(run.events("approval_asked")) == 1


def test_a_call_attaches_again_to_its_request(stage):
    run = stage()
    nonce = "0123456789abcdef"
    lead = run.lead(nonce=nonce)
    call = lead.start("request_approval", {"summary": "x"})
    wait_for(lambda: told_all(run), DEADLINE_S, "the request")
    kill(run)
    resume(run)
    again = run.lead(nonce=nonce)
    again.start("request_approval", {"summary": "x"}, id=call)
    operator = run.operator()
    operator.op("approve", request_id=asked(operator)["request_id"], approved=False, reason="no")
    assert value_of(again.answer(call)) == {"approved": False, "reason": "no"}
    assert len(told_all(run)) == 1


def test_time_goes_on_while_nobody_is_there(stage):
    run = stage()
    lead = run.lead()
    lead.start("request_approval", {"summary": "x", "ttl_secs": 0.5, "fallback": "auto_approve"})
    wait_for(lambda: told_all(run), DEADLINE_S, "the request")
    kill(run)
    resume(run)
    wait_for(lambda: run.events("approval_decided"), DEADLINE_S, "the decision")
    [decided] = run.events("approval_decided")
    assert (decided["approved"], decided["by"]) == (True, "time")


def test_a_wait_keeps_its_age_when_another_dispatcher_answers_it(stage):
    """What the journal says of each wait counts: with a minute's wait begun long ago, nobody waits a minute anew."""
    run = stage()
    nonce = "0123456789abcdef"
    lead = run.lead(nonce=nonce)
    worker = {"task_id": run.spawn(lead, "$ hang")}
    waits = {"wait_for_worker": worker, "wait_actor": {"actor_id": worker["task_id"]},
             "wait_for_any": {"task_ids": [worker["task_id"]]}, "kv_wait": {"path": "/shared/never"}}
    calls = {tool: lead.start(tool, {**args, "timeout_secs": 3000}) for tool, args in waits.items()}
    wait_for(lambda: len(run.events("wait_began")) == 4, DEADLINE_S, "the waits")
    kill(run)
    journal = run.run / "journal.jsonl"
    journal.write_text(journal.read_text().replace('"timeout_s":3000', '"timeout_s":0.01'))
    resume(run)
    again = run.lead(nonce=nonce)
    again.next_id = 100                # its keys are those of the same bridge
    for tool, args in waits.items():
        again.start(tool, {**args, "timeout_secs": 3000}, id=calls[tool])
    for tool, call in calls.items():
        told = value_of(again.answer(call))
        assert told["settled"] is False, tool
    assert len(run.events("wait_began")) == 4, "it is the same wait"
    assert again.call("wait_for_worker", **worker, timeout_secs=0.01) == {"settled": False, "state": "Running"}
    run.operator().op("cancel_worker", task_id=worker["task_id"])
    again.call("wait_for_worker", **worker, timeout_secs=60)
    began = len(run.events("wait_began"))
    assert again.call("wait_for_worker", **worker, timeout_secs=60)["status"] == "Cancelled"
    assert len(run.events("wait_began")) == began, "what is there already is not waited for"
    run.finish(1)


MOMENTS = [f"journal:{kind}.{when}" for kind in ("approval_asked", "approval_decided")
           for when in ("before", "half", "after")]


@pytest.mark.parametrize("door", ["file", "command"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_death_around_a_request_or_its_answer_loses_and_doubles_nothing(home, moment, door):
    """The dispatcher dies before, in and after the line of the journal; the lead's own bridge asks and is answered."""
    home.repo("repo")
    script = ('$ call request_approval {"summary": "x"}\n'
              '$ call request_approval {"summary": "y", "ttl_secs": 0.05}')
    path = home.manifest(f'[run]\nmax_workers = 1\nbudget_usd = 1\n[lead]\nid = "boss"\ndirectory = "repo"\n'
                         f'agent = "demo"\nuse_worktree = false\nprompt = \'\'\'\n{script}\n\'\'\'\n')
    process = subprocess.Popen([PYTHON, str(FAULTS), moment, "1", "--", "dispatch", str(path)], env=home.env,
                               cwd=home.root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def waits() -> list[dict]:
        return wait_for(lambda: listed(home, run), DEADLINE_S, "the request")

    def answer() -> None:
        [waiting] = listed(home, run)
        if door == "file":
            drop(run, f"{waiting['request_id']}.json", '{"approved": true, "comment": "yes"}')
        else:
            home.start("approve", run.run.name, waiting["request_id"], "--comment", "yes")

    wait_for(lambda: home.runs.exists() and list(home.runs.glob("*/sockets.json")), DEADLINE_S, "the run")
    run = Found(home.run_dir())
    if "decided" in moment:
        waits()
        answer()
    wait_for(lambda: state_of(process.pid) in ("T", "Z", ""), DEADLINE_S, "the moment")
    process.kill()
    process.wait()
    dispatcher = home.start("resume", run.run.name)
    wait_for(lambda: sum(e["kind"] == "dispatcher_started" for e in read_events(run.run)) == 2, DEADLINE_S,
             "the next dispatcher")
    wait_for(lambda: listed(home, run) or [e for e in read_events(run.run) if e["kind"] == "approval_decided"],
             DEADLINE_S, "the request, or its answer")
    if not any(e["kind"] == "approval_decided" for e in read_events(run.run)) and not (
            door == "file" and "decided" in moment):
        answer()
    out = dispatcher.communicate(timeout=DEADLINE_S)
    [record] = read_records(run.run)
    assert dispatcher.returncode == 1 and record["status"] == "ApprovalTimedOut", out
    assert counters(record) == (2, 1, 1) and record["hands"] == 1
    kinds = [e["kind"] for e in read_events(run.run)]
    assert kinds.count("approval_asked") == kinds.count("approval_decided") == 2
    assert list((run.run / "approvals").iterdir()) == []
    results = [json.loads(line) for line in (run.run / "tasks/boss/stdout.log").read_text().splitlines()]
    told = [block["content"] for e in results if e["type"] == "user" and not e.get("isReplay")
            for block in e["message"]["content"]]
    assert [json.loads(words) for words in told[:2]] == [
        {"approved": True, "comment": "yes"}, {"approved": False, "from_ttl": True, "comment": "no operator available"}]


class Found(NamedTuple):
    """A run that a test started in its own way."""

    run: Path


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
