"""The operator's verbs as commands: what each says of a run that cannot do it, --json, --no-wait.

tests/test_lead.py, tests/test_approvals.py and tests/test_hands_on.py have what they do to a run that can.
"""
from __future__ import annotations

import json
import signal

import pytest

from stage import DEADLINE_S
from tools import Home, wait_for

RUN = "0192f3aa-0000-7000-8000-000000000001"


def verbs(home: Home, run: str, actor: str, request: str) -> dict[str, list]:
    """One command line for each verb that changes something."""
    rules = home.manifest('[[approval_policy]]\naction = "block"\n', "rules.toml")
    return {"cancel": ["cancel", run, actor], "pause": ["pause", run, actor], "freeze": ["pause", run, actor, "--freeze"],
            "continue": ["continue", run, actor], "reprompt": ["reprompt", run, actor, "x"],
            "approve": ["approve", run, request], "reject": ["reject", run, request, "--no-wait"],
            "policy": ["policy", run, "--set", rules]}


def check_refused(home: Home, lines: dict[str, list], code: int, words: dict[str, str], rest: str) -> None:
    """Each command line ends with the code and says the words of its verb, else `rest`, in one line and a hint."""
    for verb, args in lines.items():
        said = home.pitboss(*args, check=code)
        assert words.get(verb, rest) in said.stderr and said.stdout == "", (verb, said.stderr)
        assert len(said.stderr.splitlines()) <= 2, said.stderr


def test_of_a_run_whose_dispatcher_died_they_say_what_to_do(stage, home):
    run = stage()
    run.lead().start("request_approval", {"summary": "may I"})
    request = run.operator().told("approval_request")["request_id"]
    name = run.run.name
    run.process.kill()
    run.process.wait()
    check_refused(home, verbs(home, name, "boss", request), 4, {},
                  f"the dispatcher of run {name} died\n  try: pitboss resume {name}, or cancel the whole run: "
                  f"pitboss cancel {name}\n")
    assert request in home.pitboss("approvals", name, check=0).stdout
    home.pitboss("cancel", name, check=0)                          # it takes the run over


def test_of_a_settled_run_they_say_so(stage, home):
    run = stage()
    run.lead().start("request_approval", {"summary": "may I"})
    request = run.operator().told("approval_request")["request_id"]
    run.finish(0)
    lines = verbs(home, run.run.name, "boss", request)
    check_refused(home, lines, 4, {"approve": f"{request} waits no more", "reject": f"{request} waits no more",
                                   "policy": f"the run {run.run.name} has settled already"},
                  "boss has settled already: Success")
    check_refused(home, {"cancel": ["cancel", run.run.name]}, 4, {}, "has settled already")


def test_of_a_run_in_which_nothing_began_they_say_what_to_do(home):
    folder = home.runs / RUN
    (folder / "self").mkdir(parents=True)
    for name in ("meta.json", "manifest.snapshot.toml"):
        (folder / name).write_text("{}")
    check_refused(home, verbs(home, RUN, "boss", "x"), 4, {}, f"the dispatcher of run {RUN} died\n")


def test_another_tools_run_is_only_read(home):
    (home.runs / RUN / "tasks").mkdir(parents=True)
    (home.runs / RUN / "meta.json").write_text("{}")
    check_refused(home, verbs(home, RUN, "boss", "x"), 4, {}, "was made by another tool: it is only read here")


def test_who_is_not_there_is_named_with_those_who_are(stage, home):
    run = stage()
    run.lead().start("request_approval", {"summary": "may I"})
    request = run.operator().told("approval_request")["request_id"]
    lines = verbs(home, run.run.name, "bos", "ffff")
    del lines["policy"]
    check_refused(home, lines, 3, {"approve": f"unknown request_id: ffff; waiting: {request}",
                                   "reject": "unknown request_id: ffff"}, "; there are: boss")
    assert "did you mean" in home.pitboss("pause", run.run.name, "bos", check=3).stderr
    assert "empty text" in home.pitboss("reprompt", run.run.name, "boss", " \n", check=2).stderr
    run.finish(0)


def test_json_and_no_wait(stage, home):
    """Without waiting only what is refused at once is said; what was asked for happens."""
    run = stage(script="$ say x\n$ run sleep 600")
    name = run.run.name
    run.running(run.lead(), "boss")
    said = lambda *args, code=0: json.loads(home.pitboss(*args, "--json", check=code).stdout)      # noqa: E731
    assert said("pause", name, "boss", "--freeze") == {"ok": True, "task_id": "boss"}
    assert said("continue", name, "boss") == {"ok": True, "task_id": "boss"}
    assert said("reprompt", name, "boss", "$ run sleep 600") == {"ok": True, "task_id": "boss", "delivery": "input"}
    told = said("pause", name, "boss", "--no-wait")
    assert told.pop("task_id", "boss") == "boss" and told == {"ok": True, "waited": False}
    wait_for(lambda: run.events("hand_ended", cause="pause"), DEADLINE_S, "the pause")
    assert "Paused" in home.pitboss("pause", name, "boss", "--no-wait", check=4).stderr
    text = home.pitboss("continue", name, "boss", "--prompt", "$ run sleep 600", check=0).stderr
    assert text == "pitboss: boss goes on\n"
    assert said("policy", name, "--set", home.manifest("approval_policy = []\n", "rules.toml"), "--no-wait") == {
        "ok": True, "policy_rules": [], "waited": False}
    assert said("cancel", name, "boss", "--no-wait", "--reason", "lunch") == {"ok": True, "waited": False}
    assert run.settle(1)["boss"]["failure_reason"]["message"].startswith("lunch")


@pytest.mark.slow
def test_a_cancel_that_waits_for_a_dispatcher_that_dies_says_so(stage, home):
    run = stage(script="$ ignore\n$ say x\n$ run sleep 600")
    run.running(run.lead(), "boss")
    waits = home.start("cancel", run.run.name, "boss")
    wait_for(lambda: run.events("stop_decided"), DEADLINE_S, "the cancel")
    run.process.send_signal(signal.SIGKILL)
    run.process.wait()
    assert waits.wait(DEADLINE_S) == 4
    err = waits.stderr.read()
    assert "died before boss was gone" in err or "ended before it answered" in err
    assert err.endswith(f"pitboss cancel {run.run.name}\n")
    home.pitboss("cancel", run.run.name, check=0)
    assert run.settle(None)["boss"]["status"] == "Cancelled"


@pytest.mark.slow
def test_a_verb_that_is_interrupted_leaves_the_run_as_it_is(stage, home):
    run = stage(script="$ ignore\n$ say x\n$ run sleep 600")
    run.running(run.lead(), "boss")
    waits = home.start("pause", run.run.name, "boss")
    wait_for(lambda: run.events("pause_decided"), DEADLINE_S, "the pause")
    waits.send_signal(signal.SIGINT)
    assert waits.wait(DEADLINE_S) == 130 and "Traceback" not in waits.stderr.read()
    wait_for(lambda: run.events("hand_ended", cause="pause"), DEADLINE_S, "the pause")
    home.pitboss("cancel", run.run.name, check=0)
    assert run.settle(1)["boss"]["pause_count"] == 1
