"""Tickets: the embedded store and its verbs, bd and br through stand-ins of them, `pit ticket` as a program.

PITBOSS_TEST_BR names a real br for the tests with the mark `real`.
"""
from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import beads_standin
import pitboss
from pitboss import find_deadlock, natural_key
from tools import Home, git, make_repo, wait_for

EMBEDDED, FLAVOURS = "embedded", list(beads_standin.FLAVOURS)


@pytest.fixture
def project(tmp_path):
    """The project of a small repository."""
    return pitboss.find_project(str(make_repo(tmp_path / "My Repo")))


def pit(project, *argv, env=None):
    """The answer of one command line, in this process."""
    name, options, _ = pitboss.parse_pit([*map(str, argv)], "pit")
    answer = pitboss.run_pit(pitboss.PIT_COMMANDS[name], options, project.path,
                             {"USER": "ann", "HOME": os.path.dirname(project.path), **(env or {})})
    return answer


def add(project, title, *flags) -> str:
    return pit(project, "ticket", "add", title, *flags)["id"]


def refusal(project, *argv, env=None) -> dict:
    """The error of a command line that is refused."""
    with pytest.raises(pitboss.PitbossError) as caught:
        pit(project, *argv, env=env)
    return {"exit": pitboss.EXIT_CODES[caught.value.code][0], **pitboss.pit_error(caught.value)["error"]}


def ids(answer: list) -> list[str]:
    return [i["id"] for i in answer]


def issue(name: str, needs=(), parent=None, status="open") -> dict:
    """An issue of a table, with what its rules look at."""
    links = [pitboss.link_to(name, n, "blocks") for n in needs]
    links += [pitboss.link_to(name, parent, "parent-child")] if parent else []
    return {"id": name, "status": status, "issue_type": "task", "priority": 2, "dependencies": links, "comments": []}


def table(*rows: dict) -> dict[str, dict]:
    return {r["id"]: r for r in rows}


# ------------------------------------------------------------------ rules of the table

def test_ids_sort_as_people_count():
    wanted = ["a-1", "a-1.2", "a-1.10", "a-2", "b-1.1", "b-1.1.3", "b-1.2"]
    assert sorted(reversed(wanted), key=natural_key) == wanted


@pytest.mark.parametrize("given, found", [
    ("repo-uuh", "repo-uuh"), ("uuh", "repo-uuh"), ("uuh.1", "repo-uuh.1"), ("my-own-x1", "my-own-x1"), ("x1", "my-own-x1")])
def test_a_short_id_is_what_follows_the_prefix(given, found):
    issues = dict.fromkeys(["repo-uuh", "repo-uuh.1", "my-own-x1"])
    assert pitboss.find_issue(issues, given) == found


@pytest.mark.parametrize("given, candidates", [
    ("uhu", ["repo-uuh"]), ("dup", ["a-dup", "b-dup"]), ("uuh.", ["repo-uuh.1", "repo-uuh.2", "repo-uuh"]), ("", []),
    ("zzzzzz", [])])
def test_what_is_not_there_names_what_is_near(given, candidates):
    issues = dict.fromkeys(["repo-uuh", "repo-uuh.1", "repo-uuh.2", "a-dup", "b-dup"])
    with pytest.raises(pitboss.NoSuchTicket) as caught:
        pitboss.find_issue(issues, given)
    assert caught.value.candidates == candidates and caught.value.facts["id"] == given


@pytest.mark.parametrize("rows, cycle", [
    ([issue("a"), issue("b", ["a"]), issue("c", ["a", "b"])], set()),
    ([issue("a", ["a"])], {"a"}),
    ([issue("a", ["b"]), issue("b", ["c"]), issue("c", ["a"]), issue("d", ["a"])], {"a", "b", "c"}),
    ([issue("e"), issue("e.1", ["e"], "e")], {"e", "e.1"}),             # an epic closes after its tickets
    ([issue("e", ["e.1"]), issue("e.1", parent="e")], {"e", "e.1"}),     # a ticket begins after what is above it
    ([issue("e", ["f"]), issue("e.1", parent="e"), issue("f"), issue("f.1", ["e.1"], "f")], {"e", "e.1", "f", "f.1"}),
    ([issue("a", parent="b"), issue("b", parent="a")], {"a", "b"}),
    ([issue("a", ["b"]), issue("b", ["a"], status="closed")], set()),    # nobody waits for what is closed
    ([issue("a", ["gone"])], set())])
def test_a_deadlock_is_found_whatever_its_links(rows, cycle):
    assert set(find_deadlock(table(*rows))) == cycle


def test_a_long_chain_is_no_deadlock_and_no_recursion():
    rows = [issue(f"a-{n}", [f"a-{n + 1}"]) for n in range(3000)] + [issue("a-3000")]
    assert find_deadlock(table(*rows)) == []
    assert set(find_deadlock(table(*rows[:-1], issue("a-3000", ["a-0"])))) == {r["id"] for r in rows}


def test_an_issue_waits_for_what_those_above_it_wait_for():
    issues = table(issue("x"), issue("done", status="closed"), issue("e", ["x", "done", "gone"]),
                   issue("e.1", ["y"], "e"), issue("e.1.1", parent="e.1"), issue("y", status="in_progress"))
    assert pitboss.blockers_of(issues, "e.1.1") == ("x", "y") and pitboss.blockers_of(issues, "y") == ()


def test_foreign_data_with_a_loop_of_parents_ends():
    issues = table(issue("a", parent="b"), issue("b", parent="a"))
    assert pitboss.issue_lineage(issues, "a") == ["a", "b"] and ids(pitboss.issues_below(issues, "a")) == ["b"]


# ------------------------------------------------------------------ verbs

def test_an_epic_from_its_first_ticket_to_its_end(project):
    epic = pit(project, "ticket", "add", "Log in", "-t", "epic")
    assert set(epic) == {*pitboss.SHOWN_KEYS, "changed"} and epic["id"].startswith("myrepo-")
    short = epic["id"].partition("-")[2]
    one = add(project, "First", "--parent", short, "-d", "two\nlines", "--acceptance", "it works")
    two = add(project, "Second", "--parent", short, "--deps", one, "-p", "0")
    assert [one, two] == [f"{epic['id']}.1", f"{epic['id']}.2"]
    assert ids(pit(project, "ticket", "ready", "--parent", short)) == [one], "an epic is no work, the other waits"
    told = pit(project, "ticket", "show", f"{short}.1")
    assert (told["description"], told["acceptance_criteria"], told["parent"]) == ("two\nlines", "it works", epic["id"])
    assert pit(project, "ticket", "claim", one)["assignee"] == "ann"
    assert pit(project, "ticket", "claim", one)["changed"] is False, "one's own claim is fine"
    taken = refusal(project, "ticket", "claim", one, "--actor", "bob")
    assert (taken["exit"], taken["code"], taken["holder"]) == (4, "refused", "ann")
    early = refusal(project, "ticket", "close", epic["id"])
    assert (early["exit"], early["open"]) == (4, [two, one])
    done = pit(project, "ticket", "close", one, "--reason", "in abc1234")
    assert (done["status"], done["close_reason"]) == ("closed", "in abc1234") and done["closed_at"]
    again = pit(project, "ticket", "close", one, "--reason", "other")
    assert (again["changed"], again["close_reason"]) == (False, "in abc1234")
    assert ids(pit(project, "ticket", "ready")) == [two]
    assert ids(pit(project, "ticket", "list", "--parent", short)) == [two]
    assert ids(pit(project, "ticket", "list", "--parent", short, "--all")) == [two, one]
    pit(project, "ticket", "close", two)
    assert pit(project, "ticket", "close", epic["id"])["status"] == "closed"
    assert pit(project, "ticket", "list") == [] and ids(pit(project, "ticket", "list", "--status", "closed"))
    late = refusal(project, "ticket", "add", "Third", "--parent", epic["id"])
    assert late["exit"] == 4 and "reopen" in late["hint"]
    assert refusal(project, "ticket", "reopen", one)["exit"] == 4, "what is above it is closed"
    assert pit(project, "ticket", "reopen", epic["id"])["closed_at"] is None
    back = pit(project, "ticket", "reopen", one)
    assert (back["status"], back["assignee"], back["close_reason"], back["changed"]) == ("open", None, None, True)
    assert pit(project, "ticket", "reopen", one)["changed"] is False


def test_numbers_of_tickets_count_on_and_sort_naturally(project):
    epic = add(project, "e", "-t", "epic")
    made = [add(project, str(n), "--parent", epic) for n in range(1, 12)]
    assert made == [f"{epic}.{n}" for n in range(1, 12)]
    deep = add(project, "deep", "--parent", made[1])
    assert deep == f"{epic}.2.1"
    wanted = [made[0], made[1], deep, *made[2:]]
    assert ids(pit(project, "ticket", "ready", "--parent", epic)) == wanted
    pit(project, "ticket", "update", made[10], "-p", "0")
    assert ids(pit(project, "ticket", "list", "--parent", epic)) == [made[10], *wanted[:-1]]


def test_a_ticket_changes(project):
    one = add(project, "one", "-t", "bug")
    now = pit(project, "ticket", "update", one, "--title", "  uno   due ", "-d", "new", "-p", "4", "--assignee", "eve",
              "--status", "deferred")
    assert [now[k] for k in ("title", "description", "priority", "assignee", "status", "issue_type", "changed")] == [
        "uno due", "new", 4, "eve", "deferred", "bug", True]
    assert pit(project, "ticket", "update", one, "-p", "4")["changed"] is False
    assert pit(project, "ticket", "ready") == [] and ids(pit(project, "ticket", "list", "--type", "bug")) == [one]
    held = refusal(project, "ticket", "claim", one)
    assert (held["exit"], held["why"]) == (4, "deferred")
    assert pit(project, "ticket", "update", one, "--assignee", "")["assignee"] is None
    said = pit(project, "ticket", "comment", one, "look\nhere", env={"PIT_EPIC": "auth"})
    assert said["comments"][0] | {"created_at": ""} == {"id": 1, "author": "pit/auth", "text": "look\nhere",
                                                        "created_at": ""}
    assert pit(project, "ticket", "show", one)["comments"] == said["comments"]


def test_a_dependency_comes_and_goes(project):
    one, two = add(project, "one"), add(project, "two")
    assert pit(project, "ticket", "dep", "add", two, one)["dependencies"] == [
        {"issue_id": two, "depends_on_id": one, "type": "blocks"}]
    assert pit(project, "ticket", "dep", "add", two, one)["changed"] is False
    assert ids(pit(project, "ticket", "ready")) == [one]
    for a, b in ((one, two), (one, one)):
        cycle = refusal(project, "ticket", "dep", "add", a, b)
        assert (cycle["exit"], cycle["why"]) == (4, "cycle") and set(cycle["cycle"]) <= {one, two}
    assert pit(project, "ticket", "show", one)["dependencies"] == [], "a refusal changes nothing"
    assert pit(project, "ticket", "dep", "remove", two, one)["dependencies"] == []
    assert pit(project, "ticket", "dep", "remove", two, one)["changed"] is False


@pytest.mark.parametrize("argv, exit, word", [
    (["ticket", "show", "nope"], 3, "not_found"), (["ticket", "add", " "], 2, "usage"),
    (["ticket", "add", "x", "-t", "story"], 2, "usage"), (["ticket", "add", "x", "-p", "5"], 2, "usage"),
    (["ticket", "add", "x", "--parent", "nope"], 3, "not_found"), (["ticket", "add", "x", "--deps", "a,b"], 3, "not_found"),
    (["ticket", "update", "x", "--status", "bogus"], 2, "usage"), (["ticket", "add"], 2, "usage"),
    (["ticket", "add", "x", "y"], 2, "usage"), (["ticket", "fold"], 2, "usage"), (["ticket"], 2, "usage"),
    (["ticket", "list", "--al"], 0, ""), (["tickets"], 2, "usage"), (["ticket", "dep"], 2, "usage"), ([], 2, "usage"),
    (["ticket", "import", "no-such-file"], 2, "usage")])
def test_bad_input_is_one_error_with_a_hint(project, argv, exit, word, capsys):
    if not exit:
        assert pit(project, *argv) == []
        return
    error = refusal(project, *argv)
    assert (error["exit"], error["code"]) == (exit, word) and error["message"]
    assert not os.path.exists(pitboss.store_path(project.common)) or pitboss.read_issues(project.common) == {}


def test_an_update_without_anything_and_an_empty_comment_are_refused(project):
    one = add(project, "one")
    assert refusal(project, "ticket", "update", one)["exit"] == 2
    assert refusal(project, "ticket", "comment", one, "  ")["exit"] == 2
    assert pit(project, "ticket", "show", one)["comments"] == []


# ------------------------------------------------------------------ the store

def test_the_store_is_its_owners_and_no_commit_sees_it(project):
    before = os.umask(0)
    try:
        add(project, "one")
    finally:
        os.umask(before)
    path = pitboss.store_path(project.common)
    assert path == os.path.join(project.path, ".git", "pitboss", "tickets.db")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert git(project.path, "status", "--porcelain", "--ignored") == ""


def test_reading_makes_no_store(project):
    assert pit(project, "ticket", "list") == [] and not os.path.exists(pitboss.store_path(project.common))


def test_what_fails_half_way_changes_nothing(project):
    one, two = add(project, "one"), add(project, "two")
    with pytest.raises(ZeroDivisionError):
        with pitboss.change_issues(project.common) as issues:
            issues[one]["title"] = "other"
            1 / 0
    with pytest.raises(pitboss.TrackerFailed):
        with pitboss.change_issues(project.common) as issues:
            first, second = issues             # written in this order
            issues[first]["title"], issues[second]["title"] = "other", None
    assert {i["title"] for i in pit(project, "ticket", "list")} == {"one", "two"}
    assert pit(project, "ticket", "show", two)["title"] == "two"


def test_a_store_of_a_newer_version_is_left_alone(project):
    one = add(project, "one")
    path = pitboss.store_path(project.common)
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {len(pitboss.TICKET_STEPS) + 1}")
    before = Path(path).read_bytes()
    for argv in (("list",), ("close", one)):
        error = refusal(project, "ticket", *argv)
        assert (error["exit"], error["code"]) == (1, "failed") and "version" in error["message"]
    assert Path(path).read_bytes() == before


def test_a_broken_store_is_said_and_left_alone(project):
    path = Path(pitboss.store_path(project.common))
    path.parent.mkdir()
    path.write_bytes(b"these are no tickets\n" * 100)
    assert refusal(project, "ticket", "list")["code"] == "failed"
    assert refusal(project, "ticket", "add", "x")["code"] == "failed"
    assert path.read_bytes() == b"these are no tickets\n" * 100


def test_a_further_step_keeps_what_is_there(project, monkeypatch):
    one = add(project, "one")
    steps = (*pitboss.TICKET_STEPS, "ALTER TABLE issues ADD COLUMN shine TEXT")
    monkeypatch.setattr(pitboss, "TICKET_STEPS", steps)
    monkeypatch.setattr(pitboss, "TICKETS_SHAPE", pitboss.TICKETS_SHAPE._replace(steps=steps))
    two = add(project, "two")
    assert sorted(ids(pit(project, "ticket", "list"))) == sorted([one, two])


def test_one_of_many_processes_gets_a_ticket(home):
    repo = home.repo()
    project = pitboss.find_project(str(repo))
    one = add(project, "one")
    racers = [home.start("pit", "-C", repo, "ticket", "claim", one, "--actor", f"actor-{n}") for n in range(5)]
    answers = [(r.communicate(timeout=60)[0], r.returncode) for r in racers]
    won = [json.loads(out) for out, code in answers if code == 0]
    lost = [json.loads(out)["error"] for out, code in answers if code == 4]
    assert len(won) == 1 and len(lost) == 4, answers
    assert {e["holder"] for e in lost} == {won[0]["assignee"]} == {pit(project, "ticket", "show", one)["assignee"]}


def test_many_writers_at_once_lose_nothing(project):
    epic = add(project, "e", "-t", "epic")
    code = ("import sys, pitboss\nproject = pitboss.find_project(sys.argv[1])\n"
            "for n in range(5):\n"
            "    _, o, _ = pitboss.parse_pit(['ticket', 'add', 'x', '--parent', sys.argv[2]], 'pit')\n"
            "    pitboss.run_ticket_verb(project, pitboss.TICKET_VERBS['add'], o, {})\n")
    writers = [subprocess.Popen([sys.executable, "-c", code, project.path, epic],
                                env={**os.environ, "PYTHONPATH": str(Path(pitboss.__file__).parent)}) for _ in range(3)]
    assert [w.wait(60) for w in writers] == [0, 0, 0]
    assert ids(pit(project, "ticket", "list", "--parent", epic)) == [f"{epic}.{n}" for n in range(1, 16)]


# ------------------------------------------------------------------ beads JSONL

LINES = [
    {"id": "b-1", "title": "Epic", "issue_type": "epic", "priority": 1, "status": "open",
     "created_at": "2026-01-01T00:00:00Z", "updated_at": "2026-01-02T00:00:00.123456789+01:00", "labels": ["x"]},
    {"id": "b-1.1", "title": "Done", "status": "closed", "close_reason": "yes", "closed_at": "2026-01-03T00:00:00Z",
     "created_at": "2026-01-01T00:00:00Z", "updated_at": "2026-01-03T00:00:00Z", "assignee": "ann",
     "dependencies": [{"issue_id": "b-1.1", "depends_on_id": "b-1", "type": "parent-child", "created_by": "ann"}],
     "comments": [{"id": 7, "issue_id": "b-1.1", "author": "bob", "text": "ok", "created_at": "2026-01-02T00:00:00Z"}]},
    {"id": "b-1.2", "title": "Next", "_type": "issue", "created_at": "2026-01-01T00:00:00Z",
     "updated_at": "2026-01-01T00:00:00Z", "dependencies": [
         {"issue_id": "b-1.2", "depends_on_id": "b-1", "type": "parent-child"},
         {"issue_id": "b-1.2", "depends_on_id": "b-1.1", "type": "blocks"},
         {"issue_id": "b-1.2", "depends_on_id": "b-1.1", "type": "related"}]},
]


def lines_file(project, rows) -> str:
    path = os.path.join(project.path, "in.jsonl")
    Path(path).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_beads_lines_come_in_and_go_out_whole(project, tmp_path):
    given = lines_file(project, [*LINES, {"_type": "memory", "text": "no issue"}, {"id": "b-9", "title": "gone",
                                                                                 "status": "tombstone"}])
    assert pit(project, "ticket", "import", given) == {"imported": 3, "updated": 0, "unchanged": 0}
    assert pit(project, "ticket", "import", given) == {"imported": 0, "updated": 0, "unchanged": 3}
    done = pit(project, "ticket", "show", "1.1")
    assert (done["parent"], done["assignee"], done["close_reason"]) == ("b-1", "ann", "yes")
    assert [(c["author"], c["text"]) for c in done["comments"]] == [("bob", "ok")]
    assert ids(pit(project, "ticket", "ready")) == ["b-1.2"]
    out = os.path.join(project.path, "out.jsonl")
    assert pit(project, "ticket", "export", "out.jsonl") == {"exported": 3, "file": out}
    rows = [json.loads(line) for line in Path(out).read_text().splitlines()]
    for wanted, row in zip(LINES, rows):
        wanted = {k: v for k, v in wanted.items() if k not in ("comments", "_type")}
        assert {k: row.get(k) for k in wanted} == wanted, "also what only beads knows of"
    assert pit(project, "ticket", "export") == rows
    other = pitboss.find_project(str(make_repo(tmp_path / "other")))
    assert pit(other, "ticket", "import", out)["imported"] == 3 and pit(other, "ticket", "export") == rows
    Path(out).write_text(json.dumps(rows, indent=1))
    assert pit(other, "ticket", "import", out) == {"imported": 0, "updated": 0, "unchanged": 3}, "an array, too"


def test_what_changed_here_since_is_kept(project):
    given = lines_file(project, LINES)
    pit(project, "ticket", "import", given)
    pit(project, "ticket", "update", "b-1.2", "--title", "Ours")
    pit(project, "ticket", "comment", "b-1.1", "mine")
    newer = [LINES[0] | {"title": "Theirs", "updated_at": "2999-01-01T00:00:00Z"}, LINES[1],
             LINES[2] | {"comments": [{"text": "from them", "author": "eve", "created_at": "2026-01-05T00:00:00Z"}]}]
    answer = pit(project, "ticket", "import", lines_file(project, newer))
    assert answer == {"imported": 0, "updated": 2, "unchanged": 1, "kept": ["b-1.1", "b-1.2"]}
    assert pit(project, "ticket", "show", "b-1")["title"] == "Theirs"
    ours = pit(project, "ticket", "show", "b-1.2")
    assert ours["title"] == "Ours" and [c["text"] for c in ours["comments"]] == ["from them"]
    assert [c["text"] for c in pit(project, "ticket", "show", "b-1.1")["comments"]] == ["ok", "mine"]


@pytest.mark.parametrize("bad, allowed", [
    ("{", "JSON"), ("[]", "object"), ('{"title": "x"}', "id"), ('{"id": "a b", "title": "x"}', "id"),
    ('{"id": "../a", "title": "x"}', "id"), ('{"id": "-a", "title": "x"}', "id"), ('{"id": "a", "title": ""}', "title"),
    ('{"id": "a", "title": "x", "priority": 9}', "priority"), ('{"id": "a", "title": "x", "status": 1}', "status"),
    ('{"id": "a", "title": "x", "dependencies": [{}]}', "dependencies"),
    ('{"id": "a", "title": "x", "comments": ["hm"]}', "comments"), ("[" * 100_000, "JSON")])
def test_bad_lines_are_all_named_and_nothing_is_imported(project, bad, allowed):
    path = Path(project.path, "in.jsonl")
    path.write_text('{"id": "a-1", "title": "fine"}\n\n' + bad + "\n{\"nothing\": 1}\n")
    error = refusal(project, "ticket", "import", str(path))
    assert (error["exit"], error["code"], [p["line"] for p in error["problems"]]) == (2, "usage", [3, 4])
    assert allowed in error["problems"][0]["allowed"] and len(error["problems"][0]["found"]) < 300
    assert pit(project, "ticket", "list", "--all") == []


def test_lines_that_wait_for_each_other_are_refused(project):
    rows = [{"id": f"a-{n}", "title": "x", "dependencies": [{"depends_on_id": f"a-{1 - n}", "type": "blocks"}]}
            for n in (0, 1)]
    error = refusal(project, "ticket", "import", lines_file(project, rows))
    assert (error["exit"], sorted(error["cycle"])) == (4, ["a-0", "a-1"]) and pitboss.read_issues(project.common) == {}


# ------------------------------------------------------------------ bd, br and the embedded store in one shape

class Desk:
    """A project whose tickets are in one of the trackers, filled through that tracker's own commands."""

    def __init__(self, project, flavour, monkeypatch, tmp_path):
        self.project, self.flavour = project, flavour
        if flavour != EMBEDDED:
            beads_standin.init(project.path)
            beads_standin.install(tmp_path / "bin", flavour)
            monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
            for name in ("BD_ACTOR", "BEADS_ACTOR", "BEADS_DIR"):
                monkeypatch.delenv(name, raising=False)
        self.name = beads_standin.FLAVOURS.get(flavour, flavour)
        self.tracker = pitboss.pick_tracker(project, "auto")
        assert self.tracker.name == self.name

    def beads(self, *argv) -> dict | list:
        done = subprocess.run([self.name, *argv, "--json"], cwd=self.project.path, capture_output=True, text=True)
        return json.loads(done.stdout)

    def add(self, title, *flags) -> str:
        if self.flavour == EMBEDDED:
            return add(self.project, title, *flags)
        return self.beads("create", title, *flags)["id"]

    def close(self, name) -> None:
        if self.flavour == EMBEDDED:
            pit(self.project, "ticket", "close", name)
        else:
            self.beads("close", name)

    def need(self, name, other) -> None:
        if self.flavour == EMBEDDED:
            pit(self.project, "ticket", "dep", "add", name, other)
        else:
            self.beads("dep", "add", name, other)

    def do(self, method, *args):
        return asyncio.run(getattr(self.tracker, method)(*args))


@pytest.fixture(params=[EMBEDDED, *FLAVOURS])
def desk(request, project, monkeypatch, tmp_path):
    return Desk(project, request.param, monkeypatch, tmp_path)


@pytest.fixture(params=FLAVOURS)
def beads(request, project, monkeypatch, tmp_path):
    return Desk(project, request.param, monkeypatch, tmp_path)


def test_every_tracker_tells_an_epic_the_same(desk):
    epic = desk.add("Epic", "-t", "epic", "-d", "all of it")
    one = desk.add("One", "--parent", epic, "-d", "first\nthing")
    two = desk.add("Two", "--parent", epic, "--deps", one)
    nested = desk.add("Nested", "-t", "epic", "--parent", epic)
    inner = desk.add("Inner", "--parent", nested, "-p", "0")
    small = desk.add("Small", "--parent", two)
    ended = desk.add("Ended", "--parent", epic)
    desk.add("Elsewhere")
    desk.close(ended)
    found = desk.do("tickets", epic)
    assert [(t.id, t.parent, t.status, t.is_ready) for t in found] == [
        (inner, nested, "open", True), (one, epic, "open", True), (two, epic, "open", False),
        (small, two, "open", False), (ended, epic, "closed", False)], "in this order, without the nested epic"
    assert (found[1].title, found[1].description, found[0].priority) == ("One", "first\nthing", 0)
    assert found[4].closed_at and not found[4].is_ready
    top = desk.do("epic", epic.partition("-")[2])
    assert (top.id, top.title, top.issue_type, top.description) == (epic, "Epic", "epic", "all of it")
    assert desk.do("show", two).parent == epic
    desk.close(one)
    assert [t.id for t in desk.do("tickets", epic) if t.is_ready] == [inner, two, small]


def test_more_tickets_than_a_list_shows_by_itself(desk):
    epic = desk.add("Epic", "-t", "epic")
    if desk.flavour == EMBEDDED:
        made = [desk.add(f"t{n}", "--parent", epic) for n in range(60)]
    else:
        path = Path(desk.project.path, ".beads", "store.json")
        store = json.loads(path.read_text())
        made = [f"{epic}.{n}" for n in range(1, 61)]
        for name in made:
            store["issues"][name] = {**store["issues"][epic], "id": name, "issue_type": "task", "parent": epic}
        path.write_text(json.dumps(store))
    found = desk.do("tickets", epic)
    assert [t.id for t in found] == made and all(t.is_ready for t in found)


def test_what_waits_says_for_what(desk):
    other = desk.add("Other")
    epic = desk.add("Epic", "-t", "epic")
    one = desk.add("One", "--parent", epic)
    two = desk.add("Two", "--parent", epic, "--deps", one)
    desk.need(one, other)
    assert {t.id: t.waits_for for t in desk.do("tickets", epic)} == {one: (other,), two: (one,)}
    blocker = desk.add("First epic", "-t", "epic")
    desk.add("In it", "--parent", blocker)
    desk.need(epic, blocker)
    found = {t.id: t.waits_for for t in desk.do("tickets", epic)}
    assert set(found[one]) == {other, blocker} and set(found[two]) == {one, blocker}


def test_a_claim_is_won_once_and_given_back(desk):
    epic = desk.add("Epic", "-t", "epic")
    one = desk.add("One", "--parent", epic)
    assert desk.do("claim", one, "pit/a") is True
    assert desk.do("claim", one, "pit/a") is True, "its own"
    assert desk.do("claim", one, "pit/b") is False
    assert (desk.do("show", one).status, desk.do("show", one).assignee) == ("in_progress", "pit/a")
    assert not any(t.is_ready for t in desk.do("tickets", epic))
    desk.do("give_back", one, "pit/b")
    assert desk.do("show", one).assignee == "pit/a", "only who holds it gives it back"
    desk.do("give_back", one, "pit/a")
    assert (desk.do("show", one).status, desk.do("show", one).assignee) == ("open", None)
    assert desk.do("claim", one, "pit/b") is True
    desk.close(one)
    assert desk.do("claim", one, "pit/a") is False
    desk.do("give_back", one, "pit/b")
    assert desk.do("show", one).status == "closed", "what is closed stays closed"


def test_what_is_not_there_is_not_an_empty_epic(desk):
    epic = desk.add("Epic", "-t", "epic")
    for method in ("epic", "tickets", "show"):
        with pytest.raises(pitboss.NoSuchTicket) as caught:
            desk.do(method, epic + "x")
        assert caught.value.candidates == [epic]
    assert desk.do("tickets", epic) == ()


def test_what_templates_call_it(desk):
    words = {"embedded": "pit ticket"}.get(desk.name, desk.name)
    assert desk.tracker.words == words
    assert desk.tracker.show_command("a-1.2") == f"{words} show a-1.2"
    assert desk.tracker.close_command("a-1; rm") == f"{words} close 'a-1; rm'"


@pytest.mark.parametrize("what, said", [("text", "Welcome to beads"), ("silent", "something went wrong inside"),
                                        ("broken", "panic"), ("locked", "database is locked")])
def test_a_tracker_that_fails_says_what_it_said(beads, what, said, monkeypatch):
    monkeypatch.setattr(pitboss, "BEADS_AGAIN_S", (0.0,))
    epic = beads.add("Epic", "-t", "epic")
    one = beads.add("One", "--parent", epic)
    for method, *args in (("tickets", epic), ("epic", epic), ("claim", one, "pit/a"), ("give_back", one, "pit/a")):
        beads_standin.fault(beads.project.path, what, 99)
        with pytest.raises(pitboss.TrackerFailed) as caught:
            beads.do(method, *args)
        assert said in str(caught.value) and not isinstance(caught.value, pitboss.NotFound), method
    beads_standin.fault(beads.project.path, "none")
    assert beads.do("show", one).status == "open", "what failed was not done"


def test_a_locked_database_is_tried_again(beads, monkeypatch):
    monkeypatch.setattr(pitboss, "BEADS_AGAIN_S", (0.0, 0.0))
    epic = beads.add("Epic", "-t", "epic")
    beads_standin.fault(beads.project.path, "locked", 2)
    assert beads.do("epic", epic).id == epic


def test_a_tracker_that_does_not_end_is_ended(beads, monkeypatch, tmp_path):
    monkeypatch.setattr(pitboss, "BEADS_TIMEOUT_S", 0.2)
    mark = tmp_path / "pid"
    Path(tmp_path, "bin", beads.name).write_text(f"#!/bin/sh\necho $$ > {mark}\nexec sleep 600\n")
    with pytest.raises(pitboss.TrackerFailed, match="did not end"):
        beads.do("epic", "x")
    pid = int(mark.read_text()) if mark.exists() and mark.read_text() else None
    assert pid is None or not os.path.exists(f"/proc/{pid}")


def test_a_tracker_that_goes_away_is_said(beads, tmp_path):
    os.unlink(tmp_path / "bin" / beads.name)
    with pytest.raises(pitboss.TrackerFailed, match="cannot be started"):
        beads.do("epic", "x")


def test_the_store_of_the_main_checkout_is_used_whatever_the_caller_has(beads, monkeypatch, tmp_path):
    epic = beads.add("Epic", "-t", "epic")
    beads_standin.init(tmp_path)
    monkeypatch.setenv("BEADS_DIR", str(tmp_path / ".beads"))
    assert beads.do("epic", epic).id == epic


def test_an_envelope_is_unwrapped(project, monkeypatch, tmp_path):
    desk = Desk(project, "bd-1.0.5", monkeypatch, tmp_path)
    epic = desk.add("Epic", "-t", "epic")
    one = desk.add("One", "--parent", epic)
    monkeypatch.setenv("BD_JSON_ENVELOPE", "1")
    assert [t.id for t in desk.do("tickets", epic)] == [one] and desk.do("claim", one, "me") is True


@pytest.mark.parametrize("text, values", [
    ("", ()), (" \n", ()), ("[]", ([],)), ('{"a": 1}\n{"error": {}}\n', ({"a": 1}, {"error": {}})),
    ("null", (None,)), ('[] and more', ()), ("plain text", ()), ('[{"id": "t-', ()), ("[" * 100_000, ())])
def test_only_json_and_nothing_else_is_believed(text, values):
    assert pitboss.parse_documents(text) == values


def test_a_claim_under_another_name_is_no_claim(project, monkeypatch, tmp_path):
    desk = Desk(project, "bd-1.0.5", monkeypatch, tmp_path)
    one = desk.add("One")
    Path(tmp_path, "bin", "bd").write_text(
        f"#!/bin/sh\necho '[{{\"id\": \"{one}\", \"status\": \"in_progress\", \"assignee\": \"root\"}}]'\n")
    with pytest.raises(pitboss.TrackerFailed, match="for root, not pit/a"):
        desk.do("claim", one, "pit/a")


# ------------------------------------------------------------------ which tracker

def test_the_choice_of_a_tracker(project, monkeypatch, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    os.symlink("/bin/sh", bare / "sh")
    monkeypatch.setenv("PATH", str(bare))
    for name in ("bd", "br"):
        with pytest.raises(pitboss.MissingProgram) as caught:
            pitboss.pick_tracker(project, name)
        assert caught.value.facts == {"program": name} and pitboss.pit_word(caught.value) == "missing_program"
    assert pitboss.pick_tracker(project).name == "embedded" and pitboss.pick_tracker(project).notes == ()
    beads_standin.install(bare, "bd-1.0.5")
    beads_standin.install(bare, "br-0.7.6")
    assert pitboss.pick_tracker(project).name == "embedded", "no .beads"
    with pytest.raises(pitboss.InvalidInput, match=".beads"):
        pitboss.pick_tracker(project, "bd")
    beads_standin.init(project.path)
    assert pitboss.pick_tracker(project).name == "bd", "the first that opens it"
    assert pitboss.pick_tracker(project, "br").name == "br" and pitboss.pick_tracker(project, "embedded").name == "embedded"
    beads_standin.fault(project.path, "silent", 1)
    second = pitboss.pick_tracker(project)
    assert second.name == "br" and "something went wrong" in second.notes[0]
    beads_standin.fault(project.path, "silent", 2)
    assert pitboss.pick_tracker(project).name == "embedded"
    beads_standin.fault(project.path, "silent", 1)
    with pytest.raises(pitboss.TrackerFailed):
        pitboss.pick_tracker(project, "bd")


def test_verbs_are_refused_where_beads_has_the_tickets(beads):
    for argv, hint in ((["list"], "list"), (["close", "a b"], "close 'a b'"), (["add", "Two words"], "create 'Two words'"),
                       (["claim", "x"], "update x --claim"), (["comment", "x", "hm hm"], "comments add x 'hm hm'"),
                       (["dep", "add", "a", "b"], "dep add a b")):
        error = refusal(beads.project, "ticket", *argv)
        assert (error["exit"], error["code"], error["hint"]) == (4, "refused", f"{beads.name} {hint}")
    assert pit(beads.project, "ticket", "export") == [], "the embedded store can still be emptied and filled"


def test_the_configuration_says_where_tickets_are(beads):
    config = Path(beads.project.path, ".pit.json")
    config.write_text('{"beadsBinary": "embedded", // here\n "colour": 1, "clearDelay": "soon"}')
    one = add(beads.project, "One")
    assert ids(pit(beads.project, "ticket", "list")) == [one], "whatever else is wrong there"
    for text in ('{"beadsBinary": "trello"}', "{", ""):
        config.write_text(text)
        assert refusal(beads.project, "ticket", "list")["tracker"] == beads.name


def test_a_session_keeps_its_tickets_where_it_found_them(beads, tmp_path):
    """`start --beads-binary embedded` beside a .beads: the agents' own command follows it."""
    env = {"USER": "ann", "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "data")}
    folder = Path(pitboss.session_folder(beads.project.path, env))
    folder.mkdir(parents=True)
    events = [{"kind": "pit_opened", "format": 1, "settings": {}, "tracker": "embedded"},
              {"kind": "epic_added", "epic": "a", "epic_id": "x-a", "title": "T", "agent": "demo", "model": None,
               "headless": False, "branch": "pit/a", "base": "main", "worktree": "/w/a", "tickets": []}]
    lines = [json.dumps({"seq": n, "at": 1000.0 + n, **e}) + "\n" for n, e in enumerate(events, 1)]
    (folder / "journal.jsonl").write_text("".join(lines))
    assert pit(beads.project, "ticket", "list", env=env) == []
    (folder / "journal.jsonl").write_text(lines[0])
    assert refusal(beads.project, "ticket", "list", env=env)["tracker"] == beads.name, "a session without epics is none"
    (folder / "journal.jsonl").write_text("broken\n" + "".join(lines))
    assert refusal(beads.project, "ticket", "list", env=env)["tracker"] == beads.name


@pytest.mark.real
def test_the_real_br(project, monkeypatch, tmp_path):
    program = os.environ.get("PITBOSS_TEST_BR")
    if not program:
        pytest.skip("PITBOSS_TEST_BR names no br")
    (tmp_path / "real").mkdir()
    os.symlink(program, tmp_path / "real" / "br")
    monkeypatch.setenv("PATH", f"{tmp_path / 'real'}:{os.environ['PATH']}")
    subprocess.run(["br", "init", "--prefix", "t"], cwd=project.path, check=True, capture_output=True)

    def br(*argv):
        done = subprocess.run(["br", *argv, "--json"], cwd=project.path, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)
    epic = br("create", "Epic", "-t", "epic")["id"]
    one = br("create", "One", "--parent", epic)["id"]
    two = br("create", "Two", "--parent", epic, "--deps", one)["id"]
    tracker = pitboss.pick_tracker(project, "br")
    assert [(t.id, t.is_ready) for t in tracker.read_below(epic)] == [(one, True), (two, False)]
    assert tracker.take(one, "pit/a") and tracker.take(one, "pit/a") and not tracker.take(one, "pit/b")
    tracker.put_back(one, "pit/a")
    assert tracker.read_one(one).status == "open"
    with pytest.raises(pitboss.NoSuchTicket):
        tracker.read_one("t-nope")


# ------------------------------------------------------------------ as a program

@pytest.fixture
def card(home: Home):
    """A home with a repository `repo`, and the program under the name `pit` on its PATH."""
    home.repo()
    (home.root / "bin").mkdir()
    os.symlink(home.argv()[-1], home.root / "bin" / "pit")
    return home


def run_pit_program(card: Home, *argv, code: int = 0, cwd=None, env=None, **options) -> dict | list:
    """The one JSON value that a command line prints."""
    done = card.pitboss("pit", *argv, check=code, cwd=cwd or card.root / "repo", env=env, **options)
    assert done.stderr == "" and done.stdout.count("\n") == 1
    return json.loads(done.stdout)


def test_a_project_is_found_from_wherever_one_stands(card):
    repo = card.root / "repo"
    one = run_pit_program(card, "ticket", "add", "One")["id"]
    (repo / "sub").mkdir()
    git(repo, "worktree", "add", "-q", str(card.root / "tree"))
    for where, flags in ((repo / "sub", ()), (card.root / "tree", ()), (card.root, ("-C", "repo/sub")),
                         (card.root, ("-C", str(card.root / "tree")))):
        assert ids(run_pit_program(card, *flags, "ticket", "list", cwd=where)) == [one]
    assert ids(run_pit_program(card, "ticket", "list", "-C", "repo", cwd=card.root)) == [one], "flags after, too"
    error = run_pit_program(card, "ticket", "list", cwd=card.root, code=2)["error"]
    assert error["code"] == "not_a_repository" and "-C" in error["hint"]
    (card.root / "empty").mkdir()
    git(card.root / "empty", "init", "-q")
    assert run_pit_program(card, "-C", "empty", "ticket", "list", cwd=card.root, code=2)["error"]["code"] == "not_a_repository"
    assert run_pit_program(card, "-C", "none", "ticket", "list", cwd=card.root, code=2)["error"]["code"] == "not_a_repository"


def test_answers_for_people_and_for_programs(card):
    one = run_pit_program(card, "ticket", "add", "Ünïcode \x1b[31mred", "-d", "a\nb")["id"]
    for argv in (("--pretty", "ticket", "list"), ("ticket", "list", "--pretty")):
        shown = card.pitboss("pit", *argv, cwd=card.root / "repo", check=0)
        assert "Ünïcode red" in shown.stdout and one in shown.stdout and not shown.stderr
        assert "{" not in shown.stdout and "\x1b" not in shown.stdout
    wrong = card.pitboss("pit", "ticket", "show", "nope", "--pretty", cwd=card.root / "repo", check=3)
    assert wrong.stdout == "" and "nope" in wrong.stderr and "try:" in wrong.stderr
    usage = run_pit_program(card, "ticket", "shwo", code=2)["error"]
    assert usage["code"] == "usage" and "show" in usage["message"]
    named = subprocess.run([card.root / "bin" / "pit", "ticket", "list"], cwd=card.root / "repo", env=card.env,
                           capture_output=True, text=True) if os.access(card.root / "bin" / "pit", os.X_OK) else None
    if named is None:
        named = subprocess.run([sys.executable, card.root / "bin" / "pit", "ticket", "list"], cwd=card.root / "repo",
                               env=card.env, capture_output=True, text=True)
    assert ids(json.loads(named.stdout)) == [one], "the same under the name pit"


def test_an_agent_of_an_epic_has_tickets_only(card):
    inside = {"PIT_EPIC": "auth"}
    one = run_pit_program(card, "ticket", "add", "One", env=inside)["id"]
    assert run_pit_program(card, "ticket", "claim", one, env=inside)["assignee"] == "pit/auth"


def test_tickets_through_a_pipe(card):
    text = json.dumps({"id": "z-1", "title": "piped"}) + "\n"
    assert run_pit_program(card, "ticket", "import", "-", input=text)["imported"] == 1
    made = card.start("pit", "ticket", "export", cwd=card.root / "repo")
    wait_for(lambda: made.poll() is not None, 30, "the export")
    assert [i["id"] for i in json.loads(made.communicate()[0])] == ["z-1"]
