"""Approvals in a tree: the plan gate of each layer, requests of sub-leads and their workers; and what is refused.

As in test_subleads.py the scripted leads wait, and the test acts in their places.
"""
from __future__ import annotations

import json

import pytest

from stage import DEADLINE_S, Caller, Operator, Stage, value_of
from test_approvals import PLAN, asked, counters, drop, kill, listed, permission, resume
from test_subleads import MODEL, tree  # noqa: F401 (a fixture)
from tools import Home, wait_for

GATED = "plan approval required: call propose_plan"
BLOCKED = 'approval_policy = "block"\n'


def approve(operator: Operator, caller: Caller, call: int, approved: bool = True, **facts) -> dict:
    """Answer what a call asks, as the operator is told of it; what the caller is told."""
    told = asked(operator, **facts)
    assert operator.op("approve", request_id=told["request_id"], approved=approved)["event"] == "op_acked"
    return value_of(caller.answer(call))


# ------------------------------------------------------------------ the plan gate of each layer

def test_a_plan_opens_the_gate_of_its_own_layer_alone(tree):  # noqa: F811
    run = tree(run="require_plan_approval = true")
    lead, operator = run.lead(), run.operator()
    given = {"prompt": "$ run sleep 600", "model": MODEL, "budget_usd": 10, "max_workers": 2}
    assert lead.refused("spawn_sublead", **given).startswith(GATED)
    assert approve(operator, lead, lead.start("propose_plan", {"plan": PLAN}), task_id="boss") == {"approved": True}
    name, sub = run.sublead(lead)
    down, below = run.sublead(lead, read_down=True)
    for caller in (sub, below):
        assert caller.refused("spawn_worker", prompt="$ say x").startswith(GATED), "the root's plan is not its own"
    assert approve(operator, sub, sub.start("propose_plan", {"plan": PLAN}), False, task_id=name) == {"approved": False}
    assert sub.refused("spawn_worker", prompt="$ say x").startswith(GATED)
    assert approve(operator, sub, sub.start("propose_plan", {"plan": PLAN}), task_id=name) == {"approved": True}
    worker = sub.call("spawn_worker", prompt="$ say x")["task_id"]
    assert sub.call("wait_for_worker", task_id=worker)["status"] == "Success"
    assert below.refused("spawn_worker", prompt="$ say x").startswith(GATED), "nor is another sub-lead's"
    assert approve(operator, sub, sub.start("propose_plan", {"plan": PLAN}), False, task_id=name) == {"approved": False}
    assert sub.call("spawn_worker", prompt="$ say x"), "one plan was approved, and that is what is asked for"
    kill(run)
    resume(run)
    assert run.worker(name, role="sublead").call("spawn_worker", prompt="$ say x")
    assert run.worker(down, role="sublead").refused("spawn_worker", prompt="$ say x").startswith(GATED)
    run.operator().op("cancel_run")
    run.settle(1)


def test_who_is_refused_by_the_gate_costs_nothing_and_is_nobody(tree):  # noqa: F811
    run = tree(run='require_plan_approval = true\napproval_policy = "auto_reject"', lead="max_subleads = 1\n")
    lead = run.lead()
    before = lead.call("budget_status")
    for _ in range(3):
        assert lead.refused("spawn_sublead", prompt="x", model=MODEL, budget_usd=1, max_workers=1).startswith(GATED)
    assert lead.call("propose_plan", plan=PLAN)["approved"] is False
    assert lead.call("budget_status") == before and lead.call("list_workers") == {"workers": [], "subleads": []}
    assert len(run.events("actor_added")) == 1 and [p.name for p in (run.run / "tasks").iterdir()] == ["boss"]
    run.finish(None)


# ------------------------------------------------------------------ requests of sub-leads

def test_a_sublead_asks_as_its_lead_does_and_the_path_says_who(tree, home):  # noqa: F811
    rules = '[[approval_policy]]\nmatch = { actor = "boss→sublead-1", tool_name = "Bash" }\naction = "auto_reject"\n' \
            '[[approval_policy]]\nmatch = { actor = "*→worker-*" }\naction = "auto_approve"\n'
    run = tree(lead='permission_routing = "path_b"\n', more=rules)
    lead, operator = run.lead(), run.operator()
    one, sub = run.sublead(lead, lead_timeout_secs=77)
    two, other = run.sublead(lead)
    no = {"approved": False, "reason": "auto-rejected by policy"}
    assert sub.call("request_approval", summary="x", tool_name="Bash") == no
    call = other.start("request_approval", {"summary": "mine", "tool_name": "Bash"})
    assert asked(operator)["actor_path"] == ["boss", two], "the rule is for the other one"
    waiting, = listed(home, run)
    assert (waiting["task_id"], waiting["summary"]) == (two, "mine")
    operator.op("approve", request_id=waiting["request_id"], approved=True)
    assert value_of(other.answer(call)) == {"approved": True}
    worker = sub.call("spawn_worker", prompt="$ hang")["task_id"]
    gate = run.worker(worker, role="worker")
    asks = {"tool_name": "Bash", "input": {"command": "ls"}, "tool_use_id": "t"}
    assert permission(gate.answer(gate.start("permission_prompt", asks)))["behavior"] == "allow", "boss→sublead-1→worker-1"
    sub.start("request_approval", {"summary": "how long"})
    asked(operator, summary="how long")
    assert run.events("approval_asked", actor=one)[-1]["ttl_s"] == 77, "its own time, not the root's"
    lead.call("cancel_worker", task_id=one)
    ended = operator.told("approval_resolved", by="withdrawn")
    assert ended["request_id"] == run.events("approval_asked", actor=one)[-1]["request_id"]
    assert listed(home, run) == []
    records = run.finish(None)
    assert (counters(records[one]), counters(records[two]), counters(records[worker])) == ((2, 0, 1), (1, 1, 0), (1, 1, 0))


def test_a_sublead_that_leaves_after_a_no_tells_its_root_why(tree):  # noqa: F811
    run = tree(run='approval_policy = "auto_reject"')
    lead = run.lead()
    script = '$ call request_approval {"summary": "x"}\n$ say then not'
    name = lead.call("spawn_sublead", prompt=script, model=MODEL, budget_usd=1, max_workers=1)["sublead_id"]
    told = lead.call("wait_actor", actor_id=name)["Sublead"]
    assert told["record"]["status"] == "ApprovalRejected" and told["record"]["final_message"] == "then not"
    assert told["unspent_usd"] == pytest.approx(1 - told["spent_usd"])
    assert lead.call("budget_status")["reserved_usd"] == 0
    run.finish(1)


def test_a_subleads_request_outlives_the_dispatcher(tree):  # noqa: F811
    run = tree()
    name, sub = run.sublead(run.lead())
    nonce = "0123456789abcdef"
    again = run.worker(name, role="sublead", nonce=nonce)
    call = again.start("request_approval", {"summary": "x"})
    wait_for(lambda: run.events("approval_asked"), DEADLINE_S, "the request")
    kill(run)
    drop(run, f"{run.events('approval_asked')[0]['request_id']}.json", '{"approved": true, "comment": "go"}')
    resume(run)
    third = run.worker(name, role="sublead", nonce=nonce)
    third.start("request_approval", {"summary": "x"}, id=call)
    assert value_of(third.answer(call)) == {"approved": True, "comment": "go"}
    assert len(run.events("approval_asked")) == len(run.events("approval_decided")) == 1
    run.finish()


# ------------------------------------------------------------------ what is refused, by name

@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A lead with a sub-lead whose run several tests share, for what changes nothing."""
    place = Home(tmp_path_factory.mktemp("house"))
    run = Stage(place, lead="allow_subleads = true\n")
    yield run
    run.end()
    place.end_everything()


BAD_ASKS = [
    ("request_approval", {}, "summary: is required"), ("request_approval", {"summary": ""}, "summary: found"),
    ("request_approval", {"summary": "x", "ttl_secs": 0}, "ttl_secs: found 0; allowed: a number > 0"),
    ("request_approval", {"summary": "x", "ttl_secs": -1}, "ttl_secs: found -1"),
    ("request_approval", {"summary": "x", "ttl_secs": "1"}, "ttl_secs: found"),
    ("request_approval", {"summary": "x", "timeout_secs": 0}, "timeout_secs: found 0"),
    ("request_approval", {"summary": "x", "fallback": "maybe"}, "fallback: found"),
    ("request_approval", {"summary": "x", "cost_estimate": -1}, "cost_estimate: found -1"),
    ("request_approval", {"summary": "x", "tool_name": 3}, "tool_name: found 3"),
    ("request_approval", {"summary": "x", "ttl": 3}, "ttl: unknown key"),
    ("propose_plan", {"plan": {"summary": 1}}, "plan.summary: found 1"),
    ("propose_plan", {"plan": {"summary": "x", "risks": "all"}}, "plan.risks: found"),
    ("propose_plan", {"plan": {"summary": "x", "risks": [1]}}, "plan.risks: found"),
    ("propose_plan", {"plan": {"summary": "x", "resources": {"a": 1}}}, "plan.resources: found"),
    ("propose_plan", {"plan": {"summary": "x", "rationale": ["a"]}}, "plan.rationale: found"),
    ("propose_plan", {"plan": {"summary": "x", "rollback": 0}}, "plan.rollback: found 0"),
    ("propose_plan", {"plan": []}, "plan: found"), ("propose_plan", {"plan": None}, "plan: found null"),
]


@pytest.mark.parametrize("tool, arguments, words", BAD_ASKS)
def test_what_cannot_be_asked_is_named_and_not_asked(house, tool, arguments, words):
    assert words in house.lead().refused(tool, **arguments)
    assert house.events("approval_asked") == []


BAD_RULES = [
    ("action = 'ask'", "approval_policy[0].action (line 9): found \"ask\"; allowed: one of block, auto_approve"),
    ("match = {}", "approval_policy[0].action (line 8): is required"),
    ("action = 'block'\nmatch = { actr = 'x' }", "approval_policy[0].match.actr (line 10): unknown key; did you mean actor?"),
    ("action = 'block'\nmatch = { category = 'money' }", "approval_policy[0].match.category (line 10): found \"money\""),
    ("action = 'block'\nmatch = { cost_over = -1 }", "approval_policy[0].match.cost_over (line 10): found -1"),
    ("action = 'block'\nmatch = { cost_over = nan }", "approval_policy[0].match.cost_over (line 10): found NaN"),
    ("action = 'block'\nmatch = { tool_name = 1 }", "approval_policy[0].match.tool_name (line 10): found 1"),
    ("action = 'block'\nmatch = 'all'", "approval_policy[0].match (line 10): found \"all\"; allowed: a table"),
]


def test_rules_that_are_wrong_are_all_named_and_nothing_starts(home):
    home.repo("repo", 1)
    for rule, words in BAD_RULES:
        path = home.manifest('[run]\nmax_workers = 1\nbudget_usd = 1\n[lead]\nid = "boss"\ndirectory = "repo"\n'
                             f'prompt = "x"\n[[approval_policy]]\n{rule}\n')
        assert words in home.pitboss("dispatch", path, check=2).stderr
    assert not home.runs.exists()


def test_an_answer_for_another_run_answers_nothing(tree, home, tmp_path_factory):  # noqa: F811
    run, place = tree(), Home(tmp_path_factory.mktemp("another"))
    other = Stage(place)
    try:
        caller = other.lead()
        call = caller.start("request_approval", {"summary": "x"})
        wait_for(lambda: other.events("approval_asked"), DEADLINE_S, "the request")
        name = other.events("approval_asked")[0]["request_id"]
        answer = run.operator().op("approve", request_id=name, approved=True)
        assert answer["event"] == "op_failed" and f"unknown request_id: {name}" in answer["error"]
        assert f"unknown request_id: {name}" in home.pitboss("approve", run.run.name, name, check=3).stderr
        assert not other.events("approval_decided") and not run.events("approval_decided")
        other.operator().op("approve", request_id=name, approved=True)
        assert value_of(caller.answer(call)) == {"approved": True}
        other.finish()
        place.pitboss("approve", other.run.name, name, check=4)
    finally:
        other.end()
        place.end_everything()
    run.finish()


MEGABYTE = "ä" + "x" * ((1 << 20) - 2)


@pytest.mark.parametrize("door", ["socket", "file"])
def test_an_edited_summary_of_a_megabyte_arrives_whole_and_a_longer_one_is_refused(tree, home, door):  # noqa: F811
    run = tree()
    lead, operator = run.lead(), run.operator()
    call = lead.start("request_approval", {"summary": "y" * (1 << 20)})
    name = asked(operator)["request_id"]
    answer, longer = ({"approved": True, "edited_summary": MEGABYTE + more} for more in ("", "x"))
    if door == "file":
        drop(run, f"{name}.json", json.dumps(longer))
        wait_for((run.run / "approvals" / f"{name}.json.bad").exists, DEADLINE_S, "the file put aside")
        assert not run.events("approval_decided")
        drop(run, f"{name}.json", json.dumps(answer))
    else:
        told = operator.op("approve", request_id=name, **longer)
        assert (told["event"], told["error"]) == (
            "op_failed", "edited_summary: found 1048577 bytes; allowed: 1048576 at most")
        assert operator.op("approve", request_id=name, **answer)["event"] == "op_acked"
    assert value_of(lead.answer(call)) == answer
    assert len(home.pitboss("status", run.run.name, check=0).stdout) < 1 << 12
    kill(run)
    resume(run)
    assert len(run.events("approval_decided")) == 1
    run.finish()


def test_nobody_reads_or_writes_the_store_of_another_layer(tree):  # noqa: F811
    run = tree()
    lead = run.lead()
    one, sub = run.sublead(lead)
    two, other = run.sublead(lead)
    for caller, name in ((lead, "root"), (sub, one), (other, two)):
        caller.call("kv_set", path="/shared/secret", value=name)
        caller.call("kv_set", path="/peer/self/note", value=name)
    for path in (f"/sub/{two}/shared/secret", f"/sub/{one}/shared/secret", "/sub/boss/shared/secret"):
        for tool, more in (("kv_get", {}), ("kv_set", {"value": "x"}), ("kv_delete", {}),
                           ("kv_wait", {"timeout_secs": 0.01})):
            assert sub.refused(tool, path=path, **more), (tool, path)
    assert lead.refused("kv_get", path=f"/sub/{one}/shared/secret"), "without read_down the root does not either"
    for path in (f"/peer/{two}/note", "/peer/boss/note"):
        assert sub.refused("kv_set", path=path, value="x", override_flag=True), path
        told = sub.answer(sub.start("kv_get", {"path": path}))
        assert told["result"]["isError"] or value_of(told) == {"entry": None}, path
    found = [e["path"] for e in sub.call("kv_list", glob="/**")["entries"]]
    assert found == [f"/peer/{one}/note", "/shared/secret"]
    for caller, name in ((lead, "root"), (sub, one), (other, two)):
        assert caller.call("kv_get", path="/shared/secret")["entry"]["value"] == name
    run.finish(0)
