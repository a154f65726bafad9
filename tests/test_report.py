"""REPORT: a run as one page that loads nothing, and in the formats of other programs.

The page is read by html.parser, its drawings and the JUnit file by an XML parser, the metrics by the grammar of
Prometheus' text format; none of that is pitboss's own.
"""
from __future__ import annotations

import contextlib
import html.parser
import json
import os
import re
import shutil
import signal
import subprocess
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import pitboss
from rust_runs import RustRun, record
from tools import Home, git, processes_with, read_events, wait_for

NASTY = '"><script>alert(1)</script><img src=//evil.example/x onerror=alert(2)>&amp;'
SECRET = "sk-ant-api03-" + "q" * 24
JOURNALS = sorted((Path(__file__).parent / "data" / "journals").glob("*.jsonl"))
VOID = {"meta", "br", "img", "link", "input", "hr"}
CHROMIUM = os.environ.get("PITBOSS_TEST_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


class Page(html.parser.HTMLParser):
    """A page as a browser takes it apart: its tags, attributes and the text of each element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts = [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.open += [tag] if tag not in VOID else []

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> ends {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        for tag in {*self.open}:
            self.texts[tag] = self.texts.get(tag, "") + data

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def whole_page(text: str) -> Page:
    """A page, checked: it is whole, has no script, and names nothing that a browser would fetch."""
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "object", "embed", "base", "form", "video", "audio"} & set(page.tags)
    assert [n for _, n, _ in page.attributes if n.startswith("on") or n in ("src", "srcset", "action", "background")] == []
    assert all(v.startswith("#") for v in page.values("href") + page.values("xlink:href"))
    assert {v[1:] for v in page.values("href")} <= set(page.values("id")), "a link to nowhere"
    style = page.texts["style"] + "".join(page.values("style"))
    assert "url(" not in style and "@import" not in style and "expression" not in style
    policy = next(v for v in page.values("content") if "default-src" in v)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    for drawing in re.findall(r"<svg.*?</svg>", text, re.S):
        ET.fromstring(drawing)
    return page


def spawning(tool: str, script: str, **more) -> str:
    return f"$ call {tool} {json.dumps({'prompt': script, **more})}"


LEAD = "\n".join((
    f"$ say I begin {NASTY}",
    "$ call request_approval " + json.dumps({"summary": f"May I? {NASTY}", "plan": {"summary": NASTY}}),
    spawning("spawn_sublead", "\n".join((spawning("spawn_worker", "$ write deep.txt deep\n$ commit deep\n$ say deep"),
                                         '$ call wait_for_worker {"task_id": "<<1.task_id>>"}',
                                         "$ say the sub-lead is done")),
             model="demo", budget_usd=1, max_workers=1),
    spawning("spawn_worker", f"$ write new.txt {NASTY}\n$ commit add\n$ write draft.txt x\n$ raw {SECRET}\n$ say done"),
    spawning("spawn_worker", f"$ fail {NASTY}"),
    '$ call wait_actor {"actor_id": "<2.sublead_id>"}',
    '$ call wait_for_worker {"task_id": "<3.task_id>"}',
    '$ call wait_for_worker {"task_id": "<4.task_id>"}',
    f"$ say All is dealt {NASTY}"))
TREE = f"""[run]
name = {json.dumps("night " + NASTY)}
max_workers = 3
budget_usd = 9.0
approval_policy = "auto_approve"
[defaults]
agent = "demo"
[lead]
id = "lead"
directory = "repo"
allow_subleads = true
prompt = {json.dumps(LEAD)}
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """(home, id) of a finished run with a sub-lead, an answered request, unsaved work and rude words everywhere."""
    home = Home(tmp_path_factory.mktemp("tree"))
    home.repo()
    home.pitboss("dispatch", "-q", home.manifest(TREE), check=1)      # one of them fails
    yield home, home.run_dir().name
    home.end_everything()


def page_of(home: Home, run: str, *flags, check: int = 0) -> tuple[Page, str]:
    text = home.pitboss("report", run, "--out", "-", *flags, check=check).stdout
    return whole_page(text), text


def test_a_page_of_a_tree_is_whole_loads_nothing_and_shows_everything(tree):
    home, run = tree
    out = home.root / "night.html"
    done = home.pitboss("report", run[:13], "--out", out, "--diffs", check=0)
    assert done.stdout == f"{out}\n" and out.stat().st_mode & 0o777 == 0o666 & ~os_umask()
    text = out.read_text(encoding="utf-8")
    page = whole_page(text)
    records = json.loads(home.pitboss("status", run, "--json", check=0).stdout)
    names = {a["task_id"] for a in records["actors"]}
    assert len(names) == 5 and {f"actor-{n}" for n in names} <= set(page.values("id"))
    heads = page.texts["h2"]
    assert [h for h, _ in pitboss.PAGE_PARTS if h not in heads] == ["Needs an operator"]
    says = page.texts["body"]
    assert NASTY in says and NASTY in page.texts["title"]
    for words in ("I begin", "May I?", "approved by policy", "All is dealt", "the sub-lead is done", "untracked files",
                  "with all below it", f"+{NASTY}", "Failed", "deep.txt  +1"):
        assert words in says, words
    assert SECRET not in text and "***" in says
    shown = [t for t in re.findall(r"<title>([^<]*)</title></rect>", text)]
    assert {n for n in names if any(f"{n}: running for" in t for t in shown)} == names


def os_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_without_diffs_only_the_files_are_named(tree):
    home, run = tree
    page, _ = page_of(home, run)
    assert "new.txt  +1" in page.texts["body"] and "diff --git" not in page.texts["body"]


def test_without_a_name_the_page_goes_into_the_folder_that_one_is_in(tree):
    home, run = tree
    done = home.pitboss("report", run, check=0)
    assert done.stdout == f"pitboss-{run[:13]}.html\n"
    whole_page((home.root / f"pitboss-{run[:13]}.html").read_text(encoding="utf-8"))


def test_joblog_has_the_columns_of_parallel(tree):
    """Compared with what GNU parallel 20221122 writes: tabs, three digits, ten places for the time it took."""
    home, run = tree
    head, *rows = [line.split("\t") for line in home.pitboss("report", run, "--joblog", check=0).stdout.splitlines()]
    assert head == "Seq Host Starttime JobRuntime Send Receive Exitval Signal Command".split()
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5"] and all(len(row) == 9 for row in rows)
    failed = {a["task_id"] for a in json.loads(home.pitboss("status", run, "--json", check=0).stdout)["actors"]
              if a["status"] == "Failed"}
    for _, host, start, took, sent, got, code, ended_by, command in rows:
        assert host == ":" and re.fullmatch(r"\d{10}\.\d{3}", start) and re.fullmatch(r" *\d+\.\d{3}", took) and len(took) == 10
        name = command.split()[1]
        log = home.runs / run / "tasks" / name / "stdout.log"
        assert (sent, int(got), ended_by) == ("0", log.stat().st_size, "0")
        assert code == ("1" if name in failed else "0"), command
    assert rows[-1][8] == "demo lead", "the last to end is the last"


def test_junit_is_xml_that_counts_what_did_not_succeed(tree):
    home, run = tree
    out = home.root / "junit.xml"
    assert home.pitboss("report", run, "--junit", "--out", out, check=0).stdout == f"{out}\n"
    root = ET.parse(out).getroot()
    suite = root.find("testsuite")
    assert root.tag == "testsuites" and suite.get("name") == "night " + NASTY
    assert {k: suite.get(k) for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": "5", "failures": "1", "errors": "0", "skipped": "0"}
    (failed,) = [case for case in suite.iter("testcase") if case.find("failure") is not None]
    assert NASTY in failed.find("failure").get("message") and failed.find("failure").get("type") == "Failed"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.get("timestamp"))


METRIC = re.compile(r'([a-z_:][a-z0-9_:]*)\{((?:[a-z_]+="(?:[^"\\\n]|\\["\\n])*",?)*)\} (-?[0-9.e+-]+)')


def metrics_of(text: str) -> dict[tuple, float]:
    """Every sample of Prometheus' text format by name and labels; fails on a line that is none."""
    found, typed = {}, set()
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            name = line.split()[2]
            assert name not in typed, "all samples of a metric stand together"
            typed.add(name)
        elif not line.startswith("# HELP "):
            name, labels, value = METRIC.fullmatch(line).groups()
            assert name in typed and (name, labels) not in found
            found[name, labels] = float(value)
    return found


def test_prometheus_reads_the_metrics(tree):
    home, run = tree
    found = metrics_of(home.pitboss("report", run, "--prometheus", check=0).stdout)
    sums = {word: value for (name, labels), value in found.items() if name == "pitboss_run_actors"
            for word in re.findall('status="([^"]+)"', labels)}
    assert sums["Success"] == 4 and sums["Failed"] == 1 and set(pitboss.STATUSES) <= set(sums)
    records = json.loads(home.pitboss("status", run, "--json", check=0).stdout)
    cost = sum(v for (name, _), v in found.items() if name == "pitboss_actor_cost_usd")
    assert cost == pytest.approx(records["total_cost_usd"])
    assert {n for n, _ in found} == {f"pitboss_{name}" for name, *_ in pitboss.METRICS}


@pytest.mark.parametrize("flags, words", [
    (["--junit", "--joblog"], "--junit and --joblog"), (["--junit", "--diffs"], "--diffs"), (["--out", "."], "a folder"),
    (["--out", "no/such/x.html"], "no/such"), (["--out", "/dev/null"], "no regular file")])
def test_what_cannot_be_written_is_refused_in_one_line(tree, flags, words):
    home, run = tree
    done = home.pitboss("report", run, *flags)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and "pitboss:" in done.stderr


def test_a_flat_run_that_goes_on_then_is_dead_then_finished(home):
    home.repo()
    gate = home.root / "gate"
    script = f"$ say hello\n$ run while [ ! -e {gate} ]; do sleep 0.05; done\n$ say through"
    tasks = "".join(f'[[task]]\nid = "{n}"\ndirectory = "repo"\nprompt = {json.dumps(script)}\n' for n in ("a", "b"))
    process = home.start("dispatch", "-q", home.manifest(f'[run]\nmax_parallel = 1\n[defaults]\nagent = "demo"\n{tasks}'))
    wait_for(lambda: home.runs.exists() and any(e["kind"] == "hand_started" for r in home.runs.glob("0*")
                                                if (r / "journal.jsonl").exists() for e in read_events(r)))
    run = home.run_dir().name
    page, _ = page_of(home, run)
    assert "running" in page.texts["dl"] and "Tree" not in page.texts["h2"] and "Pending" in page.texts["table"]
    found = metrics_of(home.pitboss("report", run, "--prometheus", check=0).stdout)
    assert [v for (n, _), v in found.items() if n == "pitboss_run_finished"] == [0]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    page, _ = page_of(home, run)
    assert "stale" in page.texts["dl"] and "pitboss resume" in page.texts["li"]
    assert home.pitboss("report", run, "--joblog", check=0).stdout.count("\n") == 1, "nobody has ended"
    suite = ET.fromstring(home.pitboss("report", run, "--junit", check=0).stdout).find("testsuite")
    assert suite.get("skipped") == "2"
    for pid in processes_with(f"PITBOSS_RUN_ID={run}"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    gate.touch()
    home.pitboss("resume", run, "-q", check=0)
    page, text = page_of(home, run)
    assert "complete" in page.texts["dl"] and "a dispatcher began" in text, "the second one is marked"


def test_a_run_of_the_rust_tool(home):
    home.repo("r")
    path = home.manifest(f'[[task]]\nid = "a"\ndirectory = "{home.root}/r"\nprompt = "x"\n', "rusty.toml")
    rusty = RustRun(home.runs, path, {n: {"directory": str(home.root / "r")} for n in ("a", "b")})
    rusty.begin("a")
    rusty.finish(record("a"), record("b", "Failed"))
    page, text = page_of(home, rusty.path.name, "--diffs")
    assert "a is done." in page.texts["body"] and "a: running for 1m30s" in text
    rows = home.pitboss("report", rusty.path.name, "--joblog", check=0).stdout.splitlines()[1:]
    assert [row.split("\t")[6] for row in rows] == ["0", "1"]


@pytest.mark.parametrize("spoil", ["broken", "gone"])
def test_a_finished_run_without_its_journal_is_told_from_its_records(home, spoil):
    home.repo()
    home.pitboss("dispatch", "-q", home.manifest(
        '[[task]]\nid = "a"\nagent = "demo"\ndirectory = "repo"\nprompt = "$ say hello"\n'), check=0)
    journal = home.run_dir() / "journal.jsonl"
    if spoil == "gone":
        journal.unlink()
    else:
        lines = journal.read_bytes().splitlines(keepends=True)
        journal.write_bytes(b"".join([lines[0], b"{torn\n", *lines[2:]]))
    page, text = page_of(home, home.run_dir().name)
    assert "a: running for" in text and "hello" in page.texts["body"]


def test_an_unknown_run_is_named(home):
    assert "no run 0123" in home.pitboss("report", "0123", check=3).stderr


# ---- without a program: recorded journals and made-up records

def report_of(told: pitboss.Chronicle, actors: list[dict], **head) -> pitboss.Report:
    shown = {"run_id": "01", "name": "n", "mode": "hierarchical", "state": "complete", "tasks_total": len(actors),
             "tasks_failed": 0, "total_cost_usd": None, "tasks_not_started": 0, **head}
    return pitboss.Report(shown, actors, told, [], {}, {}, 1e9, "0")


@pytest.mark.parametrize("path", JOURNALS, ids=lambda path: path.stem)
def test_every_recorded_journal_can_be_drawn(path):
    told = pitboss.read_chronicle(pitboss.read_journal(str(path)), None)
    actors = [pitboss.live_record(told.run, a, "log") for a in told.run.actors.values()]
    report = report_of(told, actors)._replace(requests=list(told.requests.values()))
    whole_page(pitboss.render_page(report))
    ET.fromstring(pitboss.render_junit(report))
    metrics_of(pitboss.render_prometheus(report))
    for name, spans in told.spans.items():
        assert all(s.start <= s.end for s in spans) and [s.end for s in spans[:-1]] == [s.start for s in spans[1:]]
        assert {s.state for s in spans} <= set(pitboss.STATES), name
    if told.spent:
        assert told.spent[-1][1] == pytest.approx(sum(a["cost_usd"] or 0 for a in actors))
        assert told.spent[-1][2] == sum(sum(a["token_usage"].values()) for a in actors)
    assert all(r.answer or r.id in told.run.approvals for r in told.requests.values())


def test_a_span_lasts_from_one_state_to_the_next():
    events = [{"kind": "run_opened", "run_id": "r", "name": "n", "mode": "flat", "max_parallel": 1},
              {"kind": "actor_added", "actor": "a", "role": "task", "agent": "demo", "model": "m", "directory": "/",
               "use_worktree": False, "timeout_s": 9, "branch": None, "format": "claude", "account": ""},
              {"kind": "dispatcher_started", "pid": 1},
              {"kind": "hand_dealt", "actor": "a", "hand": 1, "session_id": "s", "how": "prompt", "log_at": 0,
               "message_id": "m"},
              {"kind": "hand_started", "actor": "a", "hand": 1, "handle": {}},
              {"kind": "usage", "actor": "a", "hand": 1, "usage": [10, 5, 0, 0], "cost_usd": 0.5},
              {"kind": "hand_ended", "actor": "a", "hand": 1, "code": None, "signal": 9, "usage": [20, 5, 0, 0],
               "cost_usd": 0.75, "lived_s": 2, "final": "x", "status": "Failed", "reason": None}]
    told = pitboss.read_chronicle([{"seq": n, "at": 100.0 + n, **e} for n, e in enumerate(events)], 200.0)
    assert [(s.start, s.end) for s in told.spans["a"] if s.state == "running"] == [(104.0, 106.0)]
    assert told.spans["a"][-1].end == 200.0, "what has not settled goes on"
    assert told.spent == [(105.0, 0.5, 15), (106.0, 0.75, 25)] and told.signals == {"a": 9}


def made_up(name: str, status: str | None, **more) -> dict:
    return pitboss.read_record({**record(name, status), "role": "task", "cost_usd": 0.1, **more}) | {"state": "Running"}


@pytest.mark.parametrize("status, code, told, exitval", [
    ("Success", 0, 0, "0"), ("Failed", 7, 0, "7"), ("Failed", None, 9, "0"), ("TimedOut", 0, 0, "-1"),
    ("Cancelled", None, 15, "0"), ("ApprovalRejected", 0, 0, "-1")])
def test_who_did_not_succeed_is_never_a_zero_without_a_signal(status, code, told, exitval):
    chronicle = pitboss.Chronicle()
    chronicle.signals["a"] = told
    row = pitboss.render_joblog(report_of(chronicle, [made_up("a", status, exit_code=code)])).splitlines()[1].split("\t")
    assert (row[6], row[7]) == (exitval, str(told))


@pytest.mark.parametrize("status", [*pitboss.STATUSES, None, "FromTomorrow"])
def test_every_status_has_its_element_in_junit(status):
    root = ET.fromstring(pitboss.render_junit(report_of(pitboss.Chronicle(), [made_up("a", status)])))
    (case,) = root.iter("testcase")
    found = {child.tag for child in case} & {"failure", "error", "skipped"}
    wanted = {"Success": set(), None: {"skipped"}, "SpawnFailed": {"error"}}.get(status, {"failure"})
    assert found == wanted
    assert sum(int(root.get(k)) for k in ("failures", "errors", "skipped")) == len(wanted)


def test_what_xml_cannot_hold_is_left_out():
    rude = "a\x00b\x1b[31mc\ud800d\ufffe\u2028<&>'\""
    text = pitboss.render_junit(report_of(pitboss.Chronicle(), [made_up("a", "Failed", final_message=rude)], name=rude))
    assert ET.fromstring(text.encode("utf-8")).find("testsuite").get("name") == "ab[31mcd\u2028<&>'\""
    whole_page(pitboss.render_page(report_of(pitboss.Chronicle(), [made_up("a", "Failed", final_message=rude)], name=rude)))
    metrics_of(pitboss.render_prometheus(report_of(pitboss.Chronicle(), [made_up('a\n"\\', "Failed")])))


def test_no_word_of_an_agent_becomes_a_tag():
    """Every text that a page shows, all of them rude."""
    told = pitboss.Chronicle()
    told.spans["a"] = [pitboss.Span(NASTY, 1.0, 2.0)]
    told.moments = [pitboss.Moment("a", 1.5, "reprompted")]
    reason = {"kind": NASTY, "message": NASTY}
    texts = {k: NASTY for k in ("branch", "worktree_path", "worktree_kept", "rescue_ref", "claude_session_id", "agent",
                                "model", "role", "final_message", "final_message_preview")}
    odd = {**made_up(NASTY, NASTY, failure_reason=reason, parent_task_id="a", **texts)}
    work = {"a": NASTY, "b": NASTY, "files": [{"path": NASTY, "added": 1, "removed": None}], "note": NASTY, "patch": NASTY}
    asked = pitboss.Request(NASTY, NASTY, NASTY, NASTY, NASTY, 1.0, 2.0, NASTY)
    head = {k: NASTY for k in ("run_id", "name", "state")}
    report = report_of(told, [made_up("a", "Success"), odd], **head)._replace(
        requests=[asked], logs={NASTY: [(">", NASTY)]}, changes={NASTY: work}, version=NASTY, needs=(NASTY,))
    page = whole_page(pitboss.render_page(report))
    assert page.texts["body"].count("<script>") >= 20


def test_a_circle_of_parents_is_drawn_and_ends():
    actors = [made_up("a", "Failed", parent_task_id="b"), made_up("b", "Failed", parent_task_id="a")]
    whole_page(pitboss.render_page(report_of(pitboss.Chronicle(), actors)))


def test_a_long_difference_is_cut_and_says_so(home):
    import asyncio

    repo = home.repo()
    (repo / "big.txt").write_text("line\n" * 5000)
    git(repo, "add", "-A")
    git(repo, "commit", "-qm", "big")
    patch = asyncio.run(pitboss.Git(home.env, 0o077).show_changes(str(repo / ".git"), "HEAD~1", "HEAD", 1000))
    assert len(patch) < 1100 and re.search(r"… and \d+ bytes more$", patch)


@pytest.mark.real
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: install one, or name it in PITBOSS_TEST_CHROMIUM")
@pytest.mark.slow
def test_a_browser_shows_the_page_from_disk(tree, tmp_path):
    """Chromium draws it, complains of nothing, and runs nothing of what agents said."""
    home, run = tree
    page = tmp_path / "page.html"
    home.pitboss("report", run, "--diffs", "--out", page, check=0)
    argv = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
            "--enable-logging=stderr", "--v=0", "--window-size=1200,2000", f"--screenshot={tmp_path}/page.png", page.as_uri()]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=100)
    assert (tmp_path / "page.png").stat().st_size > 20_000, done.stderr
    assert not re.search(r"CONSOLE|Refused to|ERR_", done.stderr), done.stderr
