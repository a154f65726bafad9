"""What opencode, codex and gemini print is read right, and the scripted agent speaks as they do.

tests/data holds output of opencode 1.18.33, codex-cli 0.169.0 and gemini 0.61.0. The table says what each
sample means; it was written by reading them. Whole runs go through programs that take the agents' real
arguments and let the scripted agent speak for them.
"""
from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import pitboss
from tools import PYTHON, Home, program, read_events, read_records

DATA = Path(__file__).resolve().parent / "data"


class Sample(NamedTuple):
    """One sample and what it means: tokens are input, output, cache read, cache creation."""

    agent: str
    name: str
    status: str
    kind: str | None
    session: str
    tokens: tuple
    cost: float | None
    final: str
    says: str = ""


NOTHING = (0, 0, 0, 0)
TABLE = [
    Sample("codex", "plain", "Success", None, "01a1fdc4-7c6b-7573-b918-fa68980cc0b1", (11073, 7, 0, 0), None,
           "hello from the fake"),
    Sample("codex", "start", "Success", None, "01a1fdc5-3c4f-7562-b363-33ae0f89807a", (22306, 18, 0, 0), None,
           "first t-42"),
    # its usage counts on: 33615 and 22 with what the first hand of the session had used
    Sample("codex", "resume", "Success", None, "01a1fdc5-3c4f-7562-b363-33ae0f89807a", (33615, 22, 0, 0), None, "resumed"),
    Sample("codex", "err_400", "Failed", "invalid_argument", "01a1fdc5-b97c-7fd3-a88f-735134685b7f", NOTHING, None, "",
           "scripted error 400"),
    Sample("codex", "err_401", "Failed", "auth_failure", "01a1fdc5-3fc0-78a2-808a-dd06a70d574b", NOTHING, None, "",
           "401 Unauthorized"),
    Sample("codex", "err_429", "Failed", "rate_limit", "01a1fdc5-5908-7d30-abdd-f907b9c9f278", NOTHING, None, "",
           "429 Too Many"),
    Sample("codex", "err_500", "Failed", "network_error", "01a1fdc5-59ed-72d0-a54e-6bafc37588df", NOTHING, None, "",
           "high demand"),
    Sample("codex", "resume_unknown", "afresh", None, "", NOTHING, None, ""),
    Sample("opencode", "plain", "Success", None, "ses_e024a0017ffe2jf4YAc2egWrtZ", (37, 12, 0, 0), 0.000097,
           "hello from the fake"),
    Sample("opencode", "start", "Success", None, "ses_e02479648ffeBDmkqplRmHzCru", (33, 8, 0, 0), 0.000073, "one"),
    Sample("opencode", "resume", "Success", None, "ses_e02479648ffeBDmkqplRmHzCru", (88, 9, 0, 0), 0.000133, "resumed"),
    Sample("opencode", "perm_auto", "Success", None, "ses_e023ce5b7ffenVlh64Nq9LnQAx", (218, 54, 0, 0), 0.000488,
           "got Wrote file successfully."),
    # a rejected permission ends the run with status 0 and without a last step
    Sample("opencode", "perm_outside", "Failed", "unknown", "ses_e023cf1dfffevNOpajqOfN4tQO", (61, 40, 0, 0), 0.000261, "",
           "without a result"),
    Sample("opencode", "err_401", "Failed", "auth_failure", "ses_e023dc4b3ffeht5PETZAvxbAhj", NOTHING, 0.0, "",
           "scripted error 401"),
    Sample("opencode", "resume_unknown", "afresh", None, "", NOTHING, 0.0, ""),
    Sample("gemini", "plain", "Success", None, "aecc2b20-1ae2-47fe-af8d-e28d28a777e7", (13090, 7, 0, 0), None,
           "hello from the fake"),
    Sample("gemini", "resume", "Success", None, "b2f8e05f-5895-4071-adf4-b9e17de79ad3", (13951, 4, 0, 0), None, "resumed"),
    Sample("gemini", "tools", "Success", None, "b2f8e05f-5895-4071-adf4-b9e17de79ad3", (67051, 116, 0, 0), None,
           "got <untrusted_context>\n{\"echo\""),
    Sample("gemini", "err_400", "Failed", "invalid_argument", "f5d7c275-e879-4299-ad54-793864d5bdaa", NOTHING, None, "",
           "scripted error 400"),
    Sample("gemini", "err_401", "Failed", "auth_failure", "15b9f7de-e80c-45c8-9cf5-67539f5febab", NOTHING, None, "",
           "scripted error 401"),
    Sample("gemini", "resume_other_cwd", "afresh", None, "", NOTHING, None, ""),
]


def read_sample(sample: Sample) -> tuple[pitboss.Talk, pitboss.Ending]:
    path = DATA / sample.agent / sample.name
    talk = pitboss.Talk("m")
    pitboss.fold_lines(talk, path.with_suffix(".jsonl").read_bytes().splitlines(), sample.agent)
    code, signal = pitboss.split_status(int(path.with_suffix(".exit").read_text()), sample.agent)
    return talk, pitboss.Ending(code, signal, stderr=path.with_suffix(".stderr").read_text()[-4096:])


def an_actor(form: str, **facts) -> pitboss.Actor:
    return pitboss.Actor(id="a", role="task", agent=form, model="m", directory="/w", use_worktree=False, timeout_s=60.0,
                         branch=None, format=form, **facts)


@pytest.mark.parametrize("sample", TABLE, ids=lambda s: f"{s.agent}-{s.name}")
def test_a_sample_is_read_right(sample):
    talk, end = read_sample(sample)
    assert talk.skipped == 0 and talk.session_id == sample.session
    assert talk.usage() == sample.tokens
    if sample.cost is not None:
        assert talk.cost_usd() == pytest.approx(sample.cost)
    assert talk.last_text().startswith(sample.final) and bool(talk.last_text()) >= bool(sample.final)
    decided = pitboss.decide_hand_end(an_actor(sample.agent, how="again"), talk, end)
    assert decided.get("status", decided.get("again")) == sample.status
    reason = decided.get("reason")
    assert (reason and reason["kind"]) == sample.kind and sample.says in ((reason or {}).get("message") or "")


def test_every_sample_is_in_the_table_or_cannot_end():
    """The others are those in which an agent went on repeating a request, until it was killed."""
    there = {(p.parent.name, p.stem) for name in ("codex", "opencode", "gemini") for p in (DATA / name).glob("*.jsonl")}
    rest = {("codex", "tools"), ("codex", "no_bypass"), ("opencode", "tools"), ("opencode", "err_429"),
            ("gemini", "err_429"), ("gemini", "perm_default")}
    assert there - {(s.agent, s.name) for s in TABLE} == rest


def test_a_codex_session_counts_on_over_its_hands():
    talk = pitboss.Talk("m")
    talk.base = pitboss.Usage(22306, 18)
    pitboss.fold_lines(talk, (DATA / "codex/resume.jsonl").read_bytes().splitlines(), "codex")
    assert talk.usage() == (33615 - 22306, 22 - 18, 0, 0)


def test_cached_input_counts_once():
    told = {"type": "turn.completed", "usage": {"input_tokens": 100, "cached_input_tokens": 60,
                                                "cache_write_input_tokens": 10, "output_tokens": 5}}
    talk = pitboss.Talk("m")
    pitboss.fold_line(talk, json.dumps(told).encode(), "codex")
    assert talk.usage() == (30, 5, 60, 10)
    told = {"type": "result", "status": "success", "stats": {"input_tokens": 100, "input": 40, "cached": 60,
                                                             "output_tokens": 5}}
    talk = pitboss.Talk("m")
    pitboss.fold_line(talk, json.dumps(told).encode(), "gemini")
    assert talk.usage() == (40, 5, 60, 0)


def test_pieces_of_a_text_are_one_text_and_a_tool_call_ends_it():
    talk = pitboss.Talk("m")
    for content in ("It is ", "done", "."):
        pitboss.fold_line(talk, json.dumps({"type": "message", "role": "assistant", "content": content,
                                            "delta": True}).encode(), "gemini")
    assert talk.last_text() == "It is done."
    pitboss.fold_line(talk, b'{"type":"tool_use","tool_name":"x"}', "gemini")
    pitboss.fold_line(talk, b'{"type":"message","role":"assistant","content":"More.","delta":true}', "gemini")
    assert talk.last_text() == "More."


@pytest.mark.parametrize("agent, name, answers", [("codex", "plain", 1), ("codex", "err_429", 0), ("codex", "no_bypass", 3),
                                                  ("opencode", "plain", 1), ("opencode", "err_401", 0),
                                                  ("opencode", "perm_auto", 2), ("gemini", "plain", 1),
                                                  ("gemini", "err_401", 0), ("gemini", "perm_default", 4)])
def test_answers_of_a_provider_are_counted(agent, name, answers):
    """A hand that met a limit is dealt with otherwise when its provider had answered it."""
    talk = pitboss.Talk("m")
    pitboss.fold_lines(talk, (DATA / agent / f"{name}.jsonl").read_bytes().splitlines(), agent)
    assert talk.answers == answers


@pytest.mark.parametrize("status, form, code, signal", [
    (137, "gemini", None, 9), (143, "gemini", None, 15), (144, "gemini", 144, None), (152, "gemini", 152, None),
    (159, "gemini", 159, None), (152, "codex", None, 24), (152, "", None, 24), (3, "gemini", 3, None)])
def test_a_status_that_is_the_agents_own_is_no_signal(status, form, code, signal):
    """gemini exits with an HTTP status modulo 256: 152 is 408, not the signal XCPU."""
    assert pitboss.split_status(status, form) == (code, signal)


@pytest.mark.parametrize("status, kind", [(400, "invalid_argument"), (401, "auth_failure"), (402, "auth_failure"),
                                          (403, "auth_failure"), (404, "invalid_argument"), (413, "invalid_argument"),
                                          (422, "invalid_argument"), (429, "rate_limit"), (500, "network_error"),
                                          (529, "network_error"), (418, "unknown"), (200, "unknown")])
def test_an_http_status_says_what_kind_of_failure_it_is(status, kind):
    talk = pitboss.Talk("m")
    line = {"type": "error", "sessionID": "s", "error": {"name": "APIError", "data": {"message": "no", "statusCode": status}}}
    pitboss.fold_line(talk, json.dumps(line).encode(), "opencode")
    assert pitboss.find_reason(talk, pitboss.Ending(1))["kind"] == kind


@pytest.mark.parametrize("form", ["codex", "opencode", "gemini"])
def test_what_is_no_event_is_skipped(form):
    talk = pitboss.Talk("m")
    for line in (b"", b"words", b"[1]", b'{"type":"item.completed"}', b'{"type":"text","part":7}', b'{"type":7}',
                 b'{"type":"result","stats":[]}', b'{"type":"turn.completed","usage":{"input_tokens":-1}}', b"\xff{"):
        pitboss.fold_line(talk, line, form)
    assert talk.text == "" and all(n == 0 for n in talk.usage())


def test_a_start_that_came_to_nothing_is_repeated_once():
    """Two first starts of opencode at once in a new home make one database, and one of them may lose."""
    end = pitboss.Ending(1, stderr="Error: Unexpected error\ndatabase is locked\n")
    first = pitboss.decide_hand_end(an_actor("opencode"), pitboss.Talk("m"), end)
    assert first == {"again": "afresh", "cause": "unbegun"}
    assert pitboss.decide_hand_end(an_actor("opencode", afresh=True), pitboss.Talk("m"), end)["status"] == "Failed"
    assert pitboss.decide_hand_end(an_actor("codex"), pitboss.Talk("m"), end)["status"] == "Failed"


def test_a_lost_hand_without_a_session_is_dealt_its_prompt():
    gone, talk = pitboss.Ending(None, vanished=True), pitboss.Talk("m")
    talk.began = True
    assert pitboss.decide_hand_end(an_actor("opencode"), talk, gone)["again"] == "prompt"
    talk.session_id = "ses_1"
    assert pitboss.decide_hand_end(an_actor("opencode"), talk, gone)["again"] == "resume"


# ------------------------------------------------------------------ log lines for people

@pytest.mark.parametrize("agent, name, shown", [
    ("codex", "tools", {">", "*", "<", "v", "!"}), ("codex", "err_400", {"!"}), ("codex", "no_bypass", {">", "*", "<", "v", "!"}),
    ("opencode", "tools", {">", "*", "<", "v"}), ("opencode", "err_401", {"!"}), ("opencode", "perm_outside", {"*", "!"}),
    ("gemini", "tools", {">", "*", "<", "v"}), ("gemini", "err_401", {"!"}), ("gemini", "perm_default", {">", "*", "!", "<", "v"})])
def test_a_log_is_shown_with_the_same_marks(agent, name, shown):
    lines = [pair for line in (DATA / agent / f"{name}.jsonl").read_bytes().splitlines()
             for pair in pitboss.render_log_line(line, agent)]
    assert {mark for mark, _ in lines} == shown
    assert all(text and "\x1b" not in text for _, text in lines)


def test_every_format_has_its_log_lines_and_those_of_agents_a_speech():
    assert set(pitboss.LOG_EVENTS) == set(pitboss.FORMATS)
    assert set(pitboss.SPEECHES) == {a.format for a in pitboss.AGENTS.values()}


# ------------------------------------------------------------------ the scripted agent speaks as they do

SCRIPT = "Work.\n$ say hello\n$ run echo out\n$ run echo err; false\n$ write made.txt a line\n$ say the end\n"
# Fields of real lines that the scripted agent leaves out, and why.
LEFT_OUT = {"error.data.responseHeaders": "it makes no requests", "error.data.responseBody": "it makes no requests",
            "error.data.metadata": "it makes no requests"}


def kind_of(event: dict) -> tuple:
    part = event.get("part") or {}
    return (event["type"], (event.get("item") or {}).get("type"), event.get("role"), bool(event.get("error")),
            (part.get("state") or {}).get("status"))


def fields_of(value, path: str = "") -> set:
    """(path, type) of every field; what a tool is given and the names of models are the work's own."""
    if path in ("part.state.input", "parameters", "item.arguments", "part.state.metadata", *LEFT_OUT):
        return set()
    if path == "stats.models":
        return {field for model in value.values() for field in fields_of(model, "stats.models.*")}
    if isinstance(value, dict):
        return {field for k, v in value.items() for field in fields_of(v, f"{path}.{k}".lstrip("."))}
    kind = "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__
    return {(path, kind)}


def say(agent: str, prompt: str, tmp_path: Path) -> tuple[list[dict], int]:
    done = subprocess.run([PYTHON, str(program()), "demo-agent", "--speak", agent, "--sessions", str(tmp_path),
                           "--session-id", pitboss.mint_uuid()], input=prompt.encode(), capture_output=True, cwd=tmp_path)
    return [json.loads(line) for line in done.stdout.splitlines()], done.returncode


@pytest.mark.parametrize("agent", ["codex", "opencode", "gemini"])
def test_the_scripted_agent_prints_what_the_agent_prints(agent, tmp_path):
    real: dict[tuple, set] = {}
    for path in (DATA / agent).glob("*.jsonl"):
        for event in map(json.loads, path.read_text().splitlines()):
            real.setdefault(kind_of(event), set()).add(frozenset(fields_of(event)))
    seen = set()
    for prompt in (SCRIPT, "$ auth"):
        for event in say(agent, prompt, tmp_path)[0]:
            kind = kind_of(event)
            assert frozenset(fields_of(event)) in real[kind], f"{kind}: {event}"
            seen.add(kind[0])
    assert seen == {"codex": {"thread.started", "turn.started", "item.started", "item.completed", "turn.completed",
                              "turn.failed", "error"},
                    "opencode": {"step_start", "text", "tool_use", "step_finish", "error"},
                    "gemini": {"init", "message", "tool_use", "tool_result", "result"}}[agent]


# ------------------------------------------------------------------ whole runs, spoken by the scripted agent

STAND_IN = """#!{python}
import os, sys, uuid
words = sys.argv[1:]
if "--version" in words:
    print({version!r})
    sys.exit()
open({log!r}, "a").write(repr(words) + "\\n")
open({log!r} + ".env", "a").write(repr(dict(os.environ)) + "\\n")
resumed = {{"codex": "resume" in words and words[-2], "opencode": "--session" in words and words[words.index("--session") + 1],
           "gemini": "--resume" in words and words[words.index("--resume") + 1]}}[{name!r}]
new = words[words.index("--session-id") + 1] if "--session-id" in words else ("ses_" * ({name!r} == "opencode")) + str(uuid.uuid4())
session = ["--resume", resumed] if resumed else ["--session-id", new]
os.execv({python!r}, [{python!r}, {program!r}, "demo-agent", "--speak", {name!r}, "--sessions", {sessions!r}, *session])
"""
VERSIONS = {"codex": "codex-cli 0.169.0", "opencode": "1.18.33", "gemini": "0.61.0"}
MODELS = {"opencode": "some/model"}


class Spoken:
    """A home in which an agent's program is the scripted agent, told by the agent's own arguments."""

    def __init__(self, home: Home, name: str) -> None:
        self.home, self.name = home, name
        self.log = home.root / "argv.log"
        self.program = home.root / "bin" / name
        self.program.parent.mkdir()
        self.program.write_text(STAND_IN.format(python=sys.executable, version=VERSIONS[name], name=name, log=str(self.log),
                                                program=str(program()), sessions=str(home.root / "sessions")))
        self.program.chmod(0o755)
        home.env[f"PITBOSS_{name.upper()}_BINARY"] = str(self.program)

    def environments(self) -> list[dict]:
        """What each process that was dealt had in its environment."""
        return [ast.literal_eval(line) for line in Path(f"{self.log}.env").read_text().splitlines()]

    def manifest(self, *prompts: str, **keys) -> Path:
        repo = self.home.root / "repo"
        if not repo.exists():
            self.home.repo()
        keys = {"agent": self.name, **({"model": MODELS[self.name]} if self.name in MODELS else {}), **keys}
        text = "[defaults]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in keys.items() if v is not None)
        for n, prompt in enumerate(prompts):
            text += f'[[task]]\nid = "t{n}"\ndirectory = "repo"\nprompt = {json.dumps(prompt)}\n'
        return self.home.manifest(text)

    def deal(self, *prompts: str, check: int = 0, **keys) -> Path:
        self.home.pitboss("dispatch", self.manifest(*prompts, **keys), check=check)
        return self.home.run_dir()


@pytest.fixture(params=["codex", "opencode", "gemini"])
def spoken(request, home):
    return Spoken(home, request.param)


def test_two_tasks_and_a_run_dealt_again(spoken):
    run = spoken.deal("A\n$ say one\n$ write a.txt x\n$ commit\n", "B\n$ say two\n")
    first = {r["task_id"]: r for r in read_records(run)}
    assert [first[t]["status"] for t in ("t0", "t1")] == ["Success", "Success"]
    assert first["t1"]["final_message"] == "two" and first["t0"]["token_usage"]["input"] == 300
    spoken.home.pitboss("resume", run.name, check=0)
    again = {r["task_id"]: r for r in read_records(spoken.home.run_dir())}
    assert again["t0"]["claude_session_id"] == first["t0"]["claude_session_id"]
    assert again["t1"]["token_usage"] == first["t1"]["token_usage"], "usage of the session is not counted twice"
    assert "$ say" not in spoken.log.read_text(), "a prompt is not for argv"


def test_a_failure_has_its_kind(spoken):
    record = read_records(spoken.deal("$ auth", check=1))[0]
    assert record["failure_reason"]["kind"] == "auth_failure"
    assert record["exit_code"] == {"gemini": 145}.get(spoken.name, 1)


def test_a_session_that_is_gone_is_dealt_afresh(spoken):
    run = spoken.deal("$ say one")
    for path in (spoken.home.root / "sessions").iterdir():
        path.unlink()
    spoken.home.pitboss("resume", run.name, check=0)
    events = read_events(spoken.home.run_dir())
    assert [e["how"] for e in events if e["kind"] == "hand_dealt"] == ["again", "afresh"]


@pytest.mark.slow
def test_a_hand_that_met_a_limit_before_it_told_its_session_is_dealt_its_prompt(home):
    """opencode says nothing of a session when its first request is refused, here with a limit."""
    spoken = Spoken(home, "opencode")
    flag = home.root / "limited"
    spoken.program.write_text(spoken.program.read_text().replace(
        "resumed =", f"""if not os.path.exists({str(flag)!r}):
    open({str(flag)!r}, "w").close()
    print('{{"type":"error","error":{{"name":"APIError","data":{{"message":"slow down","statusCode":429}}}}}}')
    sys.exit(1)
resumed =""", 1))
    run = spoken.deal("$ say one")
    dealt = [e for e in read_events(run) if e["kind"] == "hand_dealt"]
    assert [e["how"] for e in dealt] == ["prompt", "prompt"] and read_records(run)[0]["final_message"] == "one"


def test_a_session_that_cannot_move_is_dealt_afresh_when_its_folder_cannot_be_made_again(spoken):
    """opencode hangs for ever in another folder, gemini refuses; codex goes on."""
    manifest = spoken.manifest("$ say one")
    manifest.write_text('[run]\nworktree_dir = "trees"\n' + manifest.read_text())
    spoken.home.pitboss("dispatch", manifest, check=0)
    shutil.rmtree(spoken.home.root / "trees")
    spoken.home.pitboss("resume", spoken.home.run_dir().name, check=0)
    dealt = [e for e in read_events(spoken.home.run_dir()) if e["kind"] == "hand_dealt"]
    assert [e["how"] for e in dealt] == [{"codex": "again"}.get(spoken.name, "afresh")]


def test_what_a_repository_could_set_is_set_already_unless_the_operator_did(home):
    """gemini takes from a repository's .env only what is not set yet; empty is set."""
    spoken = Spoken(home, "gemini")
    spoken.deal("$ say x")
    home.env["GOOGLE_GEMINI_BASE_URL"] = "https://operator.example"
    spoken.deal("$ say x", env=None)
    first, second = spoken.environments()
    assert all(first[name] == "" for name in pitboss.GEMINI_SHUT)
    assert second["GOOGLE_GEMINI_BASE_URL"] == "https://operator.example"
    assert first["GEMINI_CLI_NO_RELAUNCH"] == "true"


def test_keys_that_have_no_effect_are_told(spoken):
    row = pitboss.AGENTS[spoken.name]
    manifest = spoken.manifest("$ say x", tools=["Bash"], effort="low")
    manifest.write_text(manifest.read_text() + '[[mcp_server]]\nid = "x"\ncommand = "true"\n')
    done = spoken.home.pitboss("validate", manifest, check=0)
    told = set(re.findall(r"warning: .*?: ([a-z_\[\].0-9]+) .*no effect on agent", done.stderr))
    assert told == {{"tools": "defaults.tools", "effort": "defaults.effort", "mcp_server": "mcp_server[0]"}[k]
                    for k in row.ignores if k != "permission_routing"}         # that is a lead's
    assert pitboss.limits_of(row) in done.stderr
    assert "no effect on agent" not in spoken.home.pitboss("validate", spoken.manifest("$ say x"), check=0).stderr


def test_a_model_is_the_agents_own_unless_one_is_named(spoken):
    spoken.deal("$ say x", model=None)
    spoken.deal("$ say x", model="maker/the-model")
    without, named = spoken.log.read_text().splitlines()
    assert "claude" not in without and "model'" not in without and "'maker/the-model'" in named


def test_a_model_that_is_no_model_of_opencode_is_refused(home):
    spoken = Spoken(home, "opencode")
    done = spoken.home.pitboss("validate", spoken.manifest("$ say x", model="gpt-5"), check=2)
    assert "defaults.model" in done.stderr and "PROVIDER/MODEL" in done.stderr


# ------------------------------------------------------------------ programs that are not what they should be

@pytest.mark.parametrize("text, mode, says", [
    ("#!/bin/sh\r\nexit 0\r\n", 0o755, "CR LF"), ("#!/no/such/shell\n", 0o755, "/no/such/shell was not found"),
    ("#!/bin/sh\nexit 0\n", 0o644, "is not an executable program"), (None, 0, "was not found")],
    ids=["CRLF", "no interpreter", "not executable", "missing"])
@pytest.mark.parametrize("command", ["validate", "dispatch"])
def test_a_program_that_cannot_be_started_is_told_before_anything_starts(home, text, mode, says, command):
    spoken = Spoken(home, "codex")
    spoken.program.unlink()
    if text is not None:
        spoken.program.write_bytes(text.encode())
        spoken.program.chmod(mode)
    done = home.pitboss(command, spoken.manifest("$ say x"), check=0 if command == "validate" else 2)
    assert says in done.stderr and "agent codex" in done.stderr and "Traceback" not in done.stderr
    assert not home.runs.exists() or not any(home.runs.iterdir())


def test_a_program_that_prints_nothing_has_not_succeeded(home):
    spoken = Spoken(home, "gemini")
    spoken.program.write_text("#!/bin/sh\nexit 0\n")
    record = read_records(spoken.deal("$ say x", check=1))[0]
    assert record["status"] == "Failed" and record["failure_reason"]["message"] == "exit status 0 without a result"


def test_a_program_that_breaks_when_asked_its_version_is_told(home):
    spoken = Spoken(home, "codex")
    spoken.program.write_text("#!/bin/sh\necho broken >&2\nexit 3\n")
    done = home.pitboss("dispatch", spoken.manifest("$ say x"), check=2)
    assert "--version ended with status 3: broken" in done.stderr


@pytest.mark.parametrize("version, told", [("codex-cli 0.169.0", None), ("codex-cli 99.1", "driven as 0.169.0 was"),
                                           ("", "does not say its version")])
def test_doctor_says_when_a_version_is_not_the_one_that_was_measured(home, version, told):
    spoken = Spoken(home, "codex")
    spoken.program.write_text(f"#!/bin/sh\necho '{version}'\n")
    found = {f["what"]: f for f in json.loads(home.pitboss("doctor", "--json", check=0).stdout)}
    assert found["codex"]["ok"] is True and "it tells no cost" in found["codex"]["found"]
    assert told in found["codex"]["found"] if told else "driven as" not in found["codex"]["found"]


def test_doctor_tells_what_reaches_claude_and_no_secret(home):
    folder = Path(home.env["HOME"]) / ".claude"
    folder.mkdir()
    (folder / "settings.json").write_text(json.dumps({"env": {"SOME_NAME": "a secret"}, "hooks": {"x": []}}))
    done = home.pitboss("doctor", check=0, env={"ANTHROPIC_API_KEY": "sk-ant-secret", "ANTHROPIC_BASE_URL": "http://u:pw@h"})
    assert "ANTHROPIC_API_KEY, ANTHROPIC_BASE_URL" in done.stdout and "SOME_NAME" in done.stdout
    assert "hooks do not run" in done.stdout and "secret" not in done.stdout and "pw@" not in done.stdout
    (folder / "settings.json").write_text("{")
    assert "cannot be read as JSON" in home.pitboss("doctor", check=0).stdout
    if os.geteuid() == 0:
        assert "unset IS_SANDBOX" in home.pitboss("doctor", check=1, env={"IS_SANDBOX": "yes"}).stdout


# ------------------------------------------------------------------ what the adapters say

def test_memory_files_are_read_from_the_root_down_and_never_from_outside(tmp_path):
    root = tmp_path / "w"
    (root / "a" / "b").mkdir(parents=True)
    (tmp_path / "secret").write_text("outside")
    (root / "AGENTS.md").write_text("top")
    (root / "a" / "AGENTS.md").symlink_to(tmp_path / "secret")
    (root / "a" / "b" / "AGENTS.md").write_text("below")
    assert pitboss.read_memory("AGENTS.md", str(root), str(root / "a" / "b")) == (("AGENTS.md", "top"),
                                                                                 ("a/b/AGENTS.md", "below"))
    assert pitboss.read_memory("", str(root), str(root)) == ()


def test_secrets_of_a_servers_environment_stay_out_of_argv(tmp_path):
    server = pitboss.Server("own", "prog", ("--flag",), {"TOKEN": "it's\na secret", "odd-name": "b c"})
    task = pitboss.Task("t", "/w", "p", None, "codex", "m", "max", (), 60, True, {}, 0)
    deal = pitboss.Deal(task, ("/bin/codex",), "prompt", "", "m", "/w", "/w", "/r/prompt.txt", "/r/mcp.json", "/s", False,
                        (server,))
    argv, files = pitboss.argv_codex(deal), pitboss.files_codex(deal)
    assert "secret" not in " ".join(argv) and 'model_reasoning_effort="xhigh"' in argv
    assert list(files) == ["mcp-own.env"] and "/r/mcp-own.env" in " ".join(argv)
    (tmp_path / "own.env").write_text(files["mcp-own.env"])
    words = pitboss.codex_server(deal, server)
    shown = subprocess.run([*words[:3], str(tmp_path / "own.env"), "env", "-0"], capture_output=True, text=True)
    assert {"TOKEN=it's\na secret", "odd-name=b c"} <= set(shown.stdout.split("\0"))
