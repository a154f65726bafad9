"""Tokens and cost: each message counts once, a result is believed, a hand that resumes begins at nothing.

Random streams of events are folded twice: line by line as a dispatcher does, and by the few lines below that
look at the whole stream at once. Then come streams that no agent should print: none may stop a dispatcher.
"""
from __future__ import annotations

import json
import math
import random
from typing import NamedTuple

import pytest

import pitboss
from pitboss import Usage

MODEL = "claude-opus-4-9"
PER_TOKEN = dict(zip(Usage._fields, (5e-6, 25e-6, 0.5e-6, 6.25e-6)))     # list prices of that model, in USD


def fold(events: list, model: str = MODEL) -> pitboss.Talk:
    """What a hand of `events` (dicts, or lines as they are) has said."""
    talk = pitboss.Talk(model)
    for event in events:
        line = event if isinstance(event, bytes) else json.dumps(event, separators=(",", ":")).encode()
        pitboss.fold_line(talk, line, "claude")
    return talk


def message(ident: str, text: str = "", usage: tuple = (0, 1, 0, 0), parent: str | None = None,
            **more) -> dict:
    names = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
    return {"type": "assistant",
            "message": {"id": ident, "model": MODEL, "content": [{"type": "text", "text": text}],
                                             "usage": dict(zip(names, usage)), **more},
                                             "parent_tool_use_id": parent}


def result(cost=None, models: dict | None = None, **more) -> dict:
    names = ("inputTokens", "outputTokens", "cacheReadInputTokens", "cacheCreationInputTokens")
    return {"type": "result", "is_error": False, "total_cost_usd": cost,
            "modelUsage": {m: dict(zip(names, u)) for m, u in (models or {}).items()}, **more}


def test_one_message_in_several_events_counts_once():
    talk = fold([message("m1", "a" * 8, (10, 1, 20, 30)), message("m1", "b" * 9, (10, 1, 20, 30))])
    assert talk.usage() == Usage(10, 2 + 3, 20,
                                 30), "output is an estimate of what was said, 4 characters a token"
    assert talk.cost_usd() == pytest.approx(10 * 5e-6 + 5 * 25e-6 + 20 * 0.5e-6 + 30 * 6.25e-6)


def test_messages_add_up_and_those_of_sub_agents_too():
    talk = fold([message("m1", "main", (10, 1, 0, 0)), message("s1", "sub!", (5, 1, 0, 0), parent="toolu_1"),
                 message("m2", "last", (7, 1, 0, 0))])
    assert talk.usage() == Usage(22, 3, 0, 0)
    assert talk.text == "last", "a sub-agent's words are not the last ones of the conversation"
    assert fold([message("m1", "main"), message("s1", "sub", parent="t")]).text == "main"


def test_a_result_replaces_what_was_estimated():
    talk = fold([message("m1", "x" * 400, (10, 1, 0, 0)), result(0.5, {MODEL: (12, 34, 5, 6)})])
    assert talk.usage() == Usage(12, 34, 5, 6) and talk.cost_usd() == 0.5


def test_the_models_of_a_result_add_up():
    talk = fold([result(0.5, {"claude-haiku-4-5": (1, 2, 3, 4), MODEL: (10, 20, 30, 40)})])
    assert talk.usage() == Usage(11, 22, 33, 44)


def test_results_of_one_process_are_cumulative():
    talk = fold([result(0.5, {MODEL: (10, 20, 0, 0)}), message("m2", "x" * 8, (7, 1, 0, 0)),
                 result(0.8, {MODEL: (17, 25, 0, 0)})])
    assert talk.usage() == Usage(17, 25, 0, 0) and talk.cost_usd() == 0.8 and talk.results == 2


def test_between_two_results_the_running_turn_is_an_estimate_on_top():
    talk = fold([result(0.5, {MODEL: (10, 20, 0, 0)}), message("m2", "x" * 8, (7, 1, 0, 0))])
    assert talk.usage() == Usage(17, 22, 0, 0)
    assert talk.cost_usd() == pytest.approx(0.5 + 7 * 5e-6 + 2 * 25e-6)


def test_a_result_that_tells_no_models_keeps_the_estimate():
    talk = fold([message("m1", "x" * 8, (7, 1, 0, 0)), result(0)])
    assert talk.usage() == Usage(7, 2, 0, 0)


def test_a_failure_before_the_first_answer_costs_nothing():
    talk = fold([{**message("m1", "API Error", (0, 0, 0, 0), model="<synthetic>"), "error": "rate_limit"},
                 result(0)])
    assert (talk.usage(), talk.cost_usd(), talk.error) == (Usage(), 0, "") or talk.error == "rate_limit"
    assert talk.usage() == Usage() and talk.cost_usd() == 0


def test_more_messages_than_are_remembered_still_add_up():
    talk = fold([message(f"m{n}", "abcd", (3, 1, 2, 1)) for n in range(1000)])
    assert talk.usage() == Usage(3000, 1000, 2000, 1000)
    assert len(talk.running) <= 2 * pitboss.KEPT_MESSAGES + 1


def test_tool_calls_and_thoughts_count_as_output():
    content = [{"type": "tool_use", "name": "Bash", "input": {"command": "ls"}},
               {"type": "thinking", "thinking": "hm" * 4}]
    talk = fold([message("m1", content=content)])
    assert talk.usage().output == math.ceil((len('{"command": "ls"}') + 8) / 4)


# ------------------------------------------------------------------ the same in one look at the whole stream

class Expected(NamedTuple):
    usage: Usage
    cost_usd: float


def look_at(events: list[dict]) -> Expected:
    """Usage and cost of a hand, written down as the rule says, without any thought of speed."""
    told = [n for n, e in enumerate(events) if e["type"] == "result" and e["modelUsage"]]
    known = {k: 0 for k in Usage._fields}
    for model in events[told[-1]]["modelUsage"].values() if told else ():
        for name, word in zip(Usage._fields, ("inputTokens", "outputTokens", "cacheReadInputTokens",
                                              "cacheCreationInputTokens")):
            known[name] += model[word]
    after = [e["message"] for e in events[told[-1] + 1 if told else 0:]
             if e["type"] == "assistant" and e["message"]["model"] != "<synthetic>"]
    running = {k: 0 for k in Usage._fields}
    for ident in {m["id"] for m in after}:
        mine = [m for m in after if m["id"] == ident]
        running["input"] += mine[-1]["usage"]["input_tokens"]
        running["cache_read"] += mine[-1]["usage"]["cache_read_input_tokens"]
        running["cache_creation"] += mine[-1]["usage"]["cache_creation_input_tokens"]
        running["output"] += sum(math.ceil(sum(len(b["text"]) for b in m["content"]) / 4) for m in mine)
    costs = [e["total_cost_usd"] for e in events if e["type"] == "result" and e["total_cost_usd"] is not None]
    cost = (costs[-1] if costs else 0) + sum(running[k] * PER_TOKEN[k] for k in running)
    return Expected(Usage(*(known[k] + running[k] for k in Usage._fields)), cost)


def random_stream(chance: random.Random) -> list[dict]:
    """Turns of a conversation: messages in several events, sub-agents between them, failures, results."""
    events, number = [], 0
    for _ in range(chance.randrange(1, 6)):
        open_ids: list[tuple[str, tuple]] = []
        for _ in range(chance.randrange(40)):
            if not open_ids or chance.random() < 0.5:
                number += 1
                open_ids.append((f"msg_{number}",
                                 (chance.randrange(5000), 1, chance.randrange(9), chance.randrange(9))))
            ident, usage = chance.choice(open_ids[-3:])
            parent = chance.choice((None, None, "toolu_1"))
            events.append(message(ident, "x" * chance.randrange(50), usage, parent))
            if chance.random() < 0.05:
                events.append({**message("err", "no", model="<synthetic>"), "error": "overloaded"})
        if chance.random() < 0.8:
            models = {m: tuple(chance.randrange(10_000) for _ in range(4))
                      for m in chance.sample((MODEL, "claude-haiku-4-5", "x"), chance.randrange(3))}
            events.append(result(chance.choice((None, 0, chance.random())), models))
    return events


def test_random_streams_are_counted_as_the_rule_says():
    chance = random.Random(6)
    for _ in range(120):
        events = random_stream(chance)
        talk, expected = fold(events), look_at(events)
        assert talk.usage() == expected.usage
        assert talk.cost_usd() == pytest.approx(expected.cost_usd)
        assert talk.skipped == 0


def test_lines_that_are_no_events_change_nothing():
    chance = random.Random(7)
    rubbish = [b"", b"{", b"\xff\xfe", b'{"type":"assistant"}', b'{"type":"assistant","message":7}', b"[1]",
               b"null", b'"result"',
               b'{"type":"stream_event","event":{}}', b'{"type":"system"}',
               b'{"type":"assistant' + b"[" * 100_000]
    for _ in range(20):
        events = random_stream(chance)
        noisy = [line for e in events for line in (e, *chance.sample(rubbish, chance.randrange(3)))]
        assert (fold(noisy).usage(), fold(noisy).cost_usd()) == (fold(events).usage(),
                                                                 fold(events).cost_usd())


# ------------------------------------------------------------------ over the hands of an actor

def play(*events: dict) -> pitboss.RunState:
    """A run of one actor, `a`, whose hand is alive, after more events."""
    opening = [{"kind": "run_opened", "run_id": "r", "name": "n", "mode": "flat", "max_parallel": 1},
               {"kind": "actor_added", "actor": "a", "role": "task", "agent": "claude", "model": MODEL,
                "directory": "/",
                "use_worktree": False, "timeout_s": 60, "branch": None}, DEALT, STARTED]
    return pitboss.fold({"seq": n, "at": float(n), **e} for n, e in enumerate([*opening, *events], 1))


DEALT = {"kind": "hand_dealt", "actor": "a", "hand": 1, "how": "prompt", "message_id": "m", "log_at": 0,
         "session_id": "s"}
STARTED = {"kind": "hand_started", "actor": "a", "hand": 1, "handle": {"pid": 1}}


def ended(usage: tuple, cost: float | None, **more) -> dict:
    return {"kind": "hand_ended", "actor": "a", "hand": 1, "code": 0, "usage": list(usage), "cost_usd": cost,
            "lived_s": 1.0,
            "status": "Success", **more}


def told(usage: tuple, cost: float) -> dict:
    return {"kind": "usage", "actor": "a", "hand": 1, "usage": list(usage), "cost_usd": cost}


AGAIN = ended((10, 20, 3, 4), 0.25, again="resume", cause="lost")


@pytest.mark.parametrize("events, usage, cost", [
    ([], (0, 0, 0, 0), None),
    ([told((5, 6, 0, 0), 0.1)], (5, 6, 0, 0), 0.1),
    ([told((5, 6, 0, 0), 0.1), told((7, 8, 0, 0), 0.2)], (7, 8, 0, 0), 0.2),
    ([told((5, 6, 0, 0), 0.1), ended((10, 20, 3, 4), 0.25)], (10, 20, 3, 4), 0.25),
    ([AGAIN, DEALT, STARTED], (10, 20, 3, 4), 0.25),
    ([AGAIN, DEALT, STARTED, told((1, 1, 1, 1), 0.5)], (11, 21, 4, 5), 0.75),
    ([AGAIN, DEALT, STARTED, told((1, 1, 1, 1), 0.5), ended((2, 2, 2, 2), 0.75)], (12, 22, 5, 6), 1.0),
    ([ended((0, 0, 0, 0), None)], (0, 0, 0, 0), None),
    ([AGAIN, DEALT, STARTED, ended((0, 0, 0, 0), None)], (10, 20, 3, 4), 0.25),
], ids=range(9))
def test_hands_of_an_actor_add_up(events, usage, cost):
    """A usage event is cumulative in its hand; each hand begins at nothing; a cost not told is none."""
    run = play(*events)
    record = pitboss.record_of(run, run.actors["a"], "log")
    assert tuple(record["token_usage"].values()) == usage
    assert record["cost_usd"] == cost


# ------------------------------------------------------------------ what no agent should print

ODD = (None, "", "x", True, [], {}, -1, 1.5, 1_795_275_595_000, "NaN", float("nan"), float("inf"),
       float("-inf"), 10**400, 1e308, [1], {"a": 1}, "5")


def what_is_wrong(events: list) -> str:
    """Why what is kept of a hand cannot be written down and shown; empty when it can."""
    try:
        talk, end = fold(events), pitboss.Ending(1)
        usage, cost, reason = talk.usage(), talk.cost_usd(), pitboss.find_reason(talk, end)
        actor = pitboss.Actor("a", "task", "claude", MODEL, "/", False, 60, None)
        decided = pitboss.decide_hand_end(actor, talk, end)
        json.dumps([list(usage), cost, reason, decided, talk.session_id, talk.last_text()], allow_nan=False)
        pitboss.render_time(reason.get("resets_at"))
        run = play(ended(tuple(usage), cost, reason=reason, status="Failed", session_id=talk.session_id))
        json.dumps(pitboss.record_of(run, run.actors["a"], ""), allow_nan=False)
    except (ArithmeticError, ValueError, TypeError, KeyError, AttributeError) as error:
        return repr(error)
    sums = all(isinstance(n, int) and n >= 0 for n in usage) and math.isfinite(cost) and cost >= 0
    return "" if sums else f"{usage} {cost}"


def shapes() -> list[dict]:
    return [message("m1", "text", (1, 1, 1, 1)),
            result(0.5, {MODEL: (1, 2, 3, 4)}, result="x", errors=["e"], session_id="s"),
            {"type": "rate_limit_event", "rate_limit_info": {"status": "rejected", "resetsAt": 1795275595}},
            {"type": "system", "subtype": "init", "session_id": "s"},
            {"type": "system", "subtype": "task_updated",
                                                                       "task_id": "t",
                                                                       "patch": {"status": "completed"}}]


def places(value, path: tuple = ()) -> list[tuple]:
    """The path to every value inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [p for k, v in inner for p in places(v, (*path, k))]


def exchanged(event: dict, path: tuple, value) -> dict:
    event = json.loads(json.dumps(event))
    at = event
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return event


@pytest.mark.parametrize("shape", shapes(), ids=lambda e: e["type"])
def test_an_odd_value_anywhere_is_survived(shape):
    """Whatever one value of an event is, nothing breaks, now or when the hand's end is written down."""
    failure = [{**message("e", "no", model="<synthetic>"), "error": "rate_limit"}, result(0, is_error=True)]
    found: dict[str, str] = {}
    for path in places(shape)[1:]:
        for odd in ODD:
            event = exchanged(shape, path, odd)
            for events in ([event], [event, *failure], [*failure, event], [event, message("m2", "hi")]):
                wrong = what_is_wrong(events)
                if wrong:
                    found[f"{'.'.join(map(str, path))} = {str(odd):.20}"] = wrong
    assert found == {}
