"""Golden folders: what programs of each journal format left, and what each of them holds, said by hand.

tests/data/golden/FORMAT/NAME was written by the program that wrote that format (tests/record_golden.py says how one
is recorded) and never changes.  What it holds stands below, taken from its agents' logs and the price table by hand,
not from what a program answers: haiku costs 1 USD a million tokens of input and 5 of output.  To add a folder, record
it and add its line to GOLDEN; a test fails for a folder without one, and for a reading command that is not tried.
"""
from __future__ import annotations

import json
import os
import shutil
import sqlite3
import xml.etree.ElementTree
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple

import pitboss
import test_runs
from pit_desk import Pit
from rust_runs import RUN, RustRun, record
from tools import Home, read_records

FOLDERS = Path(__file__).resolve().parent / "data" / "golden"
RECORDED_IN = "/home/me"       # what stands in a golden folder for the folder of its user


class Actor(NamedTuple):
    """What is known of one actor: tokens of its agent's results, and the last line that its log shows."""
    status: str
    input: int
    output: int
    micro_usd: int | None
    last: str
    role: str = "task"
    parent: str | None = None
    cached: int = 0            # tokens read from the cache: of haiku 0.10 USD a million


class Kept(NamedTuple):
    """What is known of a run: costs in millionths of a dollar, `told` as a watcher hears it first.

    `settled_usd` is what its hands that ended cost, which `list` and the floor tell; `micro_usd` has also what is
    estimated of hands at work, from their logs.
    """
    mode: str
    state: str
    settled_usd: int
    micro_usd: int
    failed: int
    waiting: int
    told: str
    actors: dict[str, Actor]

    def settled(self) -> dict[str, Actor]:
        return {name: a for name, a in self.actors.items() if a.status not in ("Running", "Pending")}


GOLDEN = {
    "1/flat": Kept("flat", "complete", 1200, 1200, 2, 0, "complete: 4 settled; 2 failed", {
        "good": Actor("Success", 300, 77, 685, "v done ($0.0007)"),
        "bad": Actor("Failed", 100, 7, 135, "! it did not work ($0.0001)"),
        "late": Actor("TimedOut", 0, 0, 0, ""),
        "draft": Actor("Success", 200, 36, 380, "v kept ($0.0004)")}),
    "1/tree": Kept("hierarchical", "complete", 3670, 3670, 2, 0, "complete: 5 settled; 2 failed", {
        "boss": Actor("Success", 800, 283, 2215, "v done ($0.0022)", "lead"),
        "worker-1": Actor("Success", 200, 15, 275, "v worked ($0.0003)", "worker", "boss"),
        "sublead-1": Actor("Success", 400, 102, 910, "v sub done ($0.0009)", "sublead", "boss"),
        "worker-2": Actor("Failed", 100, 7, 135, "! no ($0.0001)", "worker", "sublead-1"),
        "worker-3": Actor("Cancelled", 100, 7, 135, "", "worker", "boss")}),
    "1/cut": Kept("flat", "stale", 270, 575, 0, 2, "stale: 2 waiting, 1 running, 1 settled; 0 failed", {
        "first": Actor("Success", 200, 14, 270, "v one ($0.0003)"),
        "second": Actor("Running", 200, 21, 305, '* Bash {"command": "test -e ../go || sleep 600"'),
        "third": Actor("Pending", 0, 0, None, ""),
        "fourth": Actor("Pending", 0, 0, None, "")}),
}


# ---- what each reading command has to say of a run

def dollars(micro_usd: int) -> str:
    return f"${micro_usd / 1e6:.4f}"


def shown_cost(micro_usd: int) -> str:
    return dollars(micro_usd) if micro_usd else "-"


def check_table(kept: Kept, text: str) -> None:
    """A line for each actor, with its status and what it cost; above them the state of the run and its cost."""
    head, *lines = text.splitlines()
    assert {kept.state, kept.mode, shown_cost(kept.micro_usd)} <= set(head.split()), head
    for name, actor in kept.actors.items():
        cells, = [line.split() for line in lines if name in line.split()[:2] and not line.startswith("kept ")]
        assert actor.status in cells, f"{name}: {cells}"
        assert actor.micro_usd is None or dollars(actor.micro_usd) in cells, f"{name}: {cells}"


def check_row(kept: Kept, row: dict, micro_usd: int) -> None:
    """What status and list say of the whole run."""
    said = (row["mode"], row["state"], round((row["total_cost_usd"] or 0) * 1e6), row["tasks_total"], row["tasks_failed"],
            row["tasks_not_started"], row["agents_alive"])
    want = (kept.mode, kept.state, micro_usd, len(kept.actors), kept.failed, kept.waiting, 0)
    assert said == want, f"{said}, not {want}"


def facts_of(record: dict) -> tuple:
    usage, cost = record["token_usage"], record["cost_usd"]
    assert usage["cache_creation"] == 0, usage
    return (record["status"], usage["input"], usage["output"], usage["cache_read"], record["role"],
            record["parent_task_id"], None if cost is None else round(cost * 1e6))


def check_status(kept: Kept, text: str) -> None:
    """Statuses, tokens, costs and parents, exactly; one that has not settled has no status yet."""
    shown = json.loads(text)
    check_row(kept, shown, kept.micro_usd)
    rows = {a["task_id"]: a for a in shown["actors"]}
    assert set(rows) == set(kept.actors), set(rows)
    for name, a in kept.actors.items():
        want = (a.status if name in kept.settled() else None, a.input, a.output, a.cached, a.role, a.parent, a.micro_usd)
        assert facts_of(rows[name]) == want, f"{name}: {facts_of(rows[name])}, not {want}"


def check_list(kept: Kept, text: str) -> None:
    row, = json.loads(text)
    check_row(kept, row, kept.settled_usd)


def check_watch(kept: Kept, text: str) -> None:
    begin, *needs = map(json.loads, text.splitlines())
    assert begin["event"] == "begin" and begin["text"].endswith(kept.told), begin
    want = {n for n, a in kept.actors.items() if a.status in ("Failed", "TimedOut")} if kept.state == "complete" else {None}
    assert {n["need"]["actor"] for n in needs if n["event"] == "attention"} == want, needs


def check_screenshot(kept: Kept, text: str) -> None:
    for name, actor in kept.actors.items():
        assert any(name in line and actor.status in line for line in text.splitlines()), f"{name} is not shown as it is"
    assert dollars(kept.settled_usd) in text and kept.state in text.splitlines()[0], text


def check_diff(kept: Kept, text: str) -> None:
    good = sum(a.status == "Success" for a in kept.actors.values())
    assert f"{good} of {len(kept.actors)} good" in text, text
    for name, a in kept.settled().items():
        cells, = [line.split() for line in text.splitlines() if line.split()[:1] == [name] and a.status in line]
        assert cells.count(a.status) == 2 and (a.micro_usd is None or cells.count(dollars(a.micro_usd)) == 2), cells


def check_page(kept: Kept, text: str) -> None:
    assert text.lower().startswith("<!doctype html>") and text.rstrip().endswith("</html>") and "<svg" in text, text[:200]
    assert not kept.micro_usd or dollars(kept.micro_usd) in text, "the cost is not told"
    for name, actor in kept.actors.items():
        assert name in text and actor.status in text, f"{name} is not told"


def check_junit(kept: Kept, text: str) -> None:
    cases = {c.get("name"): c for c in xml.etree.ElementTree.fromstring(text).iter("testcase")}
    assert set(cases) == set(kept.actors), set(cases)
    wrong = {name for name, case in cases.items() if case.find("failure") is not None}
    assert wrong == {n for n, a in kept.settled().items() if a.status != "Success"}, wrong


def check_joblog(kept: Kept, text: str) -> None:
    rows = [line.split("\t") for line in text.splitlines()[1:]]
    good = {row[-1].split()[-1] for row in rows if row[6] == "0"}
    assert {row[-1].split()[-1] for row in rows} == set(kept.settled()), rows
    assert good == {n for n, a in kept.actors.items() if a.status == "Success"}, good


def check_prometheus(kept: Kept, text: str) -> None:
    told = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    count = {head.rpartition('status="')[2].rstrip('"}'): int(value) for head, _, value in told
             if head.startswith("pitboss_run_actors{")}
    assert {k: v for k, v in count.items() if v} == Counter(a.status for a in kept.actors.values()), count
    costs = [round(float(value) * 1e6) for head, _, value in told if head.startswith("pitboss_run_cost_usd{")]
    assert costs == ([kept.micro_usd] if kept.micro_usd else []), costs


def holds(words: str) -> Callable[[Kept, str], None]:
    def check(kept: Kept, text: str) -> None:
        assert words in text, f"{words!r} is not in {text!r}"
    return check


def says_state(kept: Kept, text: str) -> None:
    assert kept.state in text.split(), text


def check_prune(kept: Kept, text: str) -> None:
    assert (kept.state in text.split()) == (kept.state == "stale"), text


class Look(NamedTuple):
    """A command line that only reads, RUN standing for the run, and what its standard output must hold."""
    words: str
    check: Callable[[Kept, str], None]


LOOKS = (
    Look("status RUN", check_table),
    Look("status RUN --json", check_status),
    Look("list", says_state),
    Look("list --json", check_list),
    Look("tree manifest.toml", holds("worst")),
    Look("watch RUN --until attention --timeout 30 --json", check_watch),
    Look("floor screenshot RUN --cols 160 --rows 50", check_screenshot),
    Look("floor list --json", check_list),
    Look("diff RUN RUN", check_diff),
    Look("report RUN --out -", check_page),
    Look("report RUN --junit", check_junit),
    Look("report RUN --joblog", check_joblog),
    Look("report RUN --prometheus", check_prometheus),
    Look("approvals RUN --json", holds("[]")),
    Look("policy RUN", holds("block")),
    Look("prune", check_prune),
)
OTHERS = {     # commands that read no run; attach is tried with every actor, status --rebuild and resume on a copy
    "validate", "dispatch", "cancel", "pause", "continue", "reprompt", "approve", "reject", "demo", "doctor", "init",
    "schema", "agents-md", "man", "completions", "install", "pit", "version", "reference", "complete", "deal",
    "mcp-bridge", "demo-agent", "resume", "attach"}


# ---- a golden folder put where it can be opened

def put_back(home: Home, name: str) -> Path:
    """A golden data folder on a user's machine, whose paths it names; its run folder, or that of its session."""
    data = home.root / "data" / "pitboss"
    shutil.copytree(FOLDERS / name, data, dirs_exist_ok=True)
    here = json.dumps(os.uname().nodename)
    for path in filter(Path.is_file, data.rglob("*")):
        path.write_text(path.read_text().replace(RECORDED_IN, str(home.root)).replace('"host":"host"', f'"host":{here}'))
    place, = [p for p in (*data.glob("runs/[!.]*"), *data.glob("pit/*"))]
    return place


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def look(home: Home, *words: Any, check: int = 0) -> str:
    """The standard output of a command that has to work, without a word about something that broke."""
    done = home.pitboss(*words)
    assert done.returncode == check, f"{words}: exit {done.returncode}, {done.stdout[-500:]} {done.stderr[-500:]}"
    assert "Traceback" not in done.stderr, f"{words}: {done.stderr[-800:]}"
    return done.stdout


def look_at_all(home: Home, kept: Kept, run_id: str, looks: Iterable[Look]) -> None:
    """Each of these commands says of a run what is known of it."""
    for row in looks:
        text = look(home, *[run_id if word == "RUN" else word for word in row.words.split()])
        try:
            row.check(kept, text)
        except (AssertionError, ValueError, KeyError, TypeError) as error:
            raise AssertionError(f"{row.words}: {type(error).__name__} {error}") from error


def open_run(home: Home, name: str) -> None:
    """Every reading command says of a golden run what is known of it, and leaves it as it was."""
    kept, run = GOLDEN[name], put_back(home, name)
    shutil.copyfile(run / "manifest.snapshot.toml", home.root / "manifest.toml")
    home.repo("repo", 1)
    before = contents(run)
    look_at_all(home, kept, run.name, LOOKS)
    for actor in [n for n, a in kept.actors.items() if a.status != "Pending"]:
        text = look(home, "attach", run.name, actor)
        last = kept.actors[actor].last
        assert not last or text.splitlines()[-1].startswith(last), f"attach {actor}: {text}"
    assert contents(run) == before, "something was written into it"
    rebuild(home, run)


def rebuild(home: Home, run: Path) -> None:
    """The records are written anew from the journal, and say what they said; keys of later programs may come."""
    old = read_records(run)
    (run / "summary.jsonl").unlink()
    look(home, "status", run.name, "--rebuild")
    new = read_records(run)
    assert [{k: record.get(k) for k in was} for was, record in zip(old, new, strict=True)] == old, "records differ"


def go_on(home: Home, name: str) -> None:
    """A golden run that was cut off is resumed: what is done stays, what was at work goes on in its session.

    The copy of the program that a run folder has is not kept in golden ones: this program's stands in its place.
    """
    kept, run = GOLDEN[name], put_back(home, name)
    assert kept.state == "stale"
    home.repo("repo", 1)
    pitboss.pin_self(str(run))
    (home.root / "go").touch()          # what its second task waited for
    was, = read_records(run)
    look(home, "resume", "-q", run.name, check=1)
    records = {r["task_id"]: r for r in read_records(run)}
    assert {n: r["status"] for n, r in records.items()} == {
        "first": "Success", "second": "Success", "third": "Success", "fourth": "Failed"}, records
    assert records["first"] == was, "what had ended was done again"
    session, = {e["session_id"] for e in pitboss.read_journal(str(run / "journal.jsonl"))
                if e["kind"] == "hand_dealt" and e["actor"] == "second"}
    assert (records["second"]["claude_session_id"], records["second"]["hands"]) == (session, 2)
    assert records["second"]["final_message"] == "two" and records["third"]["final_message"] == "three"
    shown = json.loads(look(home, "status", run.name, "--json"))
    assert (shown["state"], shown["tasks_failed"], shown["tasks_not_started"]) == ("complete", 1, 0)


def deal_failed(home: Home, name: str) -> None:
    """What did not succeed in a golden run that came to its end is dealt as a new run, in its old worktrees' place."""
    kept, run = GOLDEN[name], put_back(home, name)
    home.repo("repo", 1)
    before = contents(run)
    look(home, "resume", "-q", "--failed", run.name, check=1)
    new = home.run_dir()
    after = {name: data for name, data in contents(run).items() if not name.startswith("worktrees/")}
    assert new != run and after == before, [n for n in {*after, *before} if after.get(n) != before.get(n)]
    dealt = {r["task_id"] for r in read_records(new)}
    assert dealt == {n for n, a in kept.actors.items() if a.status in ("Failed", "TimedOut")}, dealt


# ---- folders of the Rust tool

DONE = Actor("Success", 1000, 2000, 12000, "", cached=10000)       # what rust_runs.record says of each
WORKER = DONE._replace(role="worker", parent="boss", micro_usd=None)     # its record names no model
WAITS = Actor("Pending", 0, 0, None, "")
RUST = {
    "finished": Kept("flat", "complete", 24000, 24000, 1, 0, "", {"a": DONE, "b": DONE._replace(status="Failed")}),
    "joined": Kept("flat", "stale", 24000, 24000, 1, 0, "", {"a": DONE, "b": DONE._replace(status="TimedOut")}),
    "half": Kept("flat", "stale", 12000, 12000, 1, 1, "", {"a": DONE._replace(status="Failed"), "b": WAITS}),
    "begun": Kept("flat", "stale", 0, 632, 0, 1, "", {
        "a": Actor("Running", 582, 10, 632, "v hello world ($0.0006)"), "b": WAITS}),
    "empty": Kept("flat", "aborted", 0, 0, 0, 2, "", {"a": WAITS, "b": WAITS}),
    "led": Kept("hierarchical", "stale", 0, 0, 1, 1, "", {
        "boss": WAITS._replace(role="lead"), "w1": WORKER, "w2": WORKER._replace(status="Failed")}),
}
NOT_OF_RUST = ("watch", "policy")        # there is no journal to follow, and nobody to give rules to


def leave_rust_run(home: Home, state: str) -> RustRun:
    """A folder as the Rust tool leaves it in one of the states of RUST, an hour ago."""
    kept, led = RUST[state], state == "led"
    more: dict = {"tasks": (), "lead": {"id": "boss", "directory": "/", "model": "claude-haiku-4-5"},
                  "text": '[run]\nmax_workers = 2\nbudget_usd = 1.0\n[[lead]]\nid = "boss"\ndirectory = "r"\n'
                          'prompt = "x"\n'} if led else {}
    run = test_runs.rust(home, **more)
    records = [record(name, actor.status, **({"parent_task_id": "boss"} if led else {}))
               for name, actor in kept.settled().items()]
    if state == "begun":
        run.begin("a")
    if state == "finished":
        run.finish(*records)
    else:
        run.settle(*records, joined=state in ("joined", "led"))
    run.age(3600)
    return run


def open_rust_run(home: Home, state: str) -> None:
    """A folder of the Rust tool is shown as it was left, compared, reported, and dealt again as a new run."""
    env, seen = test_runs.stand_in(home)
    home.env.update(env)
    kept, run = RUST[state], leave_rust_run(home, state)
    shutil.copyfile(run.path / "manifest.snapshot.toml", home.root / "manifest.toml")
    before = run.contents()
    look_at_all(home, kept, RUN, [row for row in LOOKS if row.words.split()[0] not in NOT_OF_RUST])
    for name in kept.settled().keys() - {"boss"}:
        look(home, "attach", RUN, name)
    for words in NOT_OF_RUST:
        done = home.pitboss(words, RUN, check=4)
        assert "another tool" in done.stderr, done.stderr
    if state != "led":
        look(home, "resume", "-q", RUN)
        assert sorted(os.listdir(seen)) == ["a", "b"], "not every task was dealt again"
    assert run.contents() == before, "something was written into it"


# ---- ticket loops

def put_session_back(home: Home, name: str) -> Pit:
    """A project with the golden session of a ticket loop, and its tickets."""
    pit = Pit(home)
    folder = put_back(home, name)
    folder.rename(pitboss.session_folder(str(pit.repo), home.env))
    script = home.root / "data" / "pitboss" / "tickets.sql"
    (pit.repo / ".git/pitboss").mkdir(exist_ok=True)
    with closing(sqlite3.connect(pit.repo / ".git/pitboss/tickets.db")) as db:
        db.executescript(script.read_text())
    return pit


TICKETS = {"repo-auth.1": "closed", "repo-auth.2": "closed", "repo-pay.1": "in_progress", "repo-pay.2": "open"}


def open_session(home: Home, name: str) -> None:
    """Every reading command of the ticket loop tells what is known: one epic is done, one waits for an answer."""
    pit = put_session_back(home, name)
    before = contents(pit.folder)
    shown = pit.pit("status")
    assert shown["daemon"] == {"running": False, "pid": None} and pit.pit("daemon", "status")["running"] is False
    assert {n: (e["state"], e["progress"], e["reason"], e["ticket"]) for n, e in shown["epics"].items()} == {
        "auth": ("done", "2/2", None, None), "pay": ("paused", "0/2", "NEEDS_HUMAN_INPUT: Which file?", "repo-pay.1")}
    usage = shown["epics"]["auth"]["usage"]
    assert (usage["input"], usage["output"]) == (600, 6), usage         # 300 and 3 of each conversation
    assert [t["state"] for t in pit.status("auth")["tickets"]] == ["closed", "closed"]
    assert [t["state"] for t in pit.status("pay")["tickets"]] == ["working", "todo"]
    snapshot, = pit.watch("settled", 5)
    assert {n: e["state"] for n, e in snapshot["epics"].items()} == {"auth": "done", "pay": "paused"}
    assert "git commit -m \"work 2\"" in pit.pit("log", "auth")["output"] and pit.pit("log", "pay")["source"] == "file"
    assert pit.statuses() == TICKETS and pit.pit("ticket", "ready") == []
    assert pit.pit("ticket", "show", "repo-pay.2")["dependencies"][-1]["depends_on_id"] == "repo-pay.1"
    exported = pit.pit("ticket", "export")
    assert {t["id"]: t["status"] for t in exported if t["issue_type"] == "task"} == TICKETS
    assert pit.pit("cleanup")["removed"] == [], "it is gone though it holds an epic that waits"
    assert contents(pit.folder) == before, "something was written into it"


def answer_session(home: Home, name: str) -> None:
    """The epic that waited is given its ticket again, answered, and worked to its end; the other one stays done."""
    pit = put_session_back(home, name)
    try:
        assert pit.pit("resume", "pay")["changed"]
        pit.watch("paused", 50, "--epics", "pay")
        assert pit.pit("resume", "pay", "--message", "$ write l.txt 1\n$ commit left")["changed"]
        pit.watch("done", 50, "--epics", "pay")
        assert set(pit.statuses().values()) == {"closed"} and pit.commits("pit/pay") == ["left", "work 4"]
        assert {n: e["progress"] for n, e in pit.status()["epics"].items()} == {"auth": "2/2", "pay": "2/2"}
    finally:
        pit.end()


class Play(NamedTuple):
    """One thing done with a golden folder, and whether it needs tmux."""
    name: str
    run: Callable[[Home, str], None]
    needs_tmux: bool = False


PLAYS = (*(Play(name, open_run) for name in GOLDEN), *(Play(state, open_rust_run) for state in RUST), Play("1/cut", go_on), Play("1/flat", deal_failed),
         Play("1/tickets", open_session), Play("1/tickets", answer_session, True))
