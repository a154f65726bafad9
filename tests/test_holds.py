"""A provider's limit holds its account instead of failing hand after hand; refused credentials stop at once.

The decisions are pure and are tested by tables; whole runs go through the program with the scripted agent,
and their verdict comes from journals, files and records.
"""
from __future__ import annotations

import json
import signal
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

import pitboss
from checker import Promise, check_holds, check_run
from pitboss import Health, Hold, Talk
from record_journals import deal_until
from tools import read_events, read_records, wait_for

NOW = 1000.0

# ------------------------------------------------------------------ decisions


def talk_of(**facts) -> Talk:
    talk = Talk()
    vars(talk).update(facts)
    return talk


ACTOR = pitboss.Actor(id="a", role="task", agent="demo", model="m", directory="/d", use_worktree=False,
                      timeout_s=60, branch=None, account="x")
LIMITED, REFUSED = {"kind": "rate_limit", "message": "m"}, {"kind": "auth_failure", "message": "m"}
BACK_OFF = [5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0, 900.0, 900.0]


def hold(kind: str = "limit", until: float | None = None, **more) -> Hold:
    return Hold("x", kind, NOW - 1, until, **more)


class Met(NamedTuple):
    """A hand met something: with what hold standing, after how many limits in a row, and what must follow."""

    name: str
    reason: dict | None
    gives: tuple | None                # (kind, until, told, tries)
    talk: dict = {}
    standing: Hold | None = None
    tries: int = 0
    actor: pitboss.Actor = ACTOR


MET = [
    Met("nothing", None, None),
    Met("a failure of its own", {"kind": "unknown", "message": "m"}, None),
    Met("a busy server", {"kind": "network_error", "message": "m"}, None),
    Met("an account that nobody has", LIMITED, None, actor=ACTOR._replace(account="")),
    Met("a limit whose end is told", LIMITED, ("limit", NOW + 3, True, 1), {"resets_at": NOW + 3}),
    Met("a limit whose end is told again at once", LIMITED, ("limit", NOW + 5, True, 2), {"resets_at": NOW + 3},
        tries=1),
    Met("a far end beats the back-off", LIMITED, ("limit", NOW + 9999, True, 6), {"resets_at": NOW + 9999},
        tries=5),
    Met("an end that has passed is none", LIMITED, ("limit", NOW + 5, False, 1), {"resets_at": NOW}),
    Met("an end in a year is none", LIMITED, ("limit", NOW + 5, False, 1), {"resets_at": NOW + 366 * 86400}),
    *(Met(f"limit {n} in a row", LIMITED, ("limit", NOW + seconds, False, n), tries=n - 1)
      for n, seconds in enumerate(BACK_OFF, 1)),
    Met("limit 2000 in a row", LIMITED, ("limit", NOW + 900, False, 2000), tries=1999),
    Met("an answer ends the row", LIMITED, ("limit", NOW + 5, False, 1), {"answers": 1}, tries=7),
    Met("held already, nothing told", LIMITED, None, standing=hold(until=NOW + 2, tries=3)),
    Met("held already, the same end", LIMITED, None, {"resets_at": NOW + 60}, hold(until=NOW + 60)),
    Met("held already, a later end", LIMITED, ("limit", NOW + 60, True, 3), {"resets_at": NOW + 60},
        hold(until=NOW + 2, tries=3)),
    Met("the one that probes", LIMITED, ("limit", NOW + 20, False, 3), standing=hold("probe"), tries=2),
    Met("refused", REFUSED, ("auth", None, False, 0)),
    Met("refused in a hold", REFUSED, ("auth", None, False, 0), standing=hold(until=NOW + 60)),
    Met("refused again", REFUSED, None, standing=hold("auth")),
    Met("a limit after it was refused", LIMITED, None, {"resets_at": NOW + 3}, hold("auth")),
]


@pytest.mark.parametrize("case", MET, ids=lambda case: case.name)
def test_what_the_end_of_a_hand_holds(case):
    run = pitboss.RunState()
    run.tries = {"x": case.tries} if case.tries else {}
    run.holds = {"x": case.standing} if case.standing else {}
    decided = pitboss.decide_hold(run, case.actor, talk_of(**case.talk), case.reason, NOW, 0.5)
    if case.gives is None:
        assert decided is None
        return
    kind, until, told, tries = case.gives
    assert (decided["hold"], decided["account"], decided["actor"]) == (kind, "x", "a")
    assert (decided.get("told", False), decided.get("tries", 0)) == (told, tries)
    # half of the jitter, which is a second
    assert decided.get("until") == (until if until is None else pytest.approx(until + 0.5))


@pytest.mark.parametrize("tries", range(0, 12))
def test_jitter_moves_a_back_off_and_never_ends_a_told_limit_early(tries):
    run = pitboss.RunState()
    run.tries = {"x": tries}
    blind = [pitboss.decide_hold(run, ACTOR, Talk(), LIMITED, NOW, j)["until"] - NOW for j in (0.0, 0.5, 1.0)]
    delay = BACK_OFF[min(tries, 9)]
    assert blind == pytest.approx([delay * 0.75, delay + 0.5, delay * 1.25 + 1])
    told = talk_of(resets_at=NOW + 3)
    assert all(pitboss.decide_hold(run, ACTOR, told, LIMITED, NOW, j)["until"] >= NOW + 3 for j in (0.0, 1.0))


ENDS = [
    ("its time has not come", hold(until=NOW + 0.1, told=True), None),
    ("its time has come", hold(until=NOW, told=True), "hold_ended"),
    ("a back-off is over", hold(until=NOW - 5), "hold_began probe"),
    ("one that probes has no time", hold("probe"), None),
    ("refused credentials have no time", hold("auth"), None),
]


@pytest.mark.parametrize("name, standing, gives", ENDS, ids=[e[0] for e in ENDS])
def test_what_time_ends(name, standing, gives):
    decided = pitboss.decide_hold_end(standing, NOW)
    assert (decided and " ".join([decided[0], decided[1].get("hold", "")]).strip()) == gives


class Told(NamedTuple):
    """Another run told of an account."""

    name: str
    health: Health | None
    gives: str | None
    standing: Hold | None = None
    cleared: float = 0.0


SAID = Health("x", "limit", NOW - 0.5, NOW + 60, True, 2, "another")
TOLD = [
    Told("nothing", None, None),
    Told("what this run told itself", SAID._replace(run="me"), None),
    Told("a limit", SAID, "limit"),
    Told("a limit that is over", SAID._replace(until=NOW), None),
    Told("a limit without an end", SAID._replace(until=None), None),
    Told("a limit for a year", SAID._replace(until=NOW + 366 * 86400), None),
    Told("a limit that this run has", SAID, None, hold(until=NOW + 60)),
    Told("a limit that ends later", SAID, "limit", hold(until=NOW + 30)),
    Told("a limit that ends earlier", SAID, None, hold(until=NOW + 90)),
    Told("a limit, and this run probes", SAID, "limit", hold("probe")),
    Told("an older limit, and this run probes", SAID._replace(since=NOW - 9), None, hold("probe")),
    Told("a limit before this run was answered", SAID, None, cleared=NOW),
    Told("a limit of refused credentials", SAID, None, hold("auth")),
    Told("it is well", SAID._replace(state="ok"), None),
    Told("it is well, and this run probes", SAID._replace(state="ok"), "hold_ended", hold("probe")),
    Told("it was well before this run was careful", SAID._replace(state="ok", since=NOW - 9), None, hold("probe")),
    Told("it is well, and this run is limited", SAID._replace(state="ok"), None, hold(until=NOW + 60)),
    Told("refused", SAID._replace(state="auth", until=None), "probe"),
    Told("refused long ago", SAID._replace(state="auth", until=None, since=NOW - 3601), None),
    Told("refused before this run was answered", SAID._replace(state="auth", until=None), None, cleared=NOW),
    Told("refused, and this run is limited", SAID._replace(state="auth", until=None), None, hold(until=NOW + 60)),
    Told("a word of a newer version", SAID._replace(state="on_holiday"), None),
]


@pytest.mark.parametrize("case", TOLD, ids=lambda case: case.name)
def test_what_another_run_told(case):
    run = pitboss.RunState()
    run.run_id = "me"
    run.holds = {"x": case.standing} if case.standing else {}
    run.cleared = {"x": case.cleared} if case.cleared else {}
    decided = pitboss.decide_told(run, case.health, NOW)
    assert (decided and (decided[1].get("hold") or decided[0])) == case.gives
    if case.gives == "limit":
        assert (decided[1]["until"], decided[1]["tries"], decided[1]["run"]) == (NOW + 60, 2, "another")


def test_an_account_is_its_agent_and_its_credentials_and_gives_nothing_away():
    row, key = pitboss.AGENTS["claude"], "sk-ant-api03-a-key-of-mine-0123456789"
    env = {"ANTHROPIC_API_KEY": key, "HOME": "/h", "PATH": "/bin"}
    account = pitboss.account_of(row, env)
    assert account.startswith("claude:") and key not in account and "sk-ant" not in account
    assert account == pitboss.account_of(row, {**env, "PATH": "/usr/bin", "TERM": "x", "ANTHROPIC_MODEL": "m"})
    others = [{**env, "ANTHROPIC_API_KEY": key + "1"}, {**env, "ANTHROPIC_BASE_URL": "http://x"},
              {**env, "CLAUDE_CONFIG_DIR": "/c"}, {**env, "HOME": "/other"}, {**env, "CLAUDE_CODE_USE_BEDROCK": "1"}]
    assert len({account, *(pitboss.account_of(row, e) for e in others)}) == 6
    own = pitboss.agent_row("own", {"own": pitboss.Command(("./prog",), "claude")})
    assert pitboss.account_of(own, {"MY_TOKEN": "1"}) != pitboss.account_of(own, {"MY_TOKEN": "2"})
    assert pitboss.account_of(own, {"PATH": "1"}) == pitboss.account_of(own, {"PATH": "2"})


# ------------------------------------------------------------------ the reducer

def play(*events: tuple[str, dict]) -> pitboss.RunState:
    """The run of two slots, one actor with a worktree and what happens then."""
    run = pitboss.RunState()
    head = [("run_opened", {"run_id": "r", "name": "n", "mode": "flat", "max_parallel": 2}),
            ("actor_added", {"actor": "a", "role": "task", "agent": "demo", "model": "m", "directory": "/d",
                             "timeout_s": 60, "use_worktree": True, "branch": None, "account": "x"}),
            ("dispatcher_started", {})]
    for seq, (kind, facts) in enumerate([*head, *events], 1):
        pitboss.step(run, {"seq": seq, "at": float(seq), "kind": kind, **facts})
    return run


PLACED = ("placed", {"actor": "a", "place": {"path": "/w", "branch": "b"}})
DEALT = ("hand_dealt", {"actor": "a", "hand": 1, "session_id": "s", "how": "prompt", "log_at": 0, "message_id": "m"})
LOST = ("hand_ended", {"actor": "a", "hand": 1, "lived_s": 1.0, "usage": [0, 0, 0, 0], "code": None, "again": "resume",
                       "cause": "lost"})
STARTED = ("hand_started", {"actor": "a", "hand": 1, "handle": {}})
HELD = ("hold_began", {"account": "x", "hold": "limit", "until": 99.0})
OVER = ("hold_ended", {"account": "x", "why": "time"})
HISTORIES = {"its worktree is being made": (HELD, PLACED), "its hand never started": (PLACED, DEALT, HELD, (
    "hand_voided", {"actor": "a", "hand": 1})), "its hand vanished": (PLACED, DEALT, STARTED, HELD, LOST),
    "its hand was about to be dealt": (PLACED, HELD, ("hand_held", {"actor": "a"}))}


@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_no_hand_is_owed_in_a_hold_wherever_an_actor_stands(history):
    run = play(*history)
    assert (run.actors["a"].state, run.owed, run.live, list(run.held)) == ("held", {}, 0, ["a"])
    run = play(*history, OVER)
    assert (run.actors["a"].state, set(run.owed), run.live, run.held) == ("dealing", {("deal", "a")}, 1, {})
    run = play(*history, ("drained", {"why": "signal", "signal": "INT"}))
    assert (run.actors["a"].state, set(run.owed), run.live) == ("closing", {("close", "a")}, 0)
    run = play(*history, ("drained", {"why": "no_space"}))
    assert (run.actors["a"].state, run.owed) == ("held", {}), "it is resumed when there is room"
    assert set(play(*history, ("drained", {"why": "no_space"}), OVER, ("dispatcher_started", {})).owed) == {
        ("deal", "a")}


def test_the_live_table_and_the_lines_of_progress_say_so():
    run = play(PLACED, DEALT, STARTED, HELD, ("hand_ended", {**LOST[1], "cause": "limit"}))
    until = pitboss.render_time(99.0)
    title, held, *rows = pitboss.render_floor_lines(run, {}, 69.0, 200, 24)
    assert "0 running, 1 waiting" in title and held == f"held: x: api rate-limited: held until {until} (in 30s); 1 wait"
    assert [row.split()[:3] for row in rows] == [["▸", "a", "held"]]
    began = {"at": 69.0, "kind": "hold_began", **HELD[1]}
    assert pitboss.render_change(run, began, False) == held.removeprefix("held: ")
    assert pitboss.render_change(run, {**began, "run": "0123456789"}, False).endswith(" (seen by run 01234567)")
    assert "limit" in pitboss.render_change(run, {"at": 1.0, "kind": "hand_ended", **LOST[1], "cause": "limit"}, False)
    assert "again" in pitboss.render_change(run, {"at": 1.0, "kind": "hold_ended", **OVER[1]}, False)


def test_a_held_crowd_costs_each_event_what_it_touches():
    """Ten thousand actors of a held account are added, and one of another account runs, without a look at them all."""
    looks = 0

    def counted(run, account, own=0):
        nonlocal looks
        looks += 1
        return real(run, account, own)

    real, pitboss.may_start = pitboss.may_start, counted
    try:
        added = {"role": "task", "agent": "demo", "model": "m", "directory": "/d", "timeout_s": 60,
                 "use_worktree": False, "branch": None}
        run = play(HELD, *(("actor_added", {"actor": f"t{n}", "account": "x", **added}) for n in range(10_000)),
                   ("actor_added", {"actor": "z", "account": "y", **added}))
    finally:
        pitboss.may_start = real
    assert (run.actors["z"].state, run.actors["t9999"].state, looks < 50_000) == ("dealing", "waiting", True), looks


# ------------------------------------------------------------------ whole runs

def write(home, tasks: dict[str, str], name: str = "m.toml", more: dict[str, dict] = {}, **run) -> Path:
    """A manifest of scripted agents that work in the home itself."""
    keys = "".join(f"{k} = {json.dumps(v)}\n" for k, v in {"max_parallel": 5, **run}.items())
    text = f'[run]\n{keys}[defaults]\nagent = "demo"\nuse_worktree = false\n'
    for task, script in tasks.items():
        rows = {"id": task, "directory": str(home.root), "prompt": script}
        text += "[[task]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in rows.items())
        text += "".join(f"{k} = {v}\n" for k, v in more.get(task, {}).items())
    return home.manifest(text, name)


def events_of(home, run: Path | None = None) -> list[dict]:
    """The journal of the newest run, or of `run`; empty before there is one."""
    run = run or max(home.runs.glob("0*"), default=None, key=lambda path: path.name)
    return read_events(run) if run and (run / "journal.jsonl").exists() else []


def has(home, kind: str, count: int = 1, run: Path | None = None, **facts) -> bool:
    return sum(e["kind"] == kind and facts.items() <= e.items() for e in events_of(home, run)) >= count


def quota(home, seconds: float) -> str:
    """A step that meets a limit which all share."""
    return f"$ quota {seconds} {home.root}/quota"


def crowd(home, seconds: float, name: str = "t", meeting: int = 5) -> dict[str, str]:
    """Twenty tasks; the first five wait until so many have come, and then meet one limit."""
    ready = f"{home.root}/ready"
    meet = f"$ run touch {ready}.$PITBOSS_TASK_ID; until [ $(ls {ready}.* | wc -l) -ge {meeting} ]; do sleep 0.02; done"
    return {f"{name}{n:02}": "\n".join([*([meet] if n < 5 else []), quota(home, seconds), "$ say done"])
            for n in range(20)}


@pytest.mark.slow
def test_a_limit_holds_the_account_and_everything_succeeds(home):
    """Five of twenty tasks meet it; none of them fails, nothing starts until it ends."""
    repo = home.repo()
    text = write(home, crowd(home, 3)).read_text().replace("use_worktree = false", "use_worktree = true")
    home.manifest(text.replace(f'directory = "{home.root}"', f'directory = "{repo}"'))
    done = home.pitboss("dispatch", home.root / "m.toml", check=0)
    run = home.run_dir()
    assert check_run(run, repo, [Promise(task) for task in crowd(home, 3)]) == []
    assert check_holds(run, hands=5) == []
    assert sorted(r["hands"] for r in read_records(run)) == [1] * 15 + [2] * 5
    actors = pitboss.fold_run(str(run)).actors.values()
    assert [(a.lost, a.afresh, a.blind) for a in actors] == [(0, False, 0)] * 20, "no attempt was counted"
    assert has(home, "hold_began", hold="limit", told=True) and has(home, "hold_ended", why="time")
    assert done.stderr.count("api rate-limited: held until") == 1, done.stderr
    assert "takes requests again" in done.stderr


@pytest.mark.slow
def test_two_crowds_side_by_side_lose_nothing(home):
    """Both began before the limit was met; from then on neither starts anything until it ends."""
    first = home.start("dispatch", write(home, crowd(home, 3, "t", 10)))
    second = home.start("dispatch", write(home, crowd(home, 3, "s", 10), "second.toml"))
    assert first.wait(60) == second.wait(60) == 0
    for run in home.runs.glob("0*"):
        assert check_holds(run, hands=5) == []
        assert [r["status"] for r in read_records(run)] == ["Success"] * 20
        assert {a.lost for a in pitboss.fold_run(str(run)).actors.values()} == {0}


def test_a_second_run_does_not_meet_the_limit_of_the_first(home):
    """It starts nothing until then, though it has an empty journal and free slots."""
    first = home.start("dispatch", write(home, {"a": quota(home, 2), "b": quota(home, 2)}))
    wait_for(lambda: has(home, "hold_began"))
    one = home.run_dir()
    home.pitboss("dispatch", write(home, {f"s{n}": quota(home, 2) for n in range(3)}, "second.toml"), check=0)
    two = home.run_dir()
    assert first.wait(60) == 0 and one != two
    until = next(e["until"] for e in read_events(one) if e["kind"] == "hold_began")
    assert check_holds(one) == [] and check_holds(two, hands=0) == []
    assert has(home, "hold_began", run=two, hold="limit")
    assert min(e["at"] for e in read_events(two) if e["kind"] == "hand_started") >= until
    assert {r["hands"] for r in read_records(two)} == {1}
    assert (home.root / "data/pitboss/house.sqlite").stat().st_mode & 0o777 == 0o600


def test_two_runs_that_began_together_stop_together(home):
    """The one that did not meet the limit takes it over while it runs."""
    go = home.root / "go"
    waits = f"$ run until [ -e {go} ]; do sleep 0.02; done"
    second = home.start("dispatch", write(home, {"w": waits, "n": quota(home, 2)}, "second.toml", max_parallel=1))
    wait_for(lambda: has(home, "hand_started"))
    two = home.run_dir()
    first = home.start("dispatch", write(home, {"m": quota(home, 2)}))
    wait_for(lambda: has(home, "hold_began", run=two))
    go.touch()
    assert first.wait(30) == second.wait(30) == 0
    assert check_holds(two, hands=0) == [] and {r["hands"] for r in read_records(two)} == {1}


def test_a_held_hand_has_all_its_time_and_gives_its_slot_to_other_accounts(home):
    """A timeout of one second, a limit of two, one slot: the other account's task runs meanwhile."""
    home.pitboss("dispatch", write(home, {"a": quota(home, 2), "b": "$ say other"}, max_parallel=1, more={
        "a": {"timeout_secs": 1}, "b": {"env": '{ PITBOSS_DEMO_ACCOUNT = "other" }'}}), check=0)
    starts = [(e["actor"], e["hand"]) for e in events_of(home) if e["kind"] == "hand_started"]
    assert starts == [("a", 1), ("b", 1), ("a", 2)] and check_holds(home.run_dir()) == []
    ended = next(e["at"] for e in events_of(home) if e["kind"] == "hold_ended")
    assert next(e["at"] for e in events_of(home) if e["kind"] == "closed" and e["actor"] == "b") < ended


def start_held(home, tasks: dict[str, str] | None = None, **run):
    """A dispatcher whose one account is held for a minute, with nothing alive."""
    process = home.start("dispatch", write(home, tasks or {"a": quota(home, 60), "b": "$ say b"},
                                           **{"max_parallel": 1, **run}))
    wait_for(lambda: has(home, "hand_ended", cause="limit"))
    return process


def test_status_says_what_is_held_and_until_when(home):
    process = start_held(home)
    shown = json.loads(home.pitboss("status", home.run_dir().name, "--json", check=0).stdout)
    held, = shown["holds"]
    told = next(e for e in events_of(home) if e["kind"] == "hold_began")
    assert (held["agent"], held["kind"], held["waiting"]) == ("demo", "limit", 2)
    assert (held["account"], held["until"]) == (told["account"], pitboss.render_time(told["until"]))
    assert [(a["task_id"], a["state"], a["held_until"], a["hands"]) for a in shown["actors"]] == [
        ("a", "Pending", held["until"], 1), ("b", "Pending", held["until"], 0)]
    text = home.pitboss("status", home.run_dir().name, check=0).stdout
    assert f"held  demo: api rate-limited: held until {held['until']} (in " in text and "; 2 wait" in text
    process.kill()
    process.wait()


def test_a_drain_in_a_hold_ends_at_once(home):
    """Who has begun gets a record that says why it did not go on; who has not gets none."""
    process = start_held(home)
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    record, = read_records(home.run_dir())
    assert (record["task_id"], record["status"], record["failure_reason"]["kind"]) == ("a", "Failed", "rate_limit")
    assert record["failure_reason"]["resets_at"] > pitboss.render_time(time.time())
    assert json.loads((home.run_dir() / "summary.json").read_text())["tasks_not_started"] == 1


@pytest.mark.parametrize("whole_run", [True, False])
def test_a_cancel_in_a_hold_works_at_once(home, whole_run):
    process = start_held(home)
    home.pitboss("cancel", home.run_dir().name, *([] if whole_run else ["a"]), check=0)
    if not whole_run:
        home.pitboss("cancel", home.run_dir().name, "b", check=0)
    assert process.wait(10) == 1
    statuses = {r["task_id"]: r["status"] for r in read_records(home.run_dir())}
    assert statuses == ({"a": "Cancelled"} if whole_run else {"a": "Cancelled", "b": "Cancelled"})


def test_a_dead_run_that_is_held_can_be_cancelled(home):
    process = start_held(home)
    process.kill()
    process.wait()
    home.pitboss("cancel", home.run_dir().name, check=0, timeout=20)
    assert {r["task_id"]: r["status"] for r in read_records(home.run_dir())} == {"a": "Cancelled"}


def test_a_halt_in_a_hold_ends_at_once(home):
    go = home.root / "go"
    fails = f"$ run until [ -e {go} ]; do sleep 0.02; done\n$ fail no"
    process = start_held(home, {"a": quota(home, 60), "b": fails, "c": "$ say c"}, max_parallel=2,
                         halt_on_failure=True)
    go.touch()
    assert process.wait(10) == 1
    assert {r["task_id"]: r["failure_reason"]["kind"] for r in read_records(home.run_dir())} == {
        "a": "rate_limit", "b": "unknown"}


def test_a_hold_outlives_its_dispatcher(home):
    process = home.start("dispatch", write(home, {"a": quota(home, 2), "b": quota(home, 2)}, max_parallel=1))
    wait_for(lambda: has(home, "hand_ended", cause="limit"))
    process.kill()
    process.wait()
    run = home.run_dir()
    assert "held until" in home.pitboss("status", run.name, check=0).stdout
    (home.root / "data/pitboss/house.sqlite").unlink()         # its own journal knows
    home.pitboss("resume", run.name, check=0)
    assert check_holds(run) == [] and has(home, "dispatcher_started", 2) and not has(home, "hold_began", 2)
    assert {r["task_id"]: (r["status"], r["hands"]) for r in read_records(run)} == {
        "a": ("Success", 2), "b": ("Success", 1)}


def test_a_hand_that_was_about_to_be_dealt_is_held_by_what_another_run_told(home):
    """The dispatcher died between its worktree and its hand; meanwhile another run met a limit."""
    home.repo()
    one = write(home, {"one": "$ say a"}).read_text().replace("use_worktree = false", "")
    deal_until(home, home.manifest(one.replace(f'"{home.root}"', '"repo"')), "journal.after", 4)
    run = home.run_dir()
    other = home.start("dispatch", write(home, {"two": "$ limit 2 1"}, "two.toml"))
    wait_for(lambda: has(home, "hold_began"))
    home.pitboss("resume", run.name, check=0)
    assert other.wait(30) == 0 and has(home, "placed", run=run)
    assert has(home, "hand_held", run=run) and check_holds(run, hands=0) == []
    assert {r["hands"] for r in read_records(run)} == {1}


def test_a_resume_with_another_key_need_not_wait(home):
    process = start_held(home, {"a": "$ limit 60 1", "b": "$ say b"})
    process.kill()
    process.wait()
    run = home.run_dir()
    home.pitboss("resume", run.name, env={"PITBOSS_DEMO_ACCOUNT": "another"}, check=0)
    assert {r["hands"] for r in read_records(run)} == {1, 2} and has(home, "account_changed", 2)


def test_a_limit_of_the_former_key_holds_nobody_who_has_another(home):
    """The hand met it after its dispatcher had died; the next dispatcher has another key."""
    go = home.root / "go"
    met = f"$ run until [ -e {go} ]; do sleep 0.02; done\n$ limit 60 1\n$ say done"
    process = home.start("dispatch", write(home, {"a": met, "b": "$ say b"}, max_parallel=1))
    wait_for(lambda: has(home, "hand_started"))
    process.kill()
    process.wait()
    run = home.run_dir()
    resumed = home.start("resume", run.name, env={"PITBOSS_DEMO_ACCOUNT": "another"})
    wait_for(lambda: has(home, "dispatcher_started", 2))
    go.touch()
    assert resumed.wait(30) == 0
    accounts = {e["account"] for e in events_of(home) if e["kind"] == "actor_added"}
    assert {e["account"] for e in events_of(home) if e["kind"] == "hold_began"} == accounts
    assert {r["task_id"]: r["hands"] for r in read_records(run)} == {"a": 2, "b": 1}


@pytest.mark.slow
def test_after_a_back_off_one_hand_asks_for_all(home):
    """Nobody told when the limit ends: the hold is a guess, and only one hand makes sure."""
    tasks = {"a": "$ throttle 1\n$ sleep 0.7", **{f"t{n}": "$ say x" for n in range(3)}}
    home.pitboss("dispatch", write(home, tasks, max_parallel=1), check=0)
    run = home.run_dir()
    home.pitboss("dispatch", write(home, {**tasks, "a": "$ throttle 1\n$ sleep 1\n$ say x"}, "b.toml",
                                   max_parallel=4), check=0)
    for run in (run, home.run_dir()):
        events = read_events(run)
        kinds = [(e["kind"], e.get("hold") or e.get("why")) for e in events if e["kind"].startswith("hold_")]
        assert kinds == [("hold_began", "limit"), ("hold_began", "probe"), ("hold_ended", "answered")]
        began, ended = (next(e["at"] for e in events if (e["kind"], e.get("hold") or e.get("why")) == k)
                        for k in kinds[1:])
        assert sum(e["kind"] == "hand_started" and began <= e["at"] < ended for e in events) == 1
        assert check_holds(run) == []


# ------------------------------------------------------------------ refused credentials

def refused(home, count: int = 4, **run) -> Path:
    return write(home, {f"t{n}": f"$ auth {home.root}/login\n$ say in" for n in range(count)}, **run)


def test_refused_credentials_stop_the_second_start_with_one_message(home):
    done = home.pitboss("dispatch", refused(home, max_parallel=1), check=1)
    run = home.run_dir()
    record, = read_records(run)
    assert (record["task_id"], record["status"], record["failure_reason"]["kind"]) == ("t0", "Failed", "auth_failure")
    assert json.loads((run / "summary.json").read_text())["tasks_not_started"] == 3
    assert not list(run.glob("tasks/t[123]")) and has(home, "hand_started") and not has(home, "hand_started", 2)
    assert done.stderr.count("api auth failed") == 1 and f"pitboss resume {run.name} --failed" in done.stderr


def test_a_resume_after_the_login_was_mended_deals_the_rest(home):
    """One hand makes sure; then all go on, in this run and in the next."""
    home.pitboss("dispatch", refused(home, max_parallel=1), check=1)
    (home.root / "login").touch()
    home.pitboss("resume", home.run_dir().name, "--failed", check=0)
    assert [r["status"] for r in read_records(home.run_dir())] == ["Success"] * 4
    assert has(home, "hold_began", hold="probe") and has(home, "hold_ended", why="answered")
    home.pitboss("dispatch", refused(home), check=0)
    assert not has(home, "hold_began"), "the account is known to be well again"


def test_a_second_run_tries_refused_credentials_with_one_hand(home):
    home.pitboss("dispatch", refused(home, 1), check=1)
    home.pitboss("dispatch", refused(home), check=1)
    assert len(read_records(home.run_dir())) == 1 and not has(home, "hand_started", 2)
    home.pitboss("dispatch", refused(home), check=1, env={"PITBOSS_DEMO_ACCOUNT": "another"})
    assert not has(home, "hold_began", hold="probe"), "other credentials are another account"


def test_an_answer_from_before_proves_nothing(home):
    """It came before another run was refused; only a later one tells whether the credentials are good again."""
    go = home.root / "go"
    waits = f"$ say hi\n$ run until [ -e {go} ]; do sleep 0.02; done"
    second = home.start("dispatch", write(home, {"w": waits, "n": "$ say x"}, "second.toml", max_parallel=1))
    wait_for(lambda: any(b'"hi"' in log.read_bytes() for log in home.runs.glob("0*/tasks/w/stdout.log")))
    two = home.run_dir()
    home.pitboss("dispatch", refused(home, 1), check=1)
    wait_for(lambda: has(home, "hold_began", run=two, hold="probe"))
    go.touch()
    assert second.wait(30) == 0
    order = [(e["kind"], e.get("actor")) for e in read_events(two)]
    assert order.index(("hand_started", "n")) < order.index(("hold_ended", None))


def test_an_answer_since_proves_it_whoever_got_it(home):
    """A hand that works on and on shows that the provider takes requests: the others need not wait for its end."""
    go = home.root / "go"
    works = f"$ loop 500\n$ say hi\n$ sleep 0.1\n$ run test ! -e {go}\n$ end"
    ends = f"$ run until [ -e {home.root}/one ]; do sleep 0.02; done"
    second = home.start("dispatch", write(home, {"w": works, "v": ends, "n": f"$ run touch {go}"}, "second.toml",
                                          max_parallel=2))
    wait_for(lambda: has(home, "hand_started", 2))
    two = home.run_dir()
    home.pitboss("dispatch", refused(home, 1), check=1)
    wait_for(lambda: has(home, "hold_ended", run=two, why="answered"))
    (home.root / "one").touch()
    wait_for(go.exists)
    order = [(e["kind"], e.get("actor")) for e in read_events(two)]
    assert ("closed", "w") not in order and order.index(("hold_ended", None)) < order.index(("hand_started", "n"))
    second.kill()
    second.wait()


def test_a_resumed_run_tries_refused_credentials_again(home):
    """Its dispatcher died while another hand still worked; somebody asks for it, so perhaps it was mended."""
    go = home.root / "go"
    tasks = {"bad": f"$ auth {home.root}/login", "works": f"$ run until [ -e {go} ]; do sleep 0.02; done",
             **{f"t{n}": f"$ auth {home.root}/login" for n in range(3)}}
    process = home.start("dispatch", write(home, tasks, max_parallel=2))
    wait_for(lambda: has(home, "closed", actor="bad") and has(home, "hand_started", actor="works"))
    process.kill()
    process.wait()
    go.touch()
    (home.root / "login").touch()
    home.pitboss("resume", home.run_dir().name, check=1)
    assert {r["task_id"]: r["status"] for r in read_records(home.run_dir())} == {
        "bad": "Failed", "works": "Success", "t0": "Success", "t1": "Success", "t2": "Success"}


def test_other_accounts_go_on_when_one_is_refused(home):
    tasks = {"bad": "$ auth", "never": "$ say x", **{f"t{n}": "$ say x" for n in range(3)}}
    env = {f"t{n}": {"env": '{ PITBOSS_DEMO_ACCOUNT = "other" }'} for n in range(3)}
    home.pitboss("dispatch", write(home, tasks, max_parallel=1, more=env), check=1)
    assert {r["task_id"]: r["status"] for r in read_records(home.run_dir())} == {
        "bad": "Failed", "t0": "Success", "t1": "Success", "t2": "Success"}


# ------------------------------------------------------------------ without the shared database

def hands_started(run_dir: Path) -> Counter:
    """How often each hand was started."""
    return Counter((e["actor"], e["hand"]) for e in read_events(run_dir) if e["kind"] == "hand_started")


def test_a_broken_database_stops_nothing_and_is_said_once(home):
    path = home.root / "data/pitboss/house.sqlite"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no database\n" * 1000)
    done = home.pitboss("dispatch", write(home, {t: quota(home, 1) for t in "ab"}), check=0)
    assert done.stderr.count("house.sqlite") == 1 and "file is not a database" in done.stderr
    assert check_holds(home.run_dir()) == [] and path.read_bytes() == b"no database\n" * 1000
    assert hands_started(home.run_dir()) == {("a", 1): 1, ("a", 2): 1, ("b", 1): 1, ("b", 2): 1}


def test_a_run_that_meets_nothing_makes_no_database(home):
    home.pitboss("dispatch", write(home, {"a": "$ say x"}), check=0)
    assert not (home.root / "data/pitboss/house.sqlite").exists()


@pytest.mark.parametrize("kind, state, hand_at, may", [
    ("probe", "running", NOW - 5, True), ("probe", "running", NOW, False), ("probe", "dealing", NOW - 5, False),
    ("limit", "running", NOW - 5, False), ("auth", "running", NOW - 5, False)])
def test_a_lead_that_waits_for_who_is_held_does_not_keep_the_one_place(kind, state, hand_at, may):
    """It ran before the hold began; one that was itself started to see how the provider is takes the place."""
    run = pitboss.RunState()
    lead = ACTOR._replace(id="boss", role="lead", state=state, hand_at=hand_at)
    run.actors, run.layers, run.live_by, run.holds = {"boss": lead}, {"boss": None}, {"x": 1}, {"x": hold(kind)}
    assert pitboss.may_start(run, "x") is may
    run.live_by["x"] += 1                          # a worker that runs
    assert pitboss.may_start(run, "x") is False
    assert pitboss.may_start(run, "x", own=1) is may, "that worker is the one that asks"
