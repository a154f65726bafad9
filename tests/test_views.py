"""The floor as frames of cells: pure, from made-up runs; each picture in tests/data/floor was read by a person.

A picture is never written by a test. `python3 tests/test_views.py NAME` prints one, to be read and then put there.
"""
from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import pitboss  # noqa: E402
from pitboss import Scene, Ui, cell_width, render_floor  # noqa: E402

PICTURES = Path(__file__).resolve().parent / "data" / "floor"
START = 1_800_000_000.0
RUN_ID = "0192f3a0-1111-7222-8333-444455556666"


class Maker:
    """Builds a run by events, one second apart."""

    def __init__(self, mode: str = "hierarchical", **facts) -> None:
        self.seq, self.at, self.run = 0, START, pitboss.RunState()
        self("run_opened", format=1, run_id=RUN_ID, name="refactor", mode=mode, **{"max_parallel": 100, **facts})

    def __call__(self, kind: str, **facts) -> "Maker":
        self.seq, self.at = self.seq + 1, self.at + 1
        pitboss.step(self.run, {"seq": self.seq, "at": self.at, "kind": kind, **facts})
        return self

    def actor(self, name: str, role: str = "worker", parent: str | None = "boss", model: str = "claude-sonnet-4-6",
              running: bool = True, **facts) -> "Maker":
        """An actor, whose first hand runs."""
        leads = {"budget_usd": 20.0, "max_workers": 8, **facts} if role in pitboss.LEADERS else {"estimate": 0.5}
        layer = "" if role == "task" else name if role in pitboss.LEADERS else parent
        self("actor_added", actor=name, role=role, agent="claude", model=model, directory="/src/app", branch=None,
             use_worktree=False, timeout_s=3600.0, parent=parent, layer=layer, prompt_preview=f"the task of {name}",
             **({"estimate": leads["budget_usd"]} if role == "sublead" else {}), **leads)
        if running:
            self("hand_dealt", actor=name, hand=1, session_id=f"5e551017-{name}", how="prompt", log_at=0, message_id="m")
            self("hand_started", actor=name, hand=1, handle={"executor": "local"})
        return self

    def used(self, name: str, tokens: int, usd: float) -> "Maker":
        return self("usage", actor=name, usage=[tokens, tokens // 10, tokens * 3, 0], cost_usd=usd)

    def ended(self, name: str, status: str, message: str = "", usd: float = 0.01) -> "Maker":
        self("hand_ended", actor=name, code=0, lived_s=3.0, usage=[900, 80, 0, 0], cost_usd=usd, status=status,
             final="done", reason={"kind": "unknown", "message": message} if message else None)
        return self("closed", actor=name, path=None)

    def asked(self, name: str, request: str = "5c1e", summary: str = "Delete the old cache", plan: str | None = None,
              form: str = "action") -> "Maker":
        return self("approval_asked", request_id=request, actor=name, form=form, plan=plan, summary=summary, call=request,
                    category="plan" if form == "plan" else "tool_use", fallback="auto_reject", ttl_s=600.0)


PLAN = {"summary": "Delete the old cache", "rationale": "It is large and nobody reads it.",
        "resources": ["one worker", "two minutes"], "risks": ["a cold start", "somebody may want it back"],
        "rollback": "restore it from the backup"}


def tree() -> Maker:
    """A lead with workers in every state, and a sub-lead with its own."""
    make = Maker().actor("boss", "lead", None)
    make.actor("worker-1", model="claude-haiku-4-5").actor("worker-2", model="claude-opus-4-8").actor("worker-3")
    make.actor("worker-4").actor("worker-5").actor("worker-6", running=False)
    make.actor("sub-1", "sublead", budget_usd=3.0, max_workers=4, read_down=True).actor("worker-7", parent="sub-1")
    make.actor("worker-8", parent="sub-1", model="claude-haiku-4-5")
    make.used("boss", 41_000, 1.2).used("worker-1", 900, 0.0123).used("worker-2", 1_234_567, 8.5).used("worker-7", 99, 0.2)
    make("store_used", counters={"boss": [12, 0], "worker-1": [3, 1]})
    make.ended("worker-3", "Success").ended("worker-4", "Failed", "the tests do not pass")
    make("pause_decided", actor="worker-5", mode="freeze")
    return make.asked("sub-1", plan="{}")


def shown(asked: pitboss.Approval, make: Maker) -> dict:
    """What show_approval makes of a request."""
    return {"request_id": asked.id, "task_id": asked.actor, "summary": asked.summary, "plan": PLAN, "category": asked.category,
            "kind": "plan" if asked.form == "plan" else "action", "tool_name": None, "cost_estimate": 0.5,
            "actor_path": pitboss.path_of(make.run, asked.actor), "created_at": pitboss.render_time(asked.asked_at),
            "expires_at": pitboss.render_time(asked.expires_at)}


LOG = ((">", "I read the parser first."), ("*", 'Bash {"command": "python3 -m pytest -q tests/test_parser.py"}'),
       ("<", "12 passed in 0.31s"), (">", "Now the names: 漢字 are wide, e\u0301 is one cell."),
       ("!", "retry 1/10: overloaded 529"), ("v", "done ($0.42)"))
CHANGES = {"files": [{"path": "src/parser.py", "added": 12, "removed": 3}, {"path": "logo.png", "added": None, "removed": None}],
           "new": ["notes.txt"], "note": ""}
DIFF = {"text": "diff --git a/a.py b/a.py\nindex 1..2 100644\n--- a/a.py\n+++ b/a.py\n@@ -1,2 +1,2 @@\n import os\n-\told\n"
                "+\tnew \x1b[31mred\x1b[0m\x07\n+" + "long " * 30 + "\n", "cut": True, "note": ""}
RUNS = tuple({"run_id": f"0192f3a{n}-1111-7222-8333-444455556666", "name": name, "mode": "flat", "state": state,
              "started_unix": START - 86400 * n} for n, (name, state) in
             enumerate((("refactor", "running"), ("nightly", "complete"), ("docs", "stale"))))
RULES = ({"match": {"actor": "boss*", "category": "tool_use"}, "action": "auto_approve"},
         {"match": {"cost_over": 2.5}, "action": "block"})


def scene(make: Maker, state: str = "running", after: float = 75.0, **more) -> Scene:
    now = make.at + after
    alone = 2 if state == "stale" else None
    return Scene(make.run, state, now, now, tuple(pitboss.attention(make.run, now, {}, alone)),
                 **{"keys": pitboss.KEYS, "log": LOG, "runs": RUNS, "changes": CHANGES,
                    "asks": tuple(shown(a, make) for a in make.run.approvals.values()), **more})


def crowd() -> Maker:
    """A flat run of many tasks, all kinds of ends among them."""
    make = Maker("flat")
    for n in range(300):
        make.actor(f"task-{n:03}", "task", None, running=n < 260)
        if n < 240:
            make.ended(f"task-{n:03}", [*pitboss.STATUSES][n % 40] if n % 40 < len(pitboss.STATUSES) else "Success")
    return make


def held(hold: str) -> Maker:
    """A flat run whose account is held: some work, some wait."""
    make = Maker("flat", max_parallel=2)
    for n in range(6):
        make.actor(f"task-{n}", "task", None, running=n < 2)
    return make("hold_began", account="claude:work", hold=hold, until=make.at + 400 if hold == "limit" else None)


def ended() -> Maker:
    """A tree that has come to its end."""
    make = Maker().actor("boss", "lead", None).actor("worker-1").actor("worker-2", model="claude-opus-4-8")
    make.ended("worker-1", "Success", usd=0.12).ended("worker-2", "TimedOut", "its time was up", usd=1.5).ended("boss", "Success")
    return make("run_finished", ended_at=make.at, tasks_total=3, tasks_failed=1)


def hostile() -> Maker:
    """Names and words that would wreck a terminal."""
    make = Maker("flat")
    make.actor("plain", "task", None).actor("wide", "task", None, model="模型-\x1b[31m超大-pro")
    return make.ended("plain", "Failed", "a\x1b[2J\x1b]0;owned\x07b\u202ec")


TEXT = pitboss.Box("tell worker-1", "use the old\n漢字 parser", 14)
WHY = pitboss.Box("why not?", "it is late", 10)
RULE_TEXT = pitboss.Box("tool_name (empty: any)", "Bash", 4, one_line=True, fresh=True)
# view: (the scene, where the operator looks); each has a picture of every size
VIEWS = {
    "tree": lambda: (scene(tree()), Ui(focus="worker-4")),
    "crowd": lambda: (scene(crowd()), Ui(focus="task-100")),
    "detail": lambda: (scene(tree()), Ui(("floor", "detail"), "worker-4")),
    "log": lambda: (scene(tree(), log=LOG * 20, log_cut=5_000_000), Ui(("floor", "log"), "worker-1", back=3, search="passed", hit=9)),
    "diff": lambda: (scene(tree(), diff=DIFF), Ui(("floor", "diff"), "worker-1")),
    "approvals": lambda: (scene(tree().asked("boss", "77", "Rewrite it", form="plan")), Ui(("floor", "approvals"), pick=1)),
    "ask": lambda: (scene(tree()), Ui(("floor", "approvals", "ask"), request="5c1e")),
    "plan": lambda: (scene(tree().asked("boss", "77", "Rewrite it", form="plan")), Ui(("floor", "approvals", "ask"), request="77")),
    "policy": lambda: (scene(tree()), Ui(("floor", "policy"), rules=RULES, pick=1, column=4)),
    "unsaved": lambda: (scene(tree()), Ui(("floor", "policy", "unsaved"), rules=RULES, question=("back", ""))),
    "runs": lambda: (scene(tree()), Ui(("floor", "runs"), pick=1)),
    "confirm": lambda: (scene(tree()), Ui(("floor", "confirm"), "worker-1", question=("cancel", "worker-1"))),
    "box": lambda: (scene(tree()), Ui(("floor", "box"), "worker-1", box=TEXT)),
    "help": lambda: (scene(tree()), Ui(("floor", "help"))),
}
PAPER = {
    # of a picture: columns, rows, UTF-8
    "80x24": (80, 24, True), "40x12": (40, 12, True), "200x60": (200, 60, True), "ascii": (80, 24, False),
}
# what only one picture shows: (the scene, where the operator looks, columns, rows, UTF-8)
MORE = {
    "tree_compact": lambda: (scene(tree(), words={"worker-2": "reads the lexer"}), Ui(compact=True, focus="worker-2"), 100, 24, True),
    "tree_folded": lambda: (scene(tree()), Ui(focus="sub-1", header=True, folded=frozenset(["sub-1"])), 80, 24, True),
    "tree_filtered": lambda: (scene(tree()), Ui(filter="haiku"), 80, 24, True),
    "tree_filtered_40x12": lambda: (scene(tree()), Ui(filter="haiku", focus="worker-8"), 40, 12, True),
    "tree_stale": lambda: (scene(tree(), "stale"), Ui(hides_settled=True), 80, 24, True),
    "tree_stale_40x12": lambda: (scene(tree(), "stale"), Ui(), 40, 12, True),
    "tree_said": lambda: (scene(tree(), "stale"), Ui(message=DIED, tone="red"), 40, 12, True),
    "hostile": lambda: (scene(hostile()), Ui(focus="wide"), 80, 24, True),
    "nobody_80x24": lambda: (scene(tree()), Ui(filter="nobody is called so", focus="worker-1"), 80, 24, True),
    "few_40x12": lambda: (scene(Maker("flat").actor("only", "task", None)), Ui(focus="only"), 40, 12, True),
    "held_80x24": lambda: (scene(held("limit")), Ui(), 80, 24, True),
    "held_40x12": lambda: (scene(held("auth")), Ui(), 40, 12, True),
    "ended_40x12": lambda: (scene(ended(), "complete"), Ui(hides_settled=True), 40, 12, True),
    "foreign_80x24": lambda: (scene(ended(), "complete", origin="another tool", log=()), Ui(focus="worker-2"), 80, 24, True),
    "detail_works": lambda: (scene(tree()), Ui(("floor", "detail"), "worker-1"), 80, 24, True),
    "detail_small_40x12": lambda: (scene(tree()), Ui(("floor", "detail"), "sub-1", head=5), 40, 12, True),
    "detail_asks_40x12": lambda: (scene(tree()), Ui(("floor", "detail"), "sub-1"), 40, 12, True),
    "ask_read_on": lambda: (scene(tree()), Ui(("floor", "approvals", "ask"), request="5c1e", back=4), 40, 12, True),
    "approvals_cut_40x12": lambda: (scene(tree().asked("worker-8", "78", "Rewrite the parser by hand " * 9)), Ui(("floor", "approvals"), pick=1), 40, 12, True),
    "rule_box_40x12": lambda: (scene(tree()), Ui(("floor", "policy", "box"), rules=RULES, pick=1, column=3, box=RULE_TEXT), 40, 12, True),
    **{f"why_not_{paper}": lambda size=PAPER[paper]: (scene(tree()), Ui(("floor", "approvals", "ask", "box"), request="5c1e", box=WHY), *size)
       for paper in ("80x24", "40x12", "200x60")},
    "confirm_sublead": lambda: (scene(tree()), Ui(("floor", "confirm"), "sub-1", question=("cancel", "sub-1")), 40, 12, True),
    "confirm_run": lambda: (scene(tree()), Ui(("floor", "confirm"), "sub-1", question=("cancel", "")), 40, 12, True),
    "answered_40x12": lambda: (scene(tree()), Ui(("floor", "approvals", "ask"), request="gone"), 40, 12, True),
    "no_rules_40x12": lambda: (scene(tree()), Ui(("floor", "policy")), 40, 12, True),
}
DIED = "its dispatcher died: pitboss resume 0192f3a0-1111 goes on, pitboss cancel 0192f3a0-1111 ends it"
FRAMES = {**{f"{view}_{paper}": lambda of=of, size=size: (*of(), *size) for view, of in VIEWS.items()
             for paper, size in PAPER.items()}, **MORE}
SIZES = [(80, 24), (40, 12), (200, 60), (20, 5), (1, 1), (9, 3), (80, 8), (300, 10)]


def picture(name: str) -> str:
    return "\n".join(pitboss.frame_lines(render_floor(*FRAMES[name]()), False)) + "\n"


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_is_as_its_picture(name):
    assert picture(name) == (PICTURES / f"{name}.txt").read_text(encoding="utf-8")


def test_every_picture_is_looked_at_and_every_view_has_one():
    assert {p.stem for p in PICTURES.glob("*.txt")} == set(FRAMES)
    for size in PAPER.values():
        shown = {where.views[-1] for _, where, *paper in (make() for make in FRAMES.values()) if (*paper,) == size}
        assert shown == set(pitboss.VIEW_KINDS), size


@pytest.mark.parametrize("columns, rows", SIZES)
@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_has_exactly_the_size_of_the_terminal(name, columns, rows):
    what, ui, _, _, utf8 = FRAMES[name]()
    frame = render_floor(what, ui, columns, rows, utf8)
    assert len(frame.rows) == rows
    for row in frame.rows:
        assert sum(cell_width(text) for text, _ in row) == columns, row
    for text, style in (span for row in frame.rows for span in row):
        assert text.isprintable() and set(style.split()) <= pitboss.COLOURS.keys()
        assert utf8 or text.isascii()


def test_nothing_of_what_agents_say_reaches_the_terminal_raw():
    text = "\n".join(pitboss.frame_lines(render_floor(*FRAMES["hostile"]()), True))
    assert "owned" not in text and "\u202e" not in text
    assert "\x1b" not in re.sub(r"\x1b\[[0-9;]+m", "", text) and "\x07" not in text


def test_colours_of_leads_models_and_states():
    frame = render_floor(*FRAMES["tree_200x60"]())
    styles = {text.strip(): style for row in frame.rows for text, style in row}
    assert "cyan" in styles["★ boss"] and styles["haiku-4-5"] == "green" and styles["opus-4-8"] == "magenta"
    assert styles["sonnet-4-6"] == "blue" and styles["Frozen"] == "blue" and styles["Failed ✗"] == "red"
    assert any("reverse" in style for row in frame.rows for text, style in row if text == " ▸ worker-4 ")


def test_risks_have_the_colour_of_warnings():
    rows = render_floor(*FRAMES["ask_80x24"]()).rows
    styles = {text.strip(): style for row in rows for text, style in row}
    assert "yellow" in styles["- a cold start"] and "yellow" in styles["RISKS"] and styles["- two minutes"] == ""


# ------------------------------------------------------------------ nothing is told by colour alone

ASKED = lambda: scene(tree().asked("boss", "77", "Rewrite it", form="plan"))  # noqa: E731
CHOSEN = {
    # what: (words of a row, where the operator looks when it is chosen, and when something else is)
    "tile": ("▸ worker-1", Ui(focus="worker-1"), Ui(focus="worker-5")),
    "line": ("▸ worker-1", Ui(focus="worker-1", compact=True), Ui(focus="worker-5", compact=True)),
    "group": ("sub-1  Running", Ui(focus="sub-1", header=True), Ui(focus="worker-5")),
    "request": ("boss→sub-1", Ui(("floor", "approvals")), Ui(("floor", "approvals"), pick=1)),
    "rule": ("auto_approve", Ui(("floor", "policy"), rules=RULES), Ui(("floor", "policy"), rules=RULES, pick=1)),
    "cell": (" - block:", Ui(("floor", "policy"), rules=RULES), Ui(("floor", "policy"), rules=RULES, column=2)),
    "run": ("nightly", Ui(("floor", "runs"), pick=1), Ui(("floor", "runs"))),
    "place in a log": ("12 passed", Ui(("floor", "log"), "boss", search="passed", hit=3), Ui(("floor", "log"), "boss", search="passed")),
}


@pytest.mark.parametrize("utf8", [True, False])
@pytest.mark.parametrize("what", CHOSEN)
def test_what_is_chosen_is_seen_without_colour(what, utf8):
    words, *looks = CHOSEN[what]
    words = words if utf8 else pitboss.to_ascii(words)
    found = []
    for ui in looks:
        lines = pitboss.frame_lines(render_floor(ASKED(), ui, 80, 24, utf8), False)[2:]
        at = next(n for n, line in enumerate(lines) if words in line)
        found.append(lines[at - (what == "cell")])     # of a cell the row above its words tells
    assert found[0] != found[1]


def test_ends_are_told_apart_without_colour_and_utf8():
    glyphs = [pitboss.to_ascii(row.glyph) for row in pitboss.STATUSES.values()]
    assert len({*glyphs}) == len(glyphs) and "?" not in glyphs


@pytest.mark.parametrize("name", FRAMES)
def test_without_colour_a_frame_is_text_alone(name):
    assert "\x1b" not in picture(name)


# ------------------------------------------------------------------ what finds no room

@pytest.mark.parametrize("texts, width, row", [
    (("one", "two"), 6, "onetwo"), (("one", "two"), 5, "onet…"), (("one", "two"), 3, "on…"), (("one", " "), 3, "one"),
    (("one", "  "), 4, "one "), (("漢字", "x"), 4, "漢… "), (("", "one", "", "two"), 3, "on…"), (("one",), 0, "")])
def test_what_is_cut_has_a_mark(texts, width, row):
    shown = "".join(text for text, _ in pitboss.fit_spans([(text, "") for text in texts], width))
    assert (shown, cell_width(shown)) == (row, width)


@pytest.mark.parametrize("width, always, row", [
    (12, 0, " aa  bbb  cc"), (11, 0, " aa  bbb …"), (9, 0, " aa  cc …"), (4, 0, "  …"), (7, 2, " aa  b…"), (40, 0, " aa  bbb  cc")])
def test_parts_without_room_are_left_out_and_marked(width, always, row):
    spans = pitboss.join_parts([[("aa", "")], [("bbb", "")], [("cc", "")]], width, always)
    assert "".join(text for text, _ in spans).rstrip() == row


def test_what_an_operator_must_know_stands_first_in_a_narrow_terminal():
    for name, row, words in (("held_40x12", 1, "claude: api auth fa"), ("tree_stale_40x12", 1, "its dispatcher died"),
                             ("foreign_80x24", 0, "only read here"), ("tree_filtered_40x12", 0, "filter: ha"),
                             ("held_40x12", -2, "api auth failed"), ("held_80x24", -2, "api rate-limited 5m24s")):
        assert words in pitboss.frame_lines(render_floor(*FRAMES[name]()), False)[row], name


def test_what_is_said_is_not_cut():
    for width in (30, 40, 80):
        frame = render_floor(scene(tree()), Ui(message=DIED), width, 24)
        lines = pitboss.frame_lines(frame, False)
        assert " ".join(" ".join(lines[-4:]).split()).endswith(DIED), lines[-4:]
    lines = pitboss.frame_lines(render_floor(scene(tree()), Ui(message="word " * 500), 40, 12), False)
    assert lines[-1].endswith("…") and lines[7].startswith("   ▸") and lines[8].startswith(" word")


def test_a_request_that_finds_no_room_in_its_row_is_read_below_the_list():
    asked = scene(tree().asked("worker-8", "78", "Rewrite the parser by hand, and then all of its tests in the folder"))
    for pick in (0, 1):
        lines = pitboss.frame_lines(render_floor(asked, Ui(("floor", "approvals"), pick=pick), 80, 24), False)
        assert (" Rewrite the parser by hand, and then all of its tests in the folder" in lines) == (pick == 1)


@pytest.mark.parametrize("paper", ["80x24", "40x12", "200x60"])
def test_what_is_answered_is_read_while_the_answer_is_typed(paper):
    lines = pitboss.frame_lines(render_floor(*FRAMES[f"why_not_{paper}"]()), False)
    assert any("│ Delete the old cache" in line for line in lines) and any("│ it is late" in line for line in lines)


def test_a_question_says_who_is_cancelled_too():
    told = {about: "\n".join(pitboss.frame_lines(render_floor(scene(tree()), Ui(("floor", "confirm"), question=("cancel", about)), 80, 24), False))
            for about in ("sub-1", "worker-1", "boss", "")}
    assert "With it 2 that it leads" in told["sub-1"] and "With it 7 that it leads" in told["boss"]
    assert "With it" not in told["worker-1"] + told[""]


def test_a_log_of_one_long_entry_keeps_three_rows():
    what = scene(tree(), log=(("!", "it broke in the middle of a long sentence that ends here"),))
    lines = pitboss.frame_lines(render_floor(what, Ui(("floor", "detail"), "worker-4"), 40, 12), False)
    assert " ! it broke in the middle of a long" in lines


def test_a_rule_says_what_it_does_however_narrow_it_is():
    for column in range(len(pitboss.POLICY_COLUMNS)):
        lines = pitboss.frame_lines(render_floor(scene(tree()), Ui(("floor", "policy"), rules=RULES, column=column), 40, 12), False)
        assert "auto_approve" in lines[4]


def test_wide_terminals_show_wide_rules_and_the_whole_help():
    rules = ({"match": {"actor": "a-name-that-has-more-than-thirty-letters"}, "action": "block"},)
    frames = [render_floor(scene(tree()), Ui(("floor", *views), rules=rules), 200, 60) for views in (("policy",), ("help",))]
    lines, told = (pitboss.frame_lines(frame, False) for frame in frames)
    assert any("thirty-letters " in line for line in lines)
    assert not any("more lines" in line for line in told)
    assert all(key.help.split()[-1] in " ".join(told) for key in pitboss.KEYS)


def test_what_stands_above_is_told_of():
    lines = pitboss.frame_lines(render_floor(*FRAMES["detail_small_40x12"]()), False)
    assert any(line.endswith("5 above: h") for line in lines)
    assert any("4 rows above" in line for line in pitboss.frame_lines(render_floor(*FRAMES["ask_read_on"]()), False))


def test_reading_on_is_in_the_last_row_where_there_is_more():
    for rows, shown in ((12, True), (40, False)):
        lines = pitboss.frame_lines(render_floor(scene(tree(), diff=DIFF), Ui(("floor", "diff"), "worker-1"), 80, rows), False)
        assert ("j read on" in lines[-1]) is shown


# ------------------------------------------------------------------ focus

def blocks_of(make: Maker, ui: Ui, columns: int = 3) -> list:
    return pitboss.lay_out(make.run, ui, columns, False)


@pytest.mark.parametrize("start, across, down, end", [
    ("boss", 1, 0, "worker-1"), ("boss", -1, 0, "boss"), ("boss", 0, 1, "worker-3"), ("worker-2", 0, 1, "worker-5"),
    ("worker-3", 0, -1, "boss"), ("worker-6", 0, 1, "sub-1/header"), ("worker-6", 1, 0, "sub-1/header"),
    ("worker-8", 0, 5, "worker-8"), ("worker-8", 1, 0, "worker-8"), ("worker-2", 1, 0, "worker-3")])
def test_moving_the_focus(start, across, down, end):
    make = tree()
    ui = Ui(focus=start)
    moved = pitboss.move_focus(blocks_of(make, ui), ui, across, down)
    assert moved.focus + ("/header" if moved.header else "") == end


@pytest.mark.parametrize("ui, focus, header", [
    (Ui(), "boss", False), (Ui(focus="gone"), "boss", False), (Ui(focus="worker-8", folded=frozenset(["sub-1"])), "sub-1", True),
    (Ui(focus="worker-3", hides_settled=True), "boss", False), (Ui(filter="worker-8"), "worker-8", False), (Ui(focus="boss", header=True), "boss", False)])
def test_a_focus_that_is_gone_goes_to_what_is_there(ui, focus, header):
    make = tree()
    settled = pitboss.settle_focus(make.run, blocks_of(make, ui), ui)
    assert (settled.focus, settled.header) == (focus, header)


def test_the_focus_is_always_in_sight():
    make = crowd()
    what, ui = scene(make), Ui()
    for n in range(0, 300, 7):
        frame = render_floor(what, ui._replace(focus=f"task-{n:03}"), 80, 24)
        ui = frame.ui
        assert any(name == f"task-{n:03}" for *_, kind, name in frame.spots if kind == "actor"), n


def test_tab_goes_through_all_that_needs_the_operator_and_around():
    what, ui, visited = scene(tree()), Ui(focus="worker-1"), []
    for _ in range(len(what.needs) + 1):
        need = pitboss.next_need(what, ui, 1)
        visited.append(need.actor)
        ui = ui._replace(focus=need.actor)
    assert visited == ["sub-1", "worker-4", "sub-1"]
    assert pitboss.next_need(what, Ui(focus="sub-1"), -1).actor == "worker-4"
    assert pitboss.next_need(scene(Maker("flat")), Ui(), 1) is None


def test_spots_are_where_their_tiles_are():
    frame = render_floor(*FRAMES["tree_80x24"]())
    lines = pitboss.frame_lines(frame, False)
    for y, x, height, width, kind, name in frame.spots:
        first = lines[y][x:x + width]
        assert name in first, (first, kind, name)


# ------------------------------------------------------------------ logs and texts

@pytest.mark.parametrize("text, width, rows", [
    ("", 10, [""]), ("short", 10, ["short"]), ("one two three", 8, ["one two", "three"]), ("abcdefghij", 4, ["abcd", "efgh", "ij"]),
    ("漢字漢字", 5, ["漢字", "漢字"]), ("e\u0301e\u0301e\u0301", 2, ["e\u0301e\u0301", "e\u0301"])])
def test_wrapping_counts_cells(text, width, rows):
    assert pitboss.wrap_cells(text, width) == rows


def test_wrapping_a_huge_line_takes_no_time_to_speak_of():
    began = time.process_time()
    for text in ("word " * 200_000, "漢字" * 200_000):
        rows = pitboss.wrap_cells(text, 80)
        assert all(cell_width(row) <= 80 for row in rows[:50]) and len(rows) > 9000
    assert time.process_time() - began < 5


def test_a_log_can_be_scrolled_to_its_begin_and_back():
    what = scene(tree(), log=tuple((">", f"line {n}") for n in range(200)))
    top = render_floor(what, Ui(("floor", "log"), "worker-1", back=10 ** 9), 80, 24)
    assert any("line 0 " in line + " " for line in pitboss.frame_lines(top, False)) and top.ui.back == 200 - 19
    end = render_floor(what, top.ui._replace(back=0), 80, 24)
    assert any("line 199" in line for line in pitboss.frame_lines(end, False))


def test_searching_goes_up_and_down_and_says_where_it_is():
    log = (*((">", f"line {n}") for n in range(100)), (">", "a line that is wrapped " * 20 + "the last words"))
    what, ui, seen = scene(tree(), log=log), Ui(("floor", "log"), "worker-1", search="line 5"), []
    found = None
    for step in (1, 1, 1, -1):
        found = pitboss.find_in_log(log, "line 5", 80, 19, found and found.entry, step)
        frame = render_floor(what, ui._replace(back=found.back, hit=found.entry), 80, 24)
        lit = [text for row in frame.rows for text, style in row if "bold reverse" in style and "line" in text]
        seen.append((found.number, found.total, [text.split()[-1] for text in lit]))
    assert seen == [(1, 11, ["59"]), (2, 11, ["58"]), (3, 11, ["57"]), (2, 11, ["58"])]
    last = pitboss.find_in_log(log, "line 5", 80, 19, 101 - 1 - 5, 1)
    assert last is None
    assert pitboss.find_in_log(log, "nowhere", 80, 19, None, 1) is None
    assert pitboss.tell_hit("x", found, 1, 0) == ("x: 2 of 11", "green")
    assert pitboss.tell_hit("x", None, 1, 11) == ("x: the last one above, of 11", "yellow")
    assert pitboss.tell_hit("x", None, 1, 0) == ("not found: x", "red")


def test_words_are_found_where_a_row_ends_between_them():
    text = "word " * 30 + "needle in hay"
    for width in range(20, 60):
        found = pitboss.find_in_log(((">", text),), "needle in", width, 5, None, 1)
        assert (found.number, found.total) == (1, 1)
        lit = pitboss.rows_with(text, "needle in", width - 3)
        rows = pitboss.wrap_cells(text, width - 3)
        assert "needle in" in " ".join(rows[n] for n in lit)


def test_a_hit_near_the_end_is_found_and_shown():
    log = tuple((">", f"line {n}") for n in range(100))
    found = pitboss.find_in_log(log, "line 98", 80, 19, None, 1)
    assert (found.entry, found.back, found.total) == (1, 0, 1)


@pytest.mark.parametrize("text, at, key, after, where", [
    ("ab", 1, "x", "axb", 2), ("ab", 1, "enter", "a\nb", 2), ("ab", 2, "backspace", "a", 1), ("ab", 0, "backspace", "ab", 0),
    ("ab", 0, "delete", "b", 0), ("ab", 1, "left", "ab", 0), ("ab", 2, "right", "ab", 2), ("ab\ncd", 4, "home", "ab\ncd", 3),
    ("ab\ncd", 0, "end", "ab\ncd", 2), ("ab\ncd", 4, "up", "ab\ncd", 1), ("ab\ncd", 1, "down", "ab\ncd", 4),
    ("ab\ncd", 1, "up", "ab\ncd", 0), ("ab\ncd", 4, "down", "ab\ncd", 5), ("ab\ncd", 5, "ctrl-u", "ab\n", 3),
    ("ab", 1, "f9", "ab", 1), ("ab", 1, "漢", "a漢b", 2)])
def test_typing_in_a_box(text, at, key, after, where):
    box = pitboss.edit_box(pitboss.Box("t", text, at), key)
    assert (box.text, box.at) == (after, where)


@pytest.mark.parametrize("key, after", [("x", "x"), ("backspace", ""), ("left", "ol"), ("end", "old")])
def test_the_first_key_in_a_prefilled_box_replaces_the_text(key, after):
    box = pitboss.edit_box(pitboss.Box("t", "old", 3, one_line=True, fresh=True), key)
    box = pitboss.edit_box(pitboss.edit_box(box, "delete"), "f9")
    assert (box.text, box.fresh) == (after, False)


def test_a_paste_into_a_box():
    box = pitboss.paste_box(pitboss.Box("t", "ab", 1), "x\r\ny\rz\tq\x1b\x07")
    assert (box.text, box.at) == ("ax\ny\nz   qb", 10)
    one = pitboss.paste_box(pitboss.Box("t", "ab", 1, one_line=True), "x\ny\n")
    assert (one.text, one.at) == ("ax yb", 4)
    assert pitboss.paste_box(pitboss.Box("t", "old", 3, one_line=True, fresh=True), "new").text == "new"


def foot(make: Maker, ui: Ui, width: int = 80, **more) -> str:
    return "".join(text for text, _ in pitboss.draw_foot(scene(make, **more), ui, width)).rstrip()


def test_the_last_row_keeps_how_to_leave_however_narrow_it_is():
    for width in range(8, 200):
        for view in pitboss.VIEW_KINDS:
            words = foot(tree(), Ui(("floor", view), "worker-1", rules=RULES, question=("back", "")), width).split()
            needed = {"floor": {"?", "q"}, "help": {"q", "Esc"}, "confirm": {"Esc"}, "unsaved": {"Esc"}, "box": {"Esc"}}
            assert needed.get(view, {"?", "Esc", "q"}) <= {*words}, (width, view, words)


def test_the_last_row_has_only_keys_that_do_something():
    assert " c continue" not in foot(tree(), Ui(focus="worker-1"), 200) and " p pause" in foot(tree(), Ui(focus="worker-1"), 200)
    assert " c continue" in foot(tree(), Ui(focus="worker-5"), 200) and " p pause" not in foot(tree(), Ui(focus="worker-5"), 200)
    assert not {"p", "x", "r"} & {*foot(tree(), Ui(focus="worker-3"), 200).split()}, "it has settled"
    assert not {"p", "x", "r"} & {*foot(tree(), Ui(focus="worker-1"), 200, state="stale").split()}
    assert "Esc" not in foot(tree(), Ui()) and "Esc" in foot(tree(), Ui(filter="x"))
    assert "n/N" not in foot(tree(), Ui(("floor", "log"))) and "n/N" in foot(tree(), Ui(("floor", "log"), search="x"))
    assert "Tab" not in foot(Maker("flat"), Ui()) and "Tab" in foot(tree(), Ui())


def test_what_stands_above_a_log_is_scrolled_until_its_end():
    texts = []
    ui = Ui(("floor", "detail"), "worker-4")
    for _ in range(40):
        frame = render_floor(scene(tree()), ui, 40, 12)
        texts += pitboss.frame_lines(frame, False)
        ui = frame.ui._replace(head=frame.ui.head + 1)
    assert any("the tests do not pass" in line for line in texts) and any("notes.txt" in line for line in texts)


def test_an_actor_says_what_waits_for_the_operator():
    lines = pitboss.frame_lines(render_floor(scene(tree()), Ui(("floor", "detail"), "sub-1"), 80, 24), False)
    assert any("for you: Delete the old cache (a)" in line for line in lines)


def test_every_column_of_a_rule_can_be_seen():
    for width in (20, 30, 40, 60, 80):
        for column, (name, *_) in enumerate(pitboss.POLICY_COLUMNS):
            ui = Ui(("floor", "policy"), rules=RULES, column=column)
            lines = pitboss.frame_lines(render_floor(scene(tree()), ui, width, 12), False)
            assert name in lines[3], (width, name, lines[3])
    assert pitboss.ACTION_WORDS.keys() == {*pitboss.ACTIONS}
    ui = Ui(("floor", "policy"), rules=RULES, pick=1)
    assert any("ask me" in line for line in pitboss.frame_lines(render_floor(scene(tree()), ui, 80, 12), False)[:-2])


def test_what_an_operator_did_stands_among_what_the_actor_said():
    make = tree()
    events = [
        {"kind": "reprompted", "actor": "worker-1", "message": ["m", "use\nthe other \x1b[31mone", True]},
        {"kind": "reprompted", "actor": "worker-1", "message": ["m", "x", True], "call": "7"},
        {"kind": "pause_decided", "actor": "worker-1", "mode": "freeze"},
        {"kind": "continue_decided", "actor": "worker-1", "message": None},
        {"kind": "stop_decided", "actor": "worker-1", "why": "timeout"},
        {"kind": "stop_decided", "actor": "worker-1", "why": "cancel", "reason": "too dear"},
        {"kind": "approval_decided", "actor": "worker-1", "approved": False, "by": "operator", "answer": {"reason": "no"}, "call": "c"},
        {"kind": "approval_decided", "actor": "worker-1", "approved": True, "by": "policy", "answer": {}}]
    assert [pitboss.render_deed(make.run, event) for event in events] == [
        (">", "you: use the other one"), None, ("!", "you froze it"), ("!", "you let it go on"), None,
        ("!", "you cancelled it: too dear"), ("!", "you rejected its request: no"), None]
    merged = pitboss.merge_deeds([1, 2, 3], [0, 10, 20], [(20, "!", "b"), (5, ">", "a"), (99, "!", "c")])
    assert merged == (1, (">", "a"), 2, ("!", "b"), 3, ("!", "c"))


@pytest.mark.parametrize("view", ["floor", "log", "policy"])
def test_the_help_tells_of_each_key_once(view):
    frame = render_floor(scene(tree()), Ui((view, "help")), 200, 300)
    lines = pitboss.frame_lines(frame, False)
    helps = [key.help for key in pitboss.KEYS if key.where]
    for words in {*helps}:
        assert sum(line.startswith("   ") and line.endswith(" " + words) for line in lines) == helps.count(words), words


def test_a_picture_is_well_formed_and_holds_the_text():
    import xml.etree.ElementTree as tree_of

    frame = render_floor(*FRAMES["tree_80x24"]())
    root = tree_of.fromstring(pitboss.render_svg(frame))
    texts = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert any("worker-1" in text for text in texts) and any("needs you" in text for text in texts)


if __name__ == "__main__":
    print(*(picture(name) for name in sys.argv[1:] or FRAMES), sep="=" * 80 + "\n", end="")
