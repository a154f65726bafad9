"""The real claude with its own permission gate on, which asks through approvals, against a stand-in for the API.

Without claude they are skipped; PITBOSS_TEST_CLAUDE names one.
"""
from __future__ import annotations

import json

import pytest

from test_claude import LONG_S, bash, check_nothing_lives, offered, prompt, real, say
from test_claude_lead import Tree, ask, spawn, tree, wait  # noqa: F401 (a fixture)
from tools import read_events, wait_for

GATE = {"permission_routing": "path_b"}


class Asked:
    """A run whose agents ask, and the operator who answers."""

    def __init__(self, place: Tree, text: str, more: str = "") -> None:
        self.place = place
        path = place.write(text, lead=GATE)
        path.write_text(path.read_text() + more)
        self.process = place.home.start("dispatch", path)
        wait_for(lambda: list(place.home.runs.glob("*/sockets.json")) or self.process.poll() is not None, LONG_S,
                 "the run")
        assert self.process.poll() is None, self.process.communicate()
        self.run = place.newest()

    def next(self) -> dict:
        """The request that waits."""
        def found():
            assert self.process.poll() is None, self.process.communicate()
            kinds = [e["kind"] for e in read_events(self.run.folder)]
            return kinds.count("approval_asked") > kinds.count("approval_decided")
        wait_for(found, LONG_S, "a request")
        [waiting] = json.loads(self.place.home.pitboss("approvals", self.run.name, "--json", check=0).stdout)
        return waiting

    def answer(self, verb: str, *args: str) -> dict:
        waiting = self.next()
        self.place.home.pitboss(verb, self.run.name, waiting["request_id"], *args, check=0)
        return waiting

    def end(self, code: int) -> None:
        assert self.process.wait(LONG_S) == code, self.process.communicate()
        check_nothing_lives(self.run)


@pytest.mark.slow
@real
def test_the_gate_asks_and_is_answered(tree):  # noqa: F811
    """Denied, allowed with another input, allowed as it is; tools of pitboss itself are not asked about."""
    steps = (bash(f"echo no > {tree.path('denied')}"), bash(f"echo as asked > {tree.path('changed')}"),
             bash(f"echo yes > {tree.path('allowed')}"), ask("budget_status"), say("done"))
    case = Asked(tree, prompt(*steps))
    waiting = case.answer("reject", "--reason", "leave that alone")
    assert waiting["summary"].startswith("Bash {") and "echo no" in waiting["summary"]
    assert waiting["tool_name"] == "Bash" and waiting["actor_path"] == ["boss"]
    case.answer("approve", "--edit", json.dumps({"command": f"echo otherwise > {tree.path('changed')}"}))
    case.answer("approve")
    case.end(0)
    assert not tree.path("denied").exists() and tree.path("changed").read_text() == "otherwise\n"
    assert tree.path("allowed").read_text() == "yes\n"
    record = case.run.record("boss")
    assert (record["status"], record["final_message"]) == ("Success", "done")
    assert [record[f"approvals_{w}"] for w in ("requested", "approved", "rejected")] == [3, 2, 1]
    assert "leave that alone" in case.run.tool_results("boss") and "max_workers" in case.run.tool_results("boss")
    init = next(e for e in case.run.log("boss") if e.get("subtype") == "init")
    assert init["permissionMode"] == "default"
    assert "mcp__pitboss__permission_prompt" not in offered(tree.bodies()[0]), "it is hidden from the model"


@pytest.mark.slow
@real
def test_a_denial_with_an_interrupt_ends_the_agent(tree):  # noqa: F811
    case = Asked(tree, prompt(bash(f"echo no > {tree.path('denied')}"), say("went on")))
    case.answer("reject", "--reason", "stop", "--interrupt")
    case.end(1)
    record = case.run.record("boss")
    assert record["status"] == "ApprovalRejected" and record["exit_code"] == 1
    said = json.dumps([e["message"]["content"] for e in case.run.log("boss") if e["type"] == "assistant"])
    assert not tree.path("denied").exists() and "echo no" in said and "went on" not in said


@pytest.mark.slow
@real
def test_rules_answer_for_workers_and_nobody_is_asked(tree):  # noqa: F811
    yes, no = tree.path("yes"), tree.path("no")
    worker = spawn(bash(f"echo x > {yes}"), {"tool": "Write", "input": {"file_path": str(no), "content": "x"}}, say("w"),
                   tools=["Bash", "Write"])
    case = Asked(tree, prompt(worker, wait("$1.task_id"), say("done")), more=(
        '\n[[approval_policy]]\nmatch = { actor = "boss→worker-*", tool_name = "Bash" }\naction = "auto_approve"\n'
        '[[approval_policy]]\naction = "auto_reject"\n'))
    case.end(1)
    assert yes.exists() and not no.exists()
    records = case.run.records()
    assert records["worker-1"]["status"] == "ApprovalRejected" and records["boss"]["status"] == "Success"
    assert "auto-rejected by policy" in case.run.tool_results("worker-1")
