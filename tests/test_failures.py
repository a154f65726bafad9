"""How a hand's end is read: success, failure and its reason, a stop, or another hand.

A table of what agents print and how they end, then every combination of the facts that decide, for rules that
must hold whatever happened.
"""
from __future__ import annotations

import itertools
import json
from typing import NamedTuple

import pytest

import pitboss
from pitboss import Ending


def talk_of(*events: dict) -> pitboss.Talk:
    talk = pitboss.Talk("claude-sonnet-4-6")
    for event in events:
        pitboss.fold_line(talk, json.dumps(event, separators=(",", ":")).encode(), "claude")
    assert talk.skipped == 0
    return talk


def actor_of(**facts) -> pitboss.Actor:
    return pitboss.Actor("a", "task", "claude", "m", "/gone", True, 60, None, **facts)


INIT = {"type": "system", "subtype": "init", "session_id": "s"}
ECHO = {"type": "user", "message": {"role": "user", "content": "x"}, "uuid": "u", "isReplay": True}
SAID = {"type": "assistant",
        "message": {"id": "m1", "model": "m", "content": [{"type": "text", "text": "working"}]}}


def synthetic(code: str) -> dict:
    return {"type": "assistant", "message": {"id": "e", "model": "<synthetic>", "content": []}, "error": code}


def result(error: bool = False, text: str | None = "the text", **more) -> dict:
    return {"type": "result", "is_error": error, **({"result": text} if text is not None else {}), **more}


GOOD = [INIT, ECHO, SAID, result()]


def failed(code: str, status: int | None = None, **more) -> list[dict]:
    return [INIT, ECHO, synthetic(code), result(True, "API Error", api_error_status=status, **more)]


NOT_HEARD = [INIT, synthetic("rate_limit"), result(True, "API Error", api_error_status=429)]
NOW = 1795275000.0
LIMIT = {"type": "rate_limit_event", "rate_limit_info": {"status": "rejected", "resetsAt": 1795275595}}


class Case(NamedTuple):
    """One end of a hand: what was printed, how it ended, and what follows.

    `gives` is a status, or `again: HOW (CAUSE)`; `kind` and `says` are of the reason.
    """

    name: str
    events: list
    end: Ending
    gives: str
    kind: str | None = None
    says: str = ""
    actor: dict = {}


CASES = [
    # ---- a good end
    Case("a result and exit 0", GOOD, Ending(0), "Success"),
    Case("a result that is an empty text", [*GOOD[:3], result(text="")], Ending(0), "Success"),
    Case("the last of two results counts", [INIT, result(True, "no"), SAID, result()], Ending(0), "Success"),
    Case("stderr does not matter then", GOOD, Ending(0, stderr="warning"), "Success"),
    Case("nobody knows its status, but the result is good", GOOD, Ending(None, vanished=True), "Success"),
    # ---- a bad end
    Case("a result, and then exit 3", GOOD, Ending(3), "Failed", "unknown", "exit status 3"),
    Case("a result, and then a crash", GOOD, Ending(None, 11), "Failed", "unknown", "ended by SIGSEGV"),
    Case("exit 0 without a result", [INIT, ECHO, SAID], Ending(0), "Failed", "unknown",
         "exit status 0 without a result"),
    Case("exit 1 and a word on stderr", [], Ending(1, stderr="a\nbad flag\n"), "Failed", "unknown",
         "exit status 1 without a result: a\nbad flag"),
    Case("an error that says nothing", [INIT, ECHO, result(True, None)], Ending(1), "Failed", "unknown",
         "exit status 1"),
    Case("an error that exits 0", [INIT, ECHO, result(True, "no")], Ending(0), "Failed", "unknown", "no"),
    Case("errors instead of a text", [INIT, ECHO, result(True, None, errors=["too many turns", "x"])],
         Ending(1), "Failed", "unknown", "too many turns; x"),
    Case("killed from outside", [INIT, ECHO, SAID], Ending(None, 9), "Failed", "unknown", "ended by SIGKILL"),
    Case("an unknown signal", [INIT, ECHO, SAID], Ending(None, 40), "Failed", "unknown", "signal 40"),
    Case("its folder is gone", [], Ending(None, no_folder=True), "SpawnFailed", "unknown", "/gone"),
    # ---- the provider said no
    Case("a limit", failed("rate_limit", 429), Ending(1), "Failed", "rate_limit", "API Error"),
    Case("a limit of an account", failed("rate_limit", 429), Ending(1), "again: resume (limit)", "rate_limit",
         "API Error", {"account": "x"}),
    Case("a limit of an account, and no session", failed("rate_limit", 429), Ending(1),
         "again: prompt (limit)", "rate_limit", "API Error", {"account": "x", "resumes": False}),
    Case("a limit before the old session had the prompt", NOT_HEARD, Ending(1),
         "again: again (limit)", "rate_limit", "API Error", {"account": "x", "how": "again"}),
    Case("a limit before the new session had the prompt", NOT_HEARD, Ending(1),
         "again: again (limit)", "rate_limit", "API Error", {"account": "x"}),
    Case("a limit, and the agent never told its session", NOT_HEARD[1:], Ending(1),
         "again: prompt (limit)", "rate_limit", "API Error", {"account": "x"}),
    Case("a limit after the old session had answered", [SAID, *failed("rate_limit", 429)], Ending(1),
         "again: resume (limit)", "rate_limit", "API Error", {"account": "x", "how": "again"}),
    Case("a limit too often without an end or an answer", failed("rate_limit", 429), Ending(1), "Failed",
         "rate_limit", "API Error", {"account": "x", "blind": 20}),
    Case("a limit very often, but with an end", [LIMIT, *failed("rate_limit", 429)], Ending(1),
         "again: resume (limit)", "rate_limit", "API Error", {"account": "x", "blind": 20}),
    Case("a limit very often, but with answers", [SAID, *failed("rate_limit", 429)], Ending(1),
         "again: resume (limit)", "rate_limit", "API Error", {"account": "x", "blind": 20}),
    Case("a limit of an account, and its time was up", failed("rate_limit", 429), Ending(1), "TimedOut",
         "unknown", "60 s", {"account": "x", "stop": "timeout"}),
    Case("no login of an account", failed("authentication_failed", 401), Ending(1), "Failed", "auth_failure",
         actor={"account": "x"}),
    Case("no login", failed("authentication_failed", 401), Ending(1), "Failed", "auth_failure"),
    Case("no money", failed("billing_error", 400), Ending(1), "Failed", "auth_failure"),
    Case("the server broke", failed("server_error", 500), Ending(1), "Failed", "network_error"),
    Case("the server is busy", failed("overloaded", 529), Ending(1), "Failed", "network_error"),
    Case("a wrong request", failed("invalid_request", 413), Ending(1), "Failed", "invalid_argument"),
    Case("no such model", failed("model_not_found", 404), Ending(1), "Failed", "invalid_argument"),
    Case("another 400", failed("unknown", 400), Ending(1), "Failed", "invalid_argument"),
    Case("a code from a newer version", failed("lunch_break", 418), Ending(1), "Failed", "unknown"),
    Case("too long a prompt", failed("invalid_request", 400, terminal_reason="prompt_too_long"), Ending(1),
         "Failed", "context_exceeded"),
    Case("a limit, and then it died", [INIT, ECHO, synthetic("rate_limit")], Ending(None, 9), "Failed",
         "rate_limit"),
    Case("an old error is forgotten with a good result", [*failed("rate_limit", 429), SAID, result()],
         Ending(3), "Failed", "unknown", "exit status 3"),
    # ---- it never began
    Case("silent, exit 0", [INIT], Ending(0), "again: afresh (unbegun)"),
    Case("silent, killed", [], Ending(None, 15), "again: afresh (unbegun)"),
    Case("silent, but only once", [INIT], Ending(0), "Failed", "unknown", actor={"afresh": True}),
    Case("silent with a word on stderr", [], Ending(1, stderr="bad flag"), "Failed", "unknown", "bad flag"),
    Case("its session is unknown", [result(True, None, errors=["No conversation found with session ID: s"])],
         Ending(1), "again: afresh (unbegun)", actor={"how": "resume", "lost": 1}),
    Case("its session is unknown, on stderr", [],
         Ending(1, stderr="No conversation found with session ID: s"), "again: afresh (unbegun)",
         actor={"how": "again"}),
    Case("its session is taken", [], Ending(1, stderr="Error: Session ID s is already in use."),
         "again: afresh (unbegun)"),
    Case("unknown once more", [result(True, None, errors=["No conversation found"])], Ending(1), "Failed",
         "unknown", "No conversation found", actor={"afresh": True}),
    # ---- it vanished
    Case("vanished at work", [INIT, ECHO, SAID], Ending(None, vanished=True), "again: resume (lost)"),
    Case("vanished at work for the third time", [INIT, ECHO, SAID], Ending(None, vanished=True),
         "again: resume (lost)", actor={"lost": 2}),
    Case("vanished too often", [INIT, ECHO, SAID], Ending(None, vanished=True), "Failed", "unknown",
         "vanished", actor={"lost": 3}),
    Case("vanished, and its agent cannot resume", [INIT, ECHO, SAID], Ending(None, vanished=True),
         "again: prompt (lost)", actor={"resumes": False}),
    Case("vanished before it was announced", [], Ending(None, vanished=True), "again: afresh (unbegun)"),
    Case("vanished after it was announced", [INIT], Ending(None, vanished=True), "again: resume (lost)"),
    Case("vanished with an error as its result", [INIT, ECHO, result(True, "no")],
         Ending(None, vanished=True), "again: resume (lost)"),
    # ---- it was stopped
    Case("its time was up", [INIT, ECHO, SAID], Ending(None, 15), "TimedOut", "unknown",
         "60 s had passed; ended by SIGTERM", {"stop": "timeout"}),
    Case("its time was up, and it exits 0", [INIT, ECHO, SAID], Ending(0), "TimedOut", "unknown",
         "60 s had passed", {"stop": "timeout"}),
    Case("its time was up before a result", GOOD, Ending(0), "TimedOut", "unknown", "60 s",
         {"stop": "timeout"}),
    Case("cancelled", [INIT, ECHO, SAID], Ending(0), "Cancelled", None, "", {"stop": "cancel"}),
    Case("cancelled with words", [INIT], Ending(None, 2), "Cancelled", "unknown",
         "wrong branch; ended by SIGINT", {"stop": "cancel", "stop_reason": "wrong branch"}),
    Case("cancelled, and it vanished", [INIT], Ending(None, vanished=True), "Cancelled", None, "",
         {"stop": "cancel"}),
    Case("done, and it would not go", GOOD, Ending(None, 9), "Success", None, "",
         {"stop": "linger", "stop_done": True}),
    Case("done, and cancelled while it left", GOOD, Ending(None, 15), "Success", None, "",
         {"stop": "cancel", "stop_done": True}),
    Case("done with an error, and it would not go", [INIT, ECHO, result(True, "no")], Ending(None, 9),
         "Failed", "unknown", "no", {"stop": "linger", "stop_done": True}),
    # ---- no room
    Case("a good end, but no room for its log", GOOD, Ending(0, log_cut=True), "Failed", "unknown",
         "no space was left"),
    Case("done, and no room for its log", GOOD, Ending(None, 9, log_cut=True), "Failed", "unknown",
         "no space", {"stop": "linger", "stop_done": True}),
]


def words_of(decided: dict) -> str:
    return f"again: {decided['again']} ({decided['cause']})" if "again" in decided else decided["status"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_end_of_a_hand(case):
    decided = pitboss.decide_hand_end(actor_of(**case.actor), talk_of(*case.events), case.end, NOW)
    assert words_of(decided) == case.gives
    reason = decided.get("reason")
    assert (reason and reason["kind"]) == case.kind
    assert case.says in ((reason or {}).get("message") or "")
    assert (reason is None) == (case.kind is None)


def test_every_kind_of_failure_has_a_case():
    assert {case.kind for case in CASES} - {None} == set(pitboss.FAILURE_KINDS)
    assert {case.gives.rpartition("(")[2] for case in CASES if case.gives.startswith("again")} == {
        "lost)", "unbegun)", "limit)"}
    refused = {"ApprovalRejected", "ApprovalTimedOut"}         # by decide_refused_end, in test_policy
    assert {case.gives for case in CASES if not case.gives.startswith("again")} == set(pitboss.STATUSES) - refused


@pytest.mark.parametrize("code, status", [(0, "Success"), (1, "Failed"), (126, "Failed")])
def test_a_text_agent_succeeds_by_its_exit_status(code, status):
    actor, talk = actor_of(format="text", resumes=False), pitboss.Talk()
    pitboss.fold_line(talk, b"words", "text")
    assert pitboss.decide_hand_end(actor, talk, Ending(code))["status"] == status
    assert pitboss.decide_hand_end(actor, pitboss.Talk(), Ending(code))["status"] == status


def test_a_limit_tells_when_it_ends_and_nothing_else_does():
    assert pitboss.find_reason(talk_of(LIMIT, *failed("rate_limit", 429)),
                               Ending(1))["resets_at"] == 1795275595
    assert "resets_at" not in pitboss.find_reason(talk_of(*failed("rate_limit", 429)), Ending(1))
    assert "resets_at" not in pitboss.find_reason(talk_of(LIMIT, *failed("server_error", 500)), Ending(1))
    allowed = {"type": "rate_limit_event", "rate_limit_info": {"status": "allowed_warning", "resetsAt": 9e9}}
    assert "resets_at" not in pitboss.find_reason(talk_of(LIMIT, allowed, *failed("rate_limit", 429)), Ending(1))


def test_the_reason_is_never_read_from_the_work():
    """An agent may well write about rate limits, logins and prompts that are too long."""
    words = "rate_limit 429 authentication_failed overloaded Prompt is too long, connection refused"
    said = {"type": "assistant",
            "message": {"id": "m", "model": "m", "content": [{"type": "text", "text": words}]}}
    assert pitboss.find_reason(talk_of(INIT, ECHO, said, result(True, words)), Ending(1))["kind"] == "unknown"


@pytest.mark.parametrize("status, ending", [
    (0, (0, None)), (1, (1, None)), (125, (125, None)), (128, (128, None)), (130, (None, 2)),
    (137, (None, 9)),
    (143, (None, 15)), (144, (144, None)), (160, (160, None)), (255, (255, None))])
def test_a_shells_status_is_a_code_or_a_signal(status, ending):
    assert pitboss.split_status(status) == ending


def test_the_last_lines_of_stderr_are_short_and_clean():
    text = "\n".join(f"\x1b[31mline {n}\x1b[0m" + "x" * 1000 for n in range(20)) + "\n\n  \n"
    shown = pitboss.last_lines(text).splitlines()
    assert len(shown) == 5 and shown[-1].startswith("line 19") and all(len(line) <= 500 for line in shown)
    assert pitboss.last_lines("") == ""


# ------------------------------------------------------------------ every combination

TALKS = {"nothing": [], "init": [INIT], "echo": [INIT, ECHO], "said": [INIT, ECHO, SAID], "good": GOOD,
         "error": failed("rate_limit", 429),
         "unknown session": [result(True, None, errors=["No conversation found"])]}
ENDS = [Ending(code, number, vanished, folder, cut, stderr)
        for (code, number, vanished, folder) in ((0, None, False, False), (1, None, False, False),
                                                 (None, 9, False, False),
                                                 (None, None, True, False), (None, None, False, True))
        for cut in (False, True) for stderr in ("", "words", "No conversation found")]
ACTORS = [actor_of(account=account, stop=stop, stop_done=done, stop_reason=words, how=how, lost=lost, afresh=afresh,
                   format=form,
                   resumes=form == "claude")
          for (stop, done) in (("", False), ("timeout", False), ("cancel", False), ("cancel", True),
                               ("linger", True))
          for words in ("", "why") for how in ("prompt", "afresh", "resume", "again") for lost in (0, 2, 3)
          for afresh in (False, True) for form in ("claude", "text") for account in ("", "x")]


def test_rules_that_hold_whatever_happened():
    talks = {name: talk_of(*events) for name, events in TALKS.items()}
    wrong = {}
    for actor, (name, talk), end in itertools.product(ACTORS, talks.items(), ENDS):
        decided = pitboss.decide_hand_end(actor, talk, end)
        wrong.update({rule: (name, actor.stop, actor.stop_done, actor.how, end, decided)
                      for rule, holds in rules(actor, talk, end, decided) if not holds})
    assert wrong == {}


def rules(actor: pitboss.Actor, talk: pitboss.Talk, end: Ending, decided: dict):
    """(what must hold, whether it does) of one decision."""
    again, status, reason = decided.get("again"), decided.get("status"), decided.get("reason")
    yield "either another hand or an end", (again is None) != (status is None)
    if again:
        yield "a known way to go on", again in ("prompt", "afresh", "resume") or again == "again" and (
            actor.how == "again" or decided["cause"] == "limit")
        yield "a known cause", decided["cause"] in ("lost", "unbegun", "limit")
        yield "a limit has a reason and an account", decided["cause"] != "limit" or (
            actor.account and reason["kind"] == "rate_limit")
        yield "an agent that cannot resume is not resumed", actor.resumes or again in ("prompt", "afresh") \
            or actor.how == again
        yield "what was cancelled or timed out gets no other hand", actor.stop in ("", "linger")
        return
    yield "a status", status in pitboss.STATUSES
    yield "no reason for a success", (reason is None) or status != "Success"
    yield "a reason for a failure", reason is not None or status in ("Success", "Cancelled")
    yield "a known reason", reason is None or reason["kind"] in pitboss.FAILURE_KINDS and reason["message"]
    yield "a cut log is no success", not (end.log_cut and status == "Success")
    good = talk.result is not None and not talk.result["is_error"]
    yield "a success has a result", status != "Success" or good or actor.format == "text"
    yield "only who was stopped was stopped", status not in ("TimedOut", "Cancelled") or bool(actor.stop)


@pytest.mark.parametrize("events", TALKS.values(), ids=TALKS)
@pytest.mark.parametrize("how", ["prompt", "resume", "again"])
def test_an_actor_whose_hands_always_vanish_is_given_up(events, how):
    """At most three hands that vanished are dealt again, and one that never began; then it has Failed."""
    run = pitboss.RunState()
    run.actors["a"] = actor_of(how=how)
    for hand in range(1, 10):
        actor, talk = run.actors["a"], talk_of(*events)
        decided = pitboss.decide_hand_end(actor, talk, Ending(None, vanished=True))
        if "status" in decided:
            break
        pitboss.step(run,
                     {"seq": hand, "at": 2.0, "kind": "hand_ended", "actor": "a", "hand": hand, "code": None,
                           "usage": [0, 0, 0, 0], "lived_s": 0.0, **decided})
    assert "status" in decided and hand <= 2 + pitboss.MAX_LOST_HANDS
