"""HANDBOOK: it is whole and small, its manifests do what they say, its statements about safety have tests.

A worked manifest is run as it stands, but for the agent: the scripted one takes the place of claude, and to
each prompt a script is added that plays the agent's part.
"""
from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pitboss
from json_schema import faults
from tools import PITBOSS, PYTHON, ROOT, git, processes_with, program, read_events, read_records, wait_for

COMMAND_PAIRS = [(call, what) for call, what, _ in pitboss.typed_commands()]
TOLD = dict(pitboss.handbook_commands())
HANDBOOK = pitboss.render_handbook(TOLD.items(), pitboss.names_aside())
WORKED = {w.name: w for w in pitboss.WORKED}
FENCED = re.findall(r"```toml\n(.*?)```", HANDBOOK, re.S)
TESTS = ROOT / "tests"


# ---- the text

def test_the_handbook_fits_and_says_its_name_and_version(home):
    text = home.pitboss("agents-md", check=0).stdout
    assert text == HANDBOOK and len(text.encode()) < pitboss.HANDBOOK_LIMIT == 30_000
    assert "test_" not in text, "the README says what tests it"
    front = re.match(r"---\n(.*?)\n---\n\n# ", text, re.S)[1]
    told = dict(line.split(": ", 1) for line in front.splitlines())
    assert told["name"] == "pitboss" and told["version"] == pitboss.VERSION and len(told["description"]) > 50


def all_fields():
    fields = [f for table, _, _ in pitboss.TABLES.values() for f in table]
    return fields + [g for f in fields for g in f.fields]


def test_it_has_every_key_tool_code_status_command_and_agent():
    words = [f"`{n}`" for f in all_fields() for n in (f.name, *f.also)]
    words += [f"- `{n}`" for n in (*pitboss.STATUSES, *pitboss.AGENTS)] + [f"- `{n}(" for n in pitboss.TOOLS]
    words += [f"- {code}: " for code, _ in pitboss.EXIT_CODES.values()]
    words += [f"- `{call}`: {what}" for call, what in TOLD.items()] + [f"`{k}`" for k in pitboss.FAILURE_KINDS]
    words += [f"`{call}`" for call in pitboss.names_aside()]
    words += [f"`{pitboss.header_of(name)}`" for name in pitboss.TABLES] + [f"`{w}`" for w, _ in pitboss.REFUSALS]
    assert [w for w in words if w not in HANDBOOK] == []


def test_each_command_is_told_with_its_flags_or_named_aside():
    shown = {c.name for c in pitboss.COMMANDS.values() if c.help}
    told, aside = {call.split()[0] for call in TOLD}, {call.split()[0] for call in pitboss.names_aside()}
    assert told | aside == shown and not told & aside and len(aside) >= 3
    assert all(any(f"[{flag}" in call for call in TOLD) for flag in pitboss.TOLD_FLAGS)
    for wanted in ("dispatch MANIFEST [--dry-run] [--background]", "resume RUN [--failed]", "tree MANIFEST [--check USD]",
                   "watch RUN [--until attention|done] [--timeout TIME] [--since SEQ]"):
        assert wanted in TOLD


def test_the_short_names_of_models_are_those_with_a_price_from_the_cheap_to_the_strong():
    (field,) = [f for f in pitboss.ACTOR_FIELDS if f.name == "model"]
    named = re.findall(r"`(\w+)` \((\w+)\)", field.help)
    by_price = sorted(pitboss.PRICES, key=lambda name: pitboss.PRICES[name][1])
    assert named == list(zip(by_price, ("cheap", "usual", "strong")))
    assert pitboss.find_price(field.default) == pitboss.PRICES[by_price[1]]


def test_commands_and_flags_that_it_speaks_of_exist():
    spoken = re.findall(r"`([a-z][a-z-]+)((?: (?:--?[a-z-]+|[A-Z]+|[a-z|]+))*)`", HANDBOOK.partition("## pit:")[0])
    used = {(verb, flags) for verb, flags in spoken if re.search(r" (--|[A-Z]\b|RUN)", flags)}
    assert len(used) >= 8
    for verb, flags in used:
        known = {n for names, _ in pitboss.COMMANDS[verb].args for n in names}
        assert set(re.findall(r"--[a-z-]+", flags)) <= known, (verb, flags)


def raised_texts() -> list[str]:
    """How each ToolRefusal that the code raises begins, with … for what is filled in."""
    kinds = [n for n, k in vars(pitboss).items() if isinstance(k, type) and issubclass(k, pitboss.ToolRefusal)]
    parts = re.split(r"(?m)^(?=(?:async )?def |class )", PITBOSS.read_text(encoding="utf-8"))
    trees = [ast.parse(part) for part in parts if re.search(rf"\b({'|'.join(kinds)})\(", part)]
    found = []
    for call in (n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call)):
        if getattr(call.func, "id", "") in kinds and call.args:
            text = call.args[0].values if isinstance(call.args[0], ast.JoinedStr) else [call.args[0]]
            found.append("".join(p.value if isinstance(p, ast.Constant) else "…" for p in text))
    return found


def row_of(text: str) -> str:
    """The row of REFUSALS that a refusal belongs to: the longest that it begins with, up to the row's last `…`."""
    arguments = {f.name for t in pitboss.TOOLS.values() for f in t.fields} | {"…"}
    known = [words for words, _ in pitboss.REFUSALS if text.startswith(words.removesuffix("…"))]
    if not known and text.partition(":")[0] in arguments:
        known = ["ARGUMENT: …"]
    return max(known, key=len, default=f"no row for: {text}")


def test_every_refusal_has_its_row_and_every_row_its_refusal():
    texts = raised_texts()
    assert len(texts) > 20
    found = {row_of(text) for text in texts}
    assert found == {words for words, _ in pitboss.REFUSALS}


# ---- the worked manifests

SHARED = '$ call kv_get {"path": "/ref/rules"}\n' \
         '$ call lease_acquire {"name": "database", "ttl_secs": 300, "wait_secs": 600}\n' \
         '$ run basename $PWD >>../../turns; basename $PWD >>../../turns\n' \
         '$ call lease_release {"lease_id": "<<2.lease_id>>"}\n' \
         '$ call kv_set {"path": "/shared/%s", "value": "%s is migrated"}\n$ say migrated'
SUB = '$ call kv_get {"path": "/ref/goal"}\n' \
      '$ call spawn_worker {"prompt": "$ write %s.txt x\\n$ commit x\\n$ say done"}\n' \
      '$ call wait_for_worker {"task_id": "<<2.task_id>>"}\n$ say %s is done'


def spawn(prompt: str, tool: str = "spawn_worker", **more) -> str:
    return f"$ call {tool} {json.dumps({'prompt': prompt, **more})}"


SCRIPTS = {
    # manifest: {actor or template: what its agent does}
    "parallel": {n: f"$ write {n}.py x\n$ commit {n}\n$ say done" for n in ("types", "docs")},
    "template": {"review": "$ write reviews/{name}.md wrong in {path}\n$ commit reviewed\n$ say done"},
    "in-turn": {"upgrade": "$ fail the tests do not pass", "clean": "$ write never.txt x"},
    "isolation": {"sqlite": "$ write store.db half done\n$ say tried", "review": "$ run pwd\n$ say it does not"},
    "any-program": {},
    "lead": {"lead": "\n".join([spawn("$ write tests/a.py x\n$ commit a\n$ say a passes"),
                                spawn("$ fail no runner"), '$ call wait_for_any {"task_ids": ["<1.task_id>", '
                                '"<2.task_id>"]}', '$ call wait_for_worker {"task_id": "<1.task_id>"}',
                                '$ call wait_for_worker {"task_id": "<2.task_id>"}',
                                "$ run git merge -q pitboss/*/worker-1 || git merge -q $(git branch --list "
                                "'pitboss/*/worker-1' --format='%(refname)')", "$ write REPORT.md one of two",
                                "$ commit report", "$ say reported"])},
    "leases": {"lead": "\n".join(['$ call kv_set {"path": "/ref/rules", "value": "one at a time"}',
                                  *(spawn(SHARED % (n, n)) for n in ("a", "b")),
                                  '$ call wait_for_worker {"task_id": "<2.task_id>"}',
                                  '$ call wait_for_worker {"task_id": "<3.task_id>"}',
                                  '$ call kv_list {"glob": "/shared/*"}', "$ say both are there"])},
    "depth-two": {"root": "\n".join([*(spawn(SUB % (n, n), "spawn_sublead", model="demo", initial_ref={"goal": n})
                                       for n in ("server", "client")),
                                     '$ call wait_actor {"actor_id": "<1.sublead_id>"}',
                                     '$ call wait_actor {"actor_id": "<2.sublead_id>"}', "$ say both are done"])},
    "policy": {"lead": "\n".join(['$ call request_approval {"summary": "a dear thing", "cost_estimate": 2.5}',
                                  '$ call permission_prompt {"tool_name": "Edit", "input": {"file_path": "a"}}',
                                  '$ call permission_prompt {"tool_name": "Bash", "input": {"command": "rm a"}}',
                                  spawn("$ say too early"), '$ call propose_plan {"plan": {"summary": "Move"}}',
                                  spawn("$ say moved"), '$ call wait_for_worker {"task_id": "<6.task_id>"}',
                                  "$ say carried out"])},
    "read-only-lead": {"reader": "\n".join([spawn("Mend the rounding.\n$ write round.py x\n$ say mended",
                                                  tools=["Read", "Edit", "Write", "Glob", "Grep"]),
                                            '$ call wait_for_worker {"task_id": "<1.task_id>"}', "$ say one bug"])},
}


def played(name: str) -> str:
    """A worked manifest with the scripted agent in claude's place and scripts behind its prompts."""
    text = WORKED[name].manifest
    for actor, script in SCRIPTS[name].items():
        head, middle, rest = text.partition(f'id = "{actor}"')
        assert middle, f"{name} has no {actor}"
        added = json.dumps("\n" + script)[1:-1]
        rest, done = re.subn(r'(?s)(prompt = )("""\n.*?"""|"[^"\n]*")',
                             lambda m: m[1] + (m[2][:-3] + added + '"""' if m[2].startswith('"""') else
                                               m[2][:-1] + added + '"'), rest, count=1)
        assert done
        text = head + middle + rest
    if "[defaults]" in text:
        text = text.replace('agent = "claude"\n', "").replace("[defaults]\n", '[defaults]\nagent = "demo"\n', 1)
    else:
        text = '[defaults]\nagent = "demo"\n' + text
    return text


@pytest.fixture
def place(home):
    """A home with the repositories that the manifests speak of."""
    app = home.repo("app")
    (app / "format.sh").write_text("#!/bin/sh\necho formatted >file1.txt\n")
    (app / "format.sh").chmod(0o755)
    git(app, "config", "user.email", "somebody@localhost")
    git(app, "config", "user.name", "somebody")
    git(app, "add", "-A")
    git(app, "commit", "-qm", "format")
    home.repo("other")
    return home


def statuses(run: Path) -> dict[str, str]:
    return {r["task_id"]: r["status"] for r in read_records(run)}


def committed(home, ref: str) -> set[str]:
    """The files on a branch of `app` that main has not."""
    return set(git(home.root / "app", "diff", "--name-only", "main", ref).split())


def branch_of(run: Path, actor: str) -> str:
    return f"pitboss/{run.name[:8]}/{actor}"


def check_parallel(home, run):
    assert {n: committed(home, f"fix/{n}") for n in ("types", "docs")} == {n: {f"{n}.py"} for n in ("types", "docs")}


def check_template(home, run):
    assert committed(home, branch_of(run, "api")) == {"reviews/api.md"}
    assert git(home.root / "app", "show", f"{branch_of(run, 'db')}:reviews/db.md") == "wrong in src/db\n"


def check_in_turn(home, run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["tasks_not_started"] == 1 and "clean" not in statuses(run)


def check_isolation(home, run):
    (saved,) = [r for r in read_records(run) if r["task_id"] == "sqlite"]
    assert "store.db" in git(home.root / "app", "ls-tree", "--name-only", saved["rescue_ref"])
    assert saved["worktree_path"] is None and list((home.root / "trees").glob("*/sqlite")) == []
    assert f"{home.root}/other" in (run / "tasks" / "review" / "stdout.log").read_text()


def check_any_program(home, run):
    assert committed(home, branch_of(run, "form")) == {"file1.txt"}


def check_lead(home, run):
    assert committed(home, branch_of(run, "lead")) == {"tests/a.py", "REPORT.md"}, "what passed was merged"


def check_leases(home, run):
    turns = (run / "turns").read_text().split()
    assert turns[0] == turns[1] and turns[2] == turns[3] and len({*turns}) == 2, "one after the other"
    assert "a is migrated" in (run / "shared-store.json").read_text()


def check_depth_two(home, run):
    parents = {r["task_id"]: r["parent_task_id"] for r in read_records(run)}
    assert parents == {"root": None, "sublead-1": "root", "sublead-2": "root", "worker-1": parents["worker-1"],
                       "worker-2": parents["worker-2"]}
    assert {parents["worker-1"], parents["worker-2"]} == {"sublead-1", "sublead-2"}
    assert '"server' in (run / "tasks" / "sublead-1" / "stdout.log").read_text().replace("\\", "")


def check_policy(home, run):
    decided = [(e["by"], e["approved"]) for e in read_events(run) if e["kind"] == "approval_decided"]
    assert decided == [("policy", False), ("policy", True), ("file", True), ("file", True)]
    assert [e.get("tool_name") for e in read_events(run) if e["kind"] == "approval_asked"] == ["Bash", None]
    assert "plan approval required" in (run / "tasks" / "lead" / "stdout.log").read_text()
    told = [json.loads(line)["event"]["kind"] for line in (run / "notifications.jsonl").read_text().splitlines()]
    assert told == ["approval_request", "approval_request", "run_finished"]


def check_read_only_lead(home, run):
    task = json.loads((run / "tasks" / "worker-1" / "task.json").read_text())
    assert task["tools"] == ["Read", "Edit", "Write", "Glob", "Grep"]
    (worker,) = [r for r in read_records(run) if r["task_id"] == "worker-1"]
    git(home.root / "app", "merge", "-q", worker["rescue_ref"])
    assert (home.root / "app" / "round.py").exists(), "what it wrote and could not commit is there to be merged"
    stub = home.root / "bin" / "claude"
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\necho '2.1.197 (Claude Code)'\n")
    stub.chmod(0o755)
    shown = home.pitboss("dispatch", "--dry-run", home.manifest(WORKED["read-only-lead"].manifest, "plain.toml"), check=0,
                         env={"PATH": f"{stub.parent}:{home.env['PATH']}"}).stdout
    assert re.search(r"--tools\S* '?Read,Glob,Grep'?(\s|$)", shown), shown


ENDS = {
    # manifest: exit code, statuses, what else is so
    "parallel": (0, {n: "Success" for n in ("types", "docs")}, check_parallel),
    "template": (0, {"api": "Success", "db": "Success"}, check_template),
    "in-turn": (1, {"upgrade": "Failed"}, check_in_turn),
    "isolation": (0, {"sqlite": "Success", "review": "Success"}, check_isolation),
    "any-program": (0, {"form": "Success"}, check_any_program),
    "lead": (1, {"lead": "Success", "worker-1": "Success", "worker-2": "Failed"}, check_lead),
    "leases": (0, {n: "Success" for n in ("lead", "worker-1", "worker-2")}, check_leases),
    "depth-two": (0, {n: "Success" for n in ("root", "sublead-1", "sublead-2", "worker-1", "worker-2")},
                  check_depth_two),
    "policy": (0, {"lead": "Success", "worker-1": "Success"}, check_policy),
    "read-only-lead": (0, {"reader": "Success", "worker-1": "Success"}, check_read_only_lead),
}


def test_there_are_ten_and_each_is_played():
    assert len(WORKED) == 10 and set(WORKED) == set(SCRIPTS) == set(ENDS)
    assert FENCED == [w.manifest for w in pitboss.WORKED]


@pytest.mark.parametrize("name", WORKED)
def test_the_worked_manifests_do_what_they_say(place, name):
    code, ends, check = ENDS[name]
    process = place.start("dispatch", "-q", place.manifest(played(name)))
    if name == "policy":
        run = wait_for(lambda: place.runs.exists() and next(place.runs.glob("0*"), None), what="the run")
        for n, what in enumerate(("the command", "the plan")):
            asked = wait_for(lambda n=n: (run / "journal.jsonl").exists() and [
                e for e in read_events(run) if e["kind"] == "approval_asked"][n:], what=what)[0]
            answer = run / "approvals" / "answer.new"
            answer.write_text('{"approved": true}')
            answer.rename(run / "approvals" / f"{asked['request_id']}.json")
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, out + err
    run = place.run_dir()
    assert statuses(run) == ends
    check(place, run)


def test_the_worked_manifests_are_valid_as_they_stand(place):
    """Checked for claude, as `validate` does and by the JSON schema; each says what it is for."""
    for worked in pitboss.WORKED:
        loaded = pitboss.load_manifest(str(place.manifest(worked.manifest)), place.env, lambda said: None)
        assert loaded.manifest.mode == ("hierarchical" if "[lead]" in worked.manifest else "flat")
        assert loaded.manifest.warnings == (), worked.name
        assert faults(pitboss.manifest_schema({}), tomllib.loads(worked.manifest)) == []
        assert worked.when.endswith(".") and len(worked.manifest) < 1200


# ---- what is said about safety

def named_tests(path: Path) -> set[str]:
    return {n.name for n in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and n.name.startswith("test_")}


def test_every_statement_about_safety_names_tests_that_exist():
    assert any(t.held for t in pitboss.THREATS) and not all(t.held for t in pitboss.THREATS)
    for threat in pitboss.THREATS:
        assert threat.tests and not threat.statement.endswith(".")
        for named in threat.tests:
            file, _, test = named.partition("::")
            assert (TESTS / file).is_file() and test in named_tests(TESTS / file), f"there is no {named}"


def test_the_readme_says_the_same_about_safety():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"<!-- safety: .*? -->\n(.*?)<!-- end of safety -->", readme, re.S)[1]
    assert shown.strip() == pitboss.render_threats(pitboss.threat_with_tests).strip(), "run tests/figures.py --write"


def test_an_agent_is_the_user_who_dispatched_it(place):
    """It reads what the user reads and has the user's variables: pitboss is no sandbox."""
    private = place.root / "home" / "diary.txt"
    private.write_text("dear diary")
    script = f"$ run cat {private}; echo $MY_DEPLOY_WORD\\n$ say read"
    place.pitboss("dispatch", "-q", place.manifest(f'[[task]]\nid = "a"\nagent = "demo"\ndirectory = "app"\nprompt = "{script}"\n'),
                  check=0, env={"MY_DEPLOY_WORD": "open sesame"})
    log = (place.run_dir() / "tasks" / "a" / "stdout.log").read_text()
    assert "dear diary" in log and "open sesame" in log


def test_an_agent_with_a_shell_can_answer_its_own_request(place):
    """A worker says yes, with the commands of an operator, to what its lead has asked for."""
    cli = f"{PYTHON} {program()}"
    yes = (f"until R=$({cli} approvals $PITBOSS_RUN_ID --json | sed -n 's/.*\"request_id\": \"\\(.*\\)\".*/\\1/p') "
           f"&& [ -n \"$R\" ]; do :; done; {cli} approve $PITBOSS_RUN_ID $R")
    lead = spawn(f"$ run {yes}\n$ say yes") + '\n$ call request_approval {"summary": "May I?"}\n$ say I may'
    place.pitboss("dispatch", "-q", place.manifest(
        f'[run]\nmax_workers = 1\nbudget_usd = 5.0\n[defaults]\nagent = "demo"\n[lead]\nid = "lead"\ndirectory = "app"\n'
        f"prompt = {json.dumps(lead)}\n"), timeout=60)
    events = read_events(place.run_dir())
    assert [(e["approved"], e["by"]) for e in events if e["kind"] == "approval_decided"] == [(True, "operator")]


def listening_inodes() -> set[str]:
    """The sockets of this machine that listen on a port."""
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            found |= {fields[9]} if fields[3] == "0A" else set()
    return found


def sockets_of(pids) -> set[str]:
    links = []
    for pid in pids:
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(FileNotFoundError):       # the one that lists them, for one
                links.append(os.readlink(f"/proc/{pid}/fd/{name}"))
    return {link[8:-1] for link in links if link.startswith("socket:[")}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc, which only Linux has")
def test_no_port_is_open_while_a_run_goes_on(place):
    """Neither by the dispatcher nor by a bridge, while a lead waits for an answer."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        assert sockets_of([os.getpid()]) & listening_inodes() == {str(os.fstat(door.fileno()).st_ino)}, "it is seen"
    process = place.start("dispatch", "-q", place.manifest(
        '[run]\nmax_workers = 1\nbudget_usd = 5.0\n[defaults]\nagent = "demo"\n[lead]\nid = "lead"\ndirectory = "app"\n'
        """prompt = '$ call request_approval {"summary": "May I?"}'\n"""))
    wait_for(lambda: place.runs.exists() and any(
        e["kind"] == "approval_asked" for run in place.runs.glob("0*") if (run / "journal.jsonl").exists()
        for e in read_events(run)), what="the request")
    pids = [process.pid, *processes_with(f"PITBOSS_RUN_ID={place.run_dir().name}")]
    used = sockets_of(pids)
    assert len(pids) > 1 and used and used & listening_inodes() == set()
    process.kill()
    process.communicate()


def test_the_budget_ends_nobody_who_runs(place):
    """A lead that spends more than the run may cost goes on to its end; it may spawn nobody."""
    lead = "$ print 400000\n" + spawn("$ say never") + "\n$ say I went on"
    place.pitboss("dispatch", "-q", place.manifest(
        f'[run]\nmax_workers = 1\nbudget_usd = 0.01\n[defaults]\nagent = "demo"\n[lead]\nid = "lead"\ndirectory = "app"\n'
        f"prompt = {json.dumps(lead)}\n"), check=0)
    (record,) = read_records(place.run_dir())
    assert record["status"] == "Success" and record["cost_usd"] > 0.01 and record["final_message"] == "I went on"
    assert "budget exceeded: " in (place.run_dir() / "tasks" / "lead" / "stdout.log").read_text()


# ---- the man page

MAN = pitboss.render_man(pitboss.typed_commands())


def test_the_man_page_has_every_command_flag_key_and_code(home):
    assert home.pitboss("man", check=0).stdout == MAN
    requests = {line.split()[0] for line in MAN.splitlines() if line.startswith((".", "'"))}
    assert requests <= {".TH", ".SH", ".SS", ".TP", ".PP", ".IP", ".RS", ".RE", ".B", ".BR", ".nf", ".fi"}
    assert MAN.count("\n.RS\n") == MAN.count("\n.RE\n") and MAN.count("\n.nf\n") == MAN.count("\n.fi\n")
    words = [pitboss.roff(call) for call, _ in COMMAND_PAIRS] + [str(code) for code, _ in pitboss.EXIT_CODES.values()]
    words += [pitboss.roff(n) for c in pitboss.COMMANDS.values() if c.help for names, _ in c.args
              for n in names if n.startswith("-")]
    words += [pitboss.roff(f.name) for fields, _, _ in pitboss.TABLES.values() for f in fields]
    assert [w for w in words if not re.search(rf"\\fB[^\n]*{re.escape(w)}[^\n]*\\fR", MAN)] == []
    assert all(s in MAN for s in ("SECURITY", "EXIT STATUS", "MANIFEST", pitboss.VERSION))


@pytest.mark.parametrize("text, told", [
    (".de", "\\&.de"), ("'br", "\\&'br"), ("a\n.b", "a\n\\&.b"), ("--x", "\\-\\-x"), ("a\\b", "a\\eb"), ("`x`", "x")])
def test_no_text_is_a_request_of_roff(text, told):
    assert pitboss.roff(text) == told


@pytest.mark.skipif(not shutil.which("groff"), reason="no groff here")
def test_groff_has_nothing_to_say_about_the_man_page():
    done = subprocess.run(["groff", "-ww", "-man", "-Tutf8", "-rLL=78n"], input=MAN, capture_output=True, text=True,
                          env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"})
    assert done.returncode == 0 and done.stderr == ""
    plain = re.sub(r"\x1b\[[0-9;]*m|.\x08", "", done.stdout)
    assert "--dry-run" in plain and "refs" not in plain.partition("NAME")[0] and "\\" not in plain.partition("EXAMPLES")[0]
