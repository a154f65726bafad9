"""The ticket loop's reducer and what it decides, in tables of events: no clock, no file, no process."""
from __future__ import annotations

from typing import NamedTuple

import pytest

import pitboss
from pitboss import Epic, PitState, Refused


class Row(NamedTuple):
    """A ticket, as far as decide_pick looks at it."""

    id: str
    status: str = "open"
    is_ready: bool = True
    assignee: str = ""
    waits_for: tuple = ()


OPEN, HALF, ALL = ([["a.1", "one", x], ["a.2", "two", y]] for x, y in (("open", "open"), ("closed", "open"),
                                                                      ("closed", "closed")))


class Book:
    """A session that is told events, one a second."""

    def __init__(self, **settings) -> None:
        self.state, self.news, self.events = PitState(), [], []
        self.tell("pit_opened", format=1, settings=settings)

    def tell(self, kind: str, **facts):
        event = {"seq": self.state.seq + 1, "at": 1000.0 + self.state.seq, "kind": kind, **facts}
        self.events.append(event)
        self.news += pitboss.step_pit(self.state, event)
        return self

    def add(self, name: str = "a", tickets=OPEN):
        return self.tell("epic_added", epic=name, epic_id=f"x-{name}", title="T", agent="demo", model=None,
                         headless=False, branch=f"pit/{name}", base="main", worktree=f"/w/{name}",
                         tickets=tickets)

    def at_work(self, name: str = "a"):
        """An epic whose agent is in the turn of its first ticket."""
        self.add(name).tell("epic_opened", epic=name, window="epic-a", pane="%1", pid=7)
        self.tell("session_began", epic=name, session="s1")
        self.tell("epic_picked", epic=name, ticket="a.1", title="one", tickets=OPEN)
        return self.tell("send_begun", epic=name).tell("prompted", epic=name)

    def look(self, name: str = "a"):
        epic = self.state.epics[name]
        return epic.state, epic.reason, epic.phase, epic.ticket


def test_an_epic_goes_from_its_first_ticket_to_its_last():
    book = Book().add()
    steps = [
        ("epic_opened", {"window": "epic-a", "pane": "%1", "pid": 7}, ("starting", "", "greet", None)),
        ("session_began", {"session": "s1"}, ("running", "", "pick", None)),
        ("epic_picked", {"ticket": "a.1", "title": "one", "tickets": OPEN}, ("running", "", "send", "a.1")),
        ("send_begun", {}, ("running", "", "send", "a.1")),
        ("prompted", {}, ("running", "", "work", "a.1")),
        ("turn_ended", {"last": "done"}, ("running", "", "ask", "a.1")),
        ("ticket_closed", {"ticket": "a.1", "tickets": HALF}, ("running", "", "clear", None)),
        ("session_began", {"session": "s2"}, ("running", "", "pick", None)),
        ("epic_picked", {"ticket": "a.2", "title": "two", "tickets": HALF}, ("running", "", "send", "a.2")),
        ("prompted", {}, ("running", "", "work", "a.2")),
        ("turn_ended", {}, ("running", "", "ask", "a.2")),
        ("ticket_closed", {"ticket": "a.2", "tickets": ALL}, ("done", "", "end", None)),
        ("epic_rested", {}, ("done", "", "rest", None)),
    ]
    assert book.look() == ("starting", "", "open", None)
    for kind, facts, expected in steps:
        assert book.tell(kind, epic="a", **facts).look() == expected, kind
    lines = [(n["event"], n.get("ticket"), n.get("state"), n.get("progress")) for n in book.news]
    assert lines == [("state", None, "starting", "0/2"), ("state", None, "running", "0/2"),
                     ("ticket_started", "a.1", None, None), ("ticket_closed", "a.1", None, None),
                     ("ticket_started", "a.2", None, None), ("ticket_closed", "a.2", None, None),
                     ("state", None, "done", "2/2")]
    shown = pitboss.show_epic(book.state, book.state.epics["a"], with_tickets=True)
    assert [t["state"] for t in shown["tickets"]] == ["closed", "closed"] and shown["progress"] == "2/2"
    assert shown["tickets"][0]["startedAt"] < shown["tickets"][0]["endedAt"]
    assert [t["sessionId"] for t in shown["tickets"]] == ["s1", "s2"]


def test_the_same_journal_makes_the_same_session():
    book = Book(maxConcurrent=1).at_work().add("b")
    again = pitboss.fold_pit(book.events)
    assert again.epics == book.state.epics and again.seq == book.state.seq
    assert pitboss.verb_of(again.epics["a"]) == "" and again.epics["b"].state == "queued"


@pytest.mark.parametrize("reason, detail, phase, after_prompt", [
    ("MANUAL", "", "interrupt", ("paused", "interrupt")),
    ("TIMEOUT", "", "interrupt", ("paused", "interrupt")),
    ("NEEDS_HUMAN_INPUT", "why?", "rest", ("running", "work")),
    ("PERMISSION", "Bash ls", "rest", ("running", "work")),
    ("API_ERROR", "401", "rest", ("running", "work")),
    ("DELIVERY", "", "rest", ("running", "work")),
    ("AGENT_START", "login", "rest", ("running", "work")),
    ("AGENT_EXITED", "1", "rest", ("running", "work")),
    ("WINDOW_GONE", "", "rest", ("paused", "rest")),
    ("WORKTREE", "", "rest", ("paused", "rest")),
    ("TRACKER", "no", "recheck", ("paused", "recheck")),
    ("BLOCKED", "a.2", "recheck", ("paused", "recheck")),
])
def test_a_pause_ends_when_its_cause_does(reason, detail, phase, after_prompt):
    book = Book().at_work().tell("epic_paused", epic="a", reason=reason, detail=detail)
    assert book.look() == ("paused", reason, phase, "a.1")
    assert book.news[-1]["reason"] == (f"{reason}: {detail}" if detail else reason)
    book.tell("prompted", epic="a")
    assert (book.look()[0], book.look()[2]) == after_prompt


def test_every_reason_to_pause_is_tried_above():
    tried = {args[0] for mark in test_a_pause_ends_when_its_cause_does.pytestmark for args in mark.args[1]}
    assert tried == set(pitboss.PAUSES)


def test_what_was_rechecked_goes_on_where_it_stood():
    book = Book().at_work().tell("turn_ended", epic="a", last="bye")
    book.tell("epic_paused", epic="a", reason="TRACKER", detail="locked", then="ask")
    book.tell("epic_rechecked", epic="a")
    assert book.look() == ("running", "", "ask", "a.1")
    assert book.state.epics["a"].todo == {"last": "bye", "usage": None}


def test_no_more_epics_are_at_work_than_may_be():
    book = Book(maxConcurrent=1).at_work("a").add("b").add("c")
    assert [e.state for e in book.state.epics.values()] == ["running", "queued", "queued"]
    book.tell("epic_paused", epic="a", reason="MANUAL")
    assert [e.state for e in book.state.epics.values()] == ["paused", "starting", "queued"], "a pause holds none"
    book.tell("epic_resumed", epic="a")
    assert book.look("a")[0] == "queued" and book.state.epics["a"].wants == ("go_on", {})
    book.tell("epic_stopped", epic="b")
    assert book.look("c")[0] == "starting", "who waits longest is next"
    book.tell("epic_finished", epic="c", tickets=ALL)
    assert book.look("a")[:3] == ("running", "", "go_on")


def test_paused_time_does_not_count_towards_the_timeout():
    book = Book(ticketTimeout=0.05).at_work()
    epic = book.state.epics["a"]
    began = epic.clock_at
    assert not pitboss.is_overdue(book.state.settings, epic, began + 2.9)
    assert pitboss.is_overdue(book.state.settings, epic, began + 3.1)
    book.tell("epic_paused", epic="a", reason="PERMISSION")
    assert not pitboss.is_overdue(book.state.settings, book.state.epics["a"], began + 9999)
    book.tell("prompted", epic="a")
    epic = book.state.epics["a"]
    assert epic.worked_s > 0 and epic.clock_at > began
    assert pitboss.is_overdue(book.state.settings, epic, epic.clock_at + 3.1 - epic.worked_s)
    assert not pitboss.is_overdue({}, epic, began + 9999)
    book.tell("epic_paused", epic="a", reason="TIMEOUT").tell("epic_resumed", epic="a")
    epic = book.state.epics["a"]
    assert epic.worked_s == 0 and not pitboss.is_overdue(book.state.settings, epic, epic.clock_at + 2.9), \
        "who resumes it gives its ticket the whole time again"


def test_what_waited_in_a_paused_agents_queue_is_interrupted_and_kept():
    book = Book().at_work().tell("epic_messaged", epic="a", message="look left").tell("epic_told", epic="a")
    book.tell("epic_paused", epic="a", reason="MANUAL").tell("epic_rested", epic="a")
    freed = {"event": "prompt", "session": "s1", "prompt": "Message from the orchestrator:\nlook left"}
    kind, facts = pitboss.decide_agent_event(book.state.epics["a"], freed)
    assert (kind, facts["message"]) == ("turn_held", "look left")
    book.tell(kind, **facts)
    assert book.look() == ("paused", "MANUAL", "interrupt", "a.1")
    late = {"event": "prompt", "session": "s1", "prompt": "Work on ticket a.1"}
    assert pitboss.decide_agent_event(book.state.epics["a"], late)[0] == "turn_held"
    book.tell("epic_rested", epic="a")
    assert pitboss.decide_agent_event(book.state.epics["a"], late)[0] == "prompted", "a person types in its window"
    assert book.tell("epic_resumed", epic="a").state.epics["a"].messages == ("look left",)


def test_a_message_waits_until_the_agent_is_in_a_turn():
    book = Book().at_work().tell("epic_messaged", epic="a", message="look left")
    assert pitboss.verb_of(book.state.epics["a"]) == "tell" and book.news[-1]["event"] == "message"
    stint = book.state.epics["a"].stint
    book.tell("epic_told", epic="a")
    assert pitboss.verb_of(book.state.epics["a"]) == "" and book.state.epics["a"].stint > stint
    book.tell("turn_ended", epic="a").tell("epic_messaged", epic="a", message="late")
    assert pitboss.verb_of(book.state.epics["a"]) == "ask"
    book.tell("prompted", epic="a")
    assert pitboss.verb_of(book.state.epics["a"]) == "tell"


@pytest.mark.parametrize("told, left", [("look left", ()), ("look\tleft ", ()), ("look right", ("look left",)), (None, ("look left",))])
def test_a_prompt_that_is_a_message_which_was_typed_is_its_delivery(told, left):
    book = Book().at_work().tell("epic_messaged", epic="a", message="look left")
    prompt = {"event": "prompt", "session": "s1", "prompt": "Do it." if told is None else f"Message from the orchestrator:\n{told}"}
    kind, facts = pitboss.decide_agent_event(book.state.epics["a"], prompt)
    assert kind == "prompted" and book.tell(kind, **facts).state.epics["a"].messages == ("look left",), "it was not typed yet"
    book.tell("send_begun", epic="a", size=7).tell(kind, **facts)
    assert book.state.epics["a"].messages == left


def test_a_message_that_a_turn_ended_before_is_still_its_agents():
    book = Book().at_work().tell("epic_messaged", epic="a", message="look left").tell("send_begun", epic="a", size=7)
    book.tell("turn_ended", epic="a")
    epic = book.state.epics["a"]
    assert pitboss.verb_of(epic) == "ask" and epic.todo["begun"], "it may wait in the agent's own line"
    told = {"event": "prompt", "session": "s1", "prompt": "Message from the orchestrator:\nlook left"}
    kind, facts = pitboss.decide_agent_event(epic, told)
    assert book.tell(kind, **facts).state.epics["a"].messages == ()


def test_a_resumed_message_is_sent_once():
    book = Book().at_work().tell("epic_paused", epic="a", reason="NEEDS_HUMAN_INPUT", detail="?")
    book.tell("epic_resumed", epic="a", message="yes")
    assert book.look()[2] == "go_on" and book.state.epics["a"].messages == ("yes",)
    book.tell("epic_went_on", epic="a", phase="send", todo={"message": "yes"})
    assert book.state.epics["a"].messages == () and book.state.epics["a"].todo == {"message": "yes"}


def test_a_stopped_epic_holds_nothing_and_goes_on_when_it_is_started_again():
    book = Book().at_work().tell("epic_stopped", epic="a")
    assert book.look() == ("done", "STOPPED", "end", "a.1")
    book.tell("epic_rested", epic="a", gave_back=True)
    assert book.look() == ("done", "STOPPED", "rest", None)
    book.add()
    assert book.look() == ("starting", "", "open", None)


def test_an_epic_that_has_nothing_open_is_done_at_once():
    book = Book().add(tickets=ALL)
    assert book.look() == ("done", "", "rest", None)


def test_tearing_down_forgets_the_epic():
    book = Book().at_work().tell("epic_stopped", epic="a").tell("epic_rested", epic="a")
    book.tell("tear_decided", epic="a", keep=False, force=True)
    assert book.look()[2] == "tear" and book.state.epics["a"].todo == {"keep": False, "force": True}
    book.tell("epic_torn", epic="a")
    assert book.state.epics == {} and book.news[-1]["state"] is None
    book.tell("pit_closed")
    assert book.state.settings == {}


def test_an_unknown_kind_changes_nothing_and_a_newer_format_is_refused():
    book = Book().at_work()
    before = dict(book.state.epics)
    book.tell("from_the_future", epic="a")
    assert book.state.epics == before
    with pytest.raises(pitboss.JournalError, match="format 99"):
        book.tell("pit_opened", format=99, settings={})


EPIC = Epic("a", "x-a", "T", "demo", None, False, "pit/a", "main", "/w", state="running", phase="work",
            session="s1", ticket="a.1")


@pytest.mark.parametrize("epic, told, expected", [
    (EPIC, {"event": "started", "session": "s2"}, ("session_began", {"epic": "a", "session": "s2"})),
    (EPIC, {"event": "cleared", "session": "s2"}, ("session_began", {"epic": "a", "session": "s2"})),
    (EPIC, {"event": "started", "session": "s1"}, None),
    (EPIC, {"event": "prompt", "session": "s1"}, ("prompted", {"epic": "a", "session": "s1"})),
    (EPIC, {"event": "prompt", "session": "s0"}, None),
    (EPIC, {"event": "turn_ended", "session": "s1", "last": "ok"}, ("turn_ended", {"epic": "a", "last": "ok"})),
    (EPIC, {"event": "turn_ended", "session": "s0", "last": "late"}, None),
    (EPIC, {"event": "turn_ended", "session": "s1", "background": [{"id": 1}]}, None),
    (EPIC, {"event": "notice", "session": "s1"}, ("turn_ended", {"epic": "a", "last": ""})),
    (EPIC._replace(phase="pick"), {"event": "notice", "session": "s1"}, None),
    (EPIC, {"event": "turn_failed", "session": "s1", "error": "401"},
     ("epic_paused", {"epic": "a", "reason": "API_ERROR", "detail": "401"})),
    (EPIC, {"event": "permission", "session": "s1", "tool": "Bash", "input": {"command": "ls\n"}},
     ("epic_paused", {"epic": "a", "reason": "PERMISSION", "detail": 'Bash {"command": "ls\\n"}'})),
    (EPIC._replace(state="paused", phase="rest"), {"event": "permission", "session": "s1"}, None),
    (EPIC, {"event": "ended", "session": "s1"}, None),
    (EPIC, {"event": "nonsense"}, None),
    (EPIC, {}, None),
])
def test_what_an_agent_tells(epic, told, expected):
    assert pitboss.decide_agent_event(epic, told) == expected


@pytest.mark.parametrize("tickets, lost, expected", [
    ([Row("a.1"), Row("a.2")], (), ("ticket", Row("a.1"))),
    ([Row("a.1"), Row("a.2")], ("a.1",), ("ticket", Row("a.2"))),
    ([Row("a.1"), Row("a.2", "in_progress", False, "pit/a")], (),
     ("ticket", Row("a.2", "in_progress", False, "pit/a"))),
    ([Row("a.1", "closed"), Row("a.2", "closed")], (), ("done", None)),
    ([Row("a.1", "in_progress", False, "bob"), Row("a.2", "open", False, "", ("a.1",)), Row("a.3", "deferred", False)],
     (), ("blocked", "a.1 is in_progress by bob; a.2 waits for a.1; a.3 is deferred")),
    ([], (), ("blocked", "there are no tickets below it")),
])
def test_which_ticket_is_next(tickets, lost, expected):
    assert pitboss.decide_pick(EPIC, tickets, lost) == expected


def test_what_may_be_paused_and_resumed():
    done = EPIC._replace(state="done", tickets=(("a.1", "one", "closed"),))
    assert pitboss.decide_epic_pause(EPIC) == {"epic": "a", "reason": "MANUAL"}
    assert pitboss.decide_epic_pause(EPIC._replace(state="paused", reason="MANUAL")) is None
    assert pitboss.decide_epic_pause(EPIC._replace(state="paused", reason="BLOCKED"))["reason"] == "MANUAL"
    with pytest.raises(Refused):
        pitboss.decide_epic_pause(done)
    with pytest.raises(Refused):
        pitboss.decide_epic_resume(done, None)
    assert pitboss.decide_epic_resume(EPIC, None) is None
    assert pitboss.decide_epic_resume(EPIC, "m") == ("epic_messaged", {"epic": "a", "message": "m"})
    assert pitboss.decide_epic_resume(EPIC._replace(state="paused"), "m") == ("epic_resumed",
                                                                              {"epic": "a", "message": "m"})


@pytest.mark.parametrize("state, found, force, lost", [
    ("done", {}, False, None),
    ("done", {"files": ["?? b"]}, False, {"files": ["?? b"]}),
    ("done", {"files": ["?? b"]}, True, None),
    ("running", {}, False, {"state": "running", "ticket": "a.1"}),
    ("paused", {"commits": ["abc x"], "doubt": "a merge"}, False, {"commits": ["abc x"], "why": "a merge"}),
])
def test_what_a_teardown_would_lose(state, found, force, lost):
    assert pitboss.decide_tear(EPIC._replace(state=state), found, force) == lost


@pytest.mark.parametrize("text, told", [
    ("do {{TICKET_ID}}", "do a.1"), ("{{TICKET_ID}}!", "Ticket:\na.1!"), ("/x", "Ticket:\n/x"),
    ("a {{TICKET_BODY}}", "a {{EPIC_ID}} /clear"), ("{ {{NOPE}} {x}", "{ {{NOPE}} {x}"),
    ("!{{EPIC_ID}}", "Ticket:\n!x"),
])
def test_templates_are_filled_in_once(text, told):
    values = {"TICKET_ID": "a.1", "TICKET_BODY": "{{EPIC_ID}} /clear", "EPIC_ID": "x"}
    assert pitboss.render_pit_template(text, values) == told


def test_the_default_texts_know_every_name_they_use():
    import re

    for text in (pitboss.DEFAULT_PROMPT, pitboss.DEFAULT_INSTRUCTIONS):
        used = set(re.findall(r"\{\{(\w+)\}\}", text))
        assert used and used <= set(pitboss.TEMPLATE_NAMES)


# ------------------------------------------------------------------ configuration

def test_comments_and_trailing_commas_are_fine():
    text = '''{ // a comment with "quotes"
      "agent": "opencode", /* over
      lines */ "worktreeDir": "a//b",
      "maxConcurrent": 2, "model": null, }'''
    values, problems = pitboss.read_pit_config(text)
    assert problems == []
    assert values == {"agent": "opencode", "worktreeDir": "a//b", "maxConcurrent": 2}


def test_all_problems_are_told_at_once_with_their_lines():
    text = '{\n "agnet": "auto",\n "clearDelay": 600001,\n "ticketTimeout": 0,\n "tmuxSession": "a.b",\n "agent": null\n}'
    _, problems = pitboss.read_pit_config(text)
    assert {p["key"]: p["line"] for p in problems} == {"agnet": 2, "clearDelay": 3, "ticketTimeout": 4,
                                                       "tmuxSession": 5, "agent": 6}
    allowed = {p["key"]: p["allowed"] for p in problems}
    assert "did you mean agent?" in allowed["agnet"] and "from 0 to 600000" in allowed["clearDelay"]


@pytest.mark.parametrize("text, line", [("[]", 1), ("{\n\n oops }", 3), ("", 1), ("[" * 100_000, 1)])
def test_what_is_no_object_is_one_problem(text, line):
    values, problems = pitboss.read_pit_config(text)
    assert values == {} and [p["line"] for p in problems] == [line]


@pytest.mark.parametrize("field", pitboss.PIT_FIELDS, ids=lambda f: f.name)
def test_every_setting_has_a_flag_and_refuses_another_type(field):
    assert pitboss.SETTING_FLAGS[field.name].startswith("--")
    _, problems = pitboss.read_pit_config('{"%s": []}' % field.name)
    assert [p["key"] for p in problems] == [field.name]


def test_every_event_has_a_handler_of_its_own():
    handlers = list(pitboss.PIT_EVENTS.values())
    assert len(set(handlers)) == len(handlers)
    assert all(h.__doc__ for h in handlers)


@pytest.mark.parametrize("until, states, holds", [
    ("paused", ["running", "paused"], True), ("paused", ["running"], False),
    ("done", ["done", "done"], True), ("done", ["done", "paused"], False),
    ("settled", ["done", "paused"], True), ("settled", ["starting"], False), ("change", ["running"], False),
])
def test_when_a_watch_ends(until, states, holds):
    assert pitboss.UNTIL[until](states, False) is holds
    assert pitboss.UNTIL["change"](states, True)
