"""What needs an operator is one pure function of (run, now, when logs grew, who lives without a dispatcher)."""
from __future__ import annotations

import pytest

import pitboss

NOW = 2000.0


class Made:
    """A run made of events, one second apart."""

    def __init__(self, mode: str = "flat") -> None:
        self.run, self.at = pitboss.RunState(), 999.0
        self.tell("run_opened", run_id="r" * 36, name="n", mode=mode, max_parallel=9)
        self.tell("dispatcher_started")

    def tell(self, kind: str, **facts) -> None:
        self.at += 1
        pitboss.step(self.run, {"seq": self.run.seq + 1, "at": self.at, "kind": kind, **facts})

    def add(self, name: str, parent: str | None = None, role: str = "task", start: bool = True) -> None:
        leads = {"budget_usd": 9.0, "max_workers": 4} if role in pitboss.LEADERS else {}
        self.tell("actor_added", actor=name, role=role, agent="demo", model="m", directory="/d", account="demo:1",
                  use_worktree=False, timeout_s=9000.0, branch=None, parent=parent,
                  layer=parent or (name if leads else ""), **leads)
        if start:
            self.tell("hand_dealt", actor=name, hand=1, session_id="s", how="prompt", log_at=0, message_id="m")
            self.tell("hand_started", actor=name, hand=1, handle={})

    def end(self, name: str, status: str, words: str = "") -> None:
        self.tell("hand_ended", actor=name, hand=1, lived_s=1.0, usage=[0, 0, 0, 0], code=1, status=status,
                  reason={"kind": "unknown", "message": words} if words else None)

    def ask(self, name: str, request: str) -> None:
        self.tell("approval_asked", actor=name, request_id=request, form="action", category="tool_use",
                  summary="may\x1b[31m I", fallback="auto_reject", ttl_s=None, call=f"{name}/n/{request}")

    def needs(self, now: float = NOW, **known) -> list[tuple]:
        return [(n.kind, n.actor, n.text) for n in pitboss.attention(self.run, now, **known)]


def test_a_run_at_work_needs_nobody():
    made = Made()
    made.add("a")
    made.add("b", start=False)
    assert made.needs(now=made.at + pitboss.STALL_S - 3) == []


@pytest.mark.parametrize("status", pitboss.STATUSES)
def test_who_ended_as_nobody_wanted_is_a_failure(status):
    made = Made()
    made.add("a")
    made.add("b")
    made.end("a", status, "why\nnot")
    wanted = {"Success", "Cancelled", "ApprovalRejected"}
    assert made.needs(now=made.at) == ([] if status in wanted else [("failure", "a", f"{status}  why not")])


def test_what_a_lead_that_succeeded_needs_no_more_is_no_failure():
    made = Made("hierarchical")
    made.add("boss", role="lead")
    made.add("w", "boss", "worker")
    made.end("boss", "Success")
    made.end("w", "Failed", "broke")
    assert made.needs(now=made.at) == []


def test_requests_come_before_failures_and_the_oldest_first():
    made = Made()
    for name in "abc":
        made.add(name)
    made.end("c", "Failed")
    made.ask("b", "r1")
    made.ask("a", "r2")
    assert made.needs(now=made.at) == [("approval", "b", "asks (tool_use): may I"),
                                       ("approval", "a", "asks (tool_use): may I"), ("failure", "c", "Failed")]
    assert [n.request for n in pitboss.attention(made.run, made.at)] == ["r1", "r2", ""]


@pytest.mark.parametrize("hold, needed", [("auth", True), ("limit", False), ("probe", False)])
def test_a_hold_that_ends_by_itself_needs_nobody(hold, needed):
    made = Made()
    made.add("a")
    made.tell("hold_began", account="demo:1", hold=hold, until=5000.0)
    assert [n[0] for n in made.needs(now=made.at)] == ["hold"] * needed


def test_silence_is_a_stall_unless_its_log_grew_or_it_waits_for_others():
    made = Made("hierarchical")
    made.add("boss", role="lead")
    made.add("w", "boss", "worker")
    late = made.at + pitboss.STALL_S
    assert made.needs(now=late) == [("stall", "w", "has said nothing for 10m00s")]     # the lead waits for it
    assert made.needs(now=late, heard={"w": late - 1}) == []
    made.tell("usage", actor="w", hand=1, usage=[1, 1, 1, 1], cost_usd=0.1)
    assert made.needs(now=late) == []
    made.ask("w", "r1")
    assert [n[0] for n in made.needs(now=late + 99)] == ["approval"]
    made.end("w", "Success")
    assert [n[:2] for n in made.needs(now=late + 99)] == [("approval", "w"), ("stall", "boss")]


def test_a_lead_whose_worker_rests_does_not_wait_for_it():
    made = Made("hierarchical")
    made.add("boss", role="lead")
    made.add("w", "boss", "worker")
    made.tell("pause_decided", actor="w", mode="freeze")
    assert made.needs(now=made.at) == []
    assert [n[:2] for n in made.needs(now=made.at + pitboss.STALL_S)] == [("stall", "boss")]


def test_when_all_that_lives_rests_somebody_has_to_continue_it():
    made = Made()
    made.add("a")
    made.add("b")
    made.tell("pause_decided", actor="a", mode="freeze")
    assert made.needs(now=made.at) == []
    made.tell("pause_decided", actor="b", mode="freeze")
    assert made.needs(now=made.at + 9000) == [("rest", "a", "is frozen, and nothing else of the run goes on"),
                                              ("rest", "b", "is frozen, and nothing else of the run goes on")]
    made.tell("continue_decided", actor="b")
    assert made.needs(now=made.at) == []


@pytest.mark.parametrize("alone, words", [(0, "its dispatcher died"), (1, "its dispatcher died; 1 agent lives without it"),
                                          (7, "its dispatcher died; 7 agents live without it")])
def test_a_run_without_a_dispatcher_comes_first_and_no_silence_counts(alone, words):
    made = Made()
    made.add("a")
    made.ask("a", "r1")
    assert made.needs(now=made.at + 9999, alone=alone)[0] == ("dispatcher", "", words)
    assert len(made.needs(now=made.at + 9999, alone=alone)) == 2


def test_no_room_is_said():
    made = Made()
    made.add("a")
    made.tell("drained", why="signal", signal="INT")
    assert made.needs(now=made.at) == []
    made.tell("drained", why="no_space")
    assert [n[0] for n in made.needs(now=made.at)] == ["space"]


def test_of_a_finished_run_failures_are_left():
    made = Made()
    made.add("a")
    made.end("a", "TimedOut", "9000 s had passed")
    made.tell("closed", actor="a")
    made.tell("run_finished", ended_at=made.at)
    assert made.needs(alone=0) == [("failure", "a", "TimedOut  9000 s had passed")]


def test_every_kind_of_need_says_what_to_do_in_json():
    for kind in pitboss.NEEDS:
        shown = pitboss.show_need(pitboss.Need(kind, "a", "text", 0.0), "RUN")
        assert shown["advice"].startswith("pitboss ") and "{" not in shown["advice"]
        assert shown["advice"].split()[1] in pitboss.COMMANDS
        assert shown["kind"] == kind and shown["since"] == "1970-01-01T00:00:00.000Z"
