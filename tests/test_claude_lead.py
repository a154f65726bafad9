"""The real claude as the lead of a run and as its workers, against a stand-in for the API.

Every claim is checked from outside: in the records, the journal, the agents' own logs, git, the process
table, and the requests that the API saw. Without claude they are skipped; PITBOSS_TEST_CLAUDE names one.
"""
from __future__ import annotations

import json
import os
import signal
import socket
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

import fake_api
from test_claude import (KEY, LONG_S, MODEL, SERVER, ClaudeHome, Run, alive, bash, check_nothing_lives,
                         manifest, model_tokens, offered, parent_of, prompt, real, said_by_user, say, section,
                         session_of, shim_pid, wait_for_file)
from tools import Home, git, read_events, wait_for

WORKERS_TOOLS = {f"mcp__pitboss__{name}" for name in (
    "kv_get", "kv_set", "kv_cas", "kv_delete", "kv_list", "kv_wait", "lease_acquire", "lease_release",
    "lease_list", "run_lease_acquire", "run_lease_release")}
LEADS_TOOLS = WORKERS_TOOLS | {f"mcp__pitboss__{name}" for name in (
    "spawn_worker", "worker_status", "wait_for_worker", "wait_actor", "wait_for_any", "list_workers", "cancel_worker",
    "pause_worker", "continue_worker", "reprompt_worker", "budget_status", "request_approval", "propose_plan")}
REDIRECT_S = 15         # an agent that hangs in a command is told within this


# ------------------------------------------------------------------ manifests and scripts

def ask(tool: str, /, **arguments) -> dict:
    """A step that calls a tool of pitboss."""
    return {"tool": f"mcp__pitboss__{tool}", "input": arguments}


def together(*calls: dict) -> dict:
    """A step that makes several calls in one turn."""
    return {"tools": list(calls)}


def wait(worker: str) -> dict:
    return ask("wait_for_worker", task_id=worker)


def spawn(*steps: dict, words: str = "Do it.", **more) -> dict:
    return ask("spawn_worker", prompt=prompt(*steps, words=words), **more)


def until_there(*paths: Path) -> dict:
    """A step that waits until all of these files are there."""
    tests = " && ".join(f"[ -e {path} ]" for path in paths)
    return bash(f"until {tests}; do sleep 0.1; done; echo there")


class Tree(ClaudeHome):
    """Runs with a lead, in one home."""

    def write(self, text: str, *, servers: tuple = (), run: dict | None = None,
              lead: dict | None = None) -> Path:
        repo = self.home.root / "repo"
        if not repo.exists():
            self.home.repo()
        rules = {"name": "tree", "max_workers": 4, "budget_usd": 5.0, **(run or {})}
        boss = {"id": "boss", "directory": str(repo), "prompt": text, "tools": ["Bash", "Read"],
                **(lead or {})}
        return self.home.manifest("\n".join([
            section("[run]", rules), section("[defaults]", {"agent": "claude", "model": MODEL}),
            section("[lead]", boss), *(section("[[mcp_server]]", server) for server in servers)]))

    def path(self, name: str) -> Path:
        return self.home.root / name

    def gate(self, name: str) -> dict:
        """A step that makes the file NAME.begun and waits for the file NAME."""
        path = self.path(name)
        return bash(f"touch {path}.begun; until [ -e {path} ]; do sleep 0.1; done; echo through")

    def hang(self, name: str) -> dict:
        """A step that makes the file NAME.begun and does not come back."""
        return bash(f"touch {self.path(name)}.begun; sleep 600")

    def begun(self, name: str) -> Path:
        return self.path(f"{name}.begun")

    def open(self, name: str) -> None:
        self.path(name).touch()

    def requests(self, run: Run, actor: str) -> list[dict]:
        """What an actor's sessions asked the API, oldest first."""
        sessions = {event["session_id"] for event in run.log(actor) if "session_id" in event}
        return [body for body in self.bodies() if "metadata" in body and session_of(body) in sessions]


@contextmanager
def a_tree(root: Path):
    """A home for runs with a lead; what it left alive is killed at the end."""
    api = fake_api.start(bodies=root / "bodies")
    home = Home(root)
    try:
        yield Tree(home, api)
    finally:
        api.stop()
        home.end_everything()


@pytest.fixture
def tree(tmp_path):
    with a_tree(tmp_path) as place:
        yield place


# ------------------------------------------------------------------ what tests ask again and again

def uses(run: Run, actor: str = "boss") -> list[dict]:
    """The calls of an actor so far, in their order: `name`, `input`, and `answer`, JSON where it is JSON."""
    found: dict[str, dict] = {}
    for event in run.log(actor):
        blocks = (event.get("message") or {}).get("content")
        for block in blocks if isinstance(blocks, list) else ():
            if block["type"] == "tool_use":
                found[block["id"]] = block
            elif block["type"] == "tool_result":
                text = fake_api.block_text(block["content"])
                found[block["tool_use_id"]]["answer"] = fake_api.as_json(text)
    return list(found.values())


def answer_of(run: Run, tool: str, which: int = 0, actor: str = "boss"):
    """What the actor's call of a tool of pitboss, counted from 0, was answered."""
    return [use["answer"] for use in uses(run, actor) if use["name"] == f"mcp__pitboss__{tool}"][which]


def asked(run: Run, tool: str, actor: str = "boss") -> int:
    """How many calls of a tool of pitboss the actor has made so far."""
    return sum(use["name"] == f"mcp__pitboss__{tool}" for use in uses(run, actor))


def check_done(run: Run, actor: str, hands: int = 1) -> dict:
    """A record of an actor that succeeded says what the agent's own log says."""
    record, results = run.record(actor), run.results(actor)
    assert (record["status"], record["exit_code"], record["failure_reason"]) == ("Success", 0, None), record
    assert record["claude_session_id"] == results[-1]["session_id"]
    assert record["final_message"] == results[-1]["result"]
    assert run.hands(actor) == hands and record["hands"] == hands
    if hands == 1:
        assert record["cost_usd"] == pytest.approx(results[-1]["total_cost_usd"], abs=1e-9)
        assert record["token_usage"] == model_tokens(results[-1])
    assert record["cost_usd"] > 0
    return record


def spawned(run: Run) -> list[str]:
    return [event["actor"] for event in read_events(run.folder)
            if event["kind"] == "actor_added" and event.get("parent")]


def moment(run: Run, kind: str, actor: str) -> float:
    return next(event["at"] for event in read_events(run.folder)
                if (event["kind"], event.get("actor")) == (kind, actor))


def agent_pid(run: Run, actor: str) -> int:
    """The process of the actor's claude itself, of its first hand."""
    shim = shim_pid(run, actor)
    return wait_for(lambda: next((pid for pid in run.processes() if parent_of(pid) == shim), 0), 30, "claude")


def states_of(run: Run, actor: str) -> set[str]:
    """The letters of the states of all processes of an actor."""
    found = set()
    for pid in run.processes():
        try:
            if f"PITBOSS_TASK_ID={actor}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found.add(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0])
        except OSError:
            continue
    return found


def operate(run: Run, op: str, **fields) -> dict:
    """One operation over the control socket, and what it was answered."""
    path = json.loads((run.folder / "sockets.json").read_text())["control"]
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(path)
        with client.makefile("rwb") as lines:
            for message in ({"op": "hello", "client_version": "t"}, {"op": op, "id": 1, **fields}):
                lines.write(json.dumps(message).encode() + b"\n")
            lines.flush()
            for line in lines:
                answer = json.loads(line)
                if answer.get("id") == 1:
                    return answer
    raise AssertionError(f"no answer to {op}")


# ------------------------------------------------------------------ a lead and three workers

@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """(the place, the run, the ids of its three workers): one works, one is redirected, one is cancelled."""
    with a_tree(tmp_path_factory.mktemp("story")) as place:
        program = place.path("server.py")
        program.write_text(SERVER)
        instead = prompt(ask("kv_set", path="/peer/self/word", value="heard"), say("redirected"),
                         words="Do something else.")
        text = prompt(
            together(
                spawn(ask("spawn_worker", prompt="a worker's worker"),
                      {"tool": "mcp__side__echo", "input": {"text": "worker"}},
                      ask("lease_acquire", name="door", ttl_secs=300),
                      bash("echo made >made.txt; git add -A; "
                           "git -c user.name=t -c user.email=t@t commit -qm made"),
                      ask("kv_set", path="/shared/result", value="made by a worker"),
                      say("made it")),
                spawn(place.hang("first"), say("never"), words="Remember the word PLUM."),
                spawn(place.hang("second"), say("never"))),
            {"tool": "mcp__side__echo", "input": {"text": "lead"}},
            ask("wait_for_any", task_ids=["$1#1.task_id", "$1.task_id", "$1#2.task_id"]),
            together(ask("kv_get", path="/shared/result"), ask("kv_list", glob="/shared/*"),
                     ask("lease_list")),
            until_there(place.begun("first"), place.begun("second")),
            ask("reprompt_worker", task_id="$1#1.task_id", prompt=instead),
            ask("cancel_worker", task_id="$1#2.task_id", reason="no longer wanted"),
            together(wait("$1#1.task_id"),
                     wait("$1#2.task_id")),
            together(ask("budget_status"), ask("list_workers"),
                     ask("kv_get", path="/peer/${1#1.task_id}/word")),
            say("the workers were ${1.task_id} ${1#1.task_id} ${1#2.task_id}"))
        server = {"id": "side", "command": sys.executable, "args": [str(program)]}
        run = place.dispatch(text, servers=(server,), check=1)
        yield place, run, run.record("boss")["final_message"].split()[-3:]


@real
def test_what_became_of_everybody(story):
    """The run's exit status is 1: one of the workers was cancelled."""
    place, run, (worker, redirected, cancelled) = story
    assert set(run.records()) == {"boss", worker, redirected, cancelled} == {"boss", *spawned(run)}
    boss = check_done(run, "boss")
    assert (boss["role"], boss["parent_task_id"]) == ("lead", None)
    for name in (worker, redirected):
        record = check_done(run, name)
        assert (record["role"], record["parent_task_id"], record["agent"]) == ("worker", "boss", "claude")
    assert git(place.path("repo"), "show", f"{run.record(worker)['branch']}:made.txt") == "made\n"
    assert (run.summary()["tasks_total"], run.summary()["tasks_failed"]) == (4, 1)
    check_nothing_lives(run)


@real
def test_any_wait_gives_the_first_that_settled(story):
    _, run, (worker, *_) = story
    answer = answer_of(run, "wait_for_any")
    assert (answer["task_id"], answer["record"]) == (worker, {**run.record(worker), "worktree_path": answer[
        "record"]["worktree_path"]})


@real
def test_the_lead_reads_what_a_worker_wrote(story):
    _, run, (worker, *_) = story
    entry = answer_of(run, "kv_get")["entry"]
    assert (entry["path"], entry["written_by"]) == ("/shared/result", worker)
    assert entry["value"] == "made by a worker"
    assert [row["path"] for row in answer_of(run, "kv_list")["entries"]] == ["/shared/result"]
    assert answer_of(run, "lease_acquire", actor=worker)["acquired"] is True
    assert answer_of(run, "lease_list") == {"leases": []}, "a lease ends with the hand of its holder"


@real
def test_a_worker_that_hangs_is_redirected(story):
    """At once, in its session, by its input; it knows what it was told before."""
    place, run, (_, redirected, _) = story
    assert answer_of(run, "reprompt_worker") == {"ok": True, "delivery": "input"}
    assert moment(run, "delivered", redirected) - moment(run, "reprompted", redirected) < REDIRECT_S
    record = check_done(run, redirected)
    assert (record["final_message"], record["reprompt_count"]) == ("redirected", 1)
    assert len({event["session_id"] for event in run.log(redirected) if "session_id" in event}) == 1
    first, *_, last = place.requests(run, redirected)
    assert "PLUM" in said_by_user(first) and "Do something else." not in said_by_user(first)
    assert "PLUM" in said_by_user(last) and "Do something else." in said_by_user(last)
    assert answer_of(run, "kv_get", 1)["entry"]["value"] == "heard"


@real
def test_a_worker_is_cancelled(story):
    _, run, (_, redirected, cancelled) = story
    assert answer_of(run, "cancel_worker") == {"ok": True}
    record = run.record(cancelled)
    assert (record["status"], record["failure_reason"]["message"]) == ("Cancelled", "no longer wanted")
    assert [answer_of(run, "wait_for_worker", n)["task_id"] for n in (0, 1)] == [redirected, cancelled]
    assert [answer_of(run, "wait_for_worker", n)["status"] for n in (0, 1)] == ["Success", "Cancelled"]
    states = {row["task_id"]: row["state"] for row in answer_of(run, "list_workers")["workers"]}
    assert (states[redirected], states[cancelled]) == ("Completed", "Cancelled")


@real
def test_the_leads_own_cost_is_in_the_books(story):
    """Near its end: all of its workers' cost, and of its own almost all."""
    _, run, workers = story
    costs = {name: record["cost_usd"] for name, record in run.records().items()}
    assert costs["boss"] == pytest.approx(run.results("boss")[-1]["total_cost_usd"], abs=1e-9)
    assert run.summary()["total_cost_usd"] == pytest.approx(sum(costs.values()), abs=1e-9)
    books, below = answer_of(run, "budget_status"), sum(costs[name] for name in workers)
    assert below + costs["boss"] / 2 < books["spent_usd"] < below + costs["boss"]
    assert {**books, "spent_usd": 0} == {"budget_usd": 5, "spent_usd": 0, "reserved_usd": 0,
                                         "workers_live": 0, "max_workers": 4}


@real
def test_each_is_offered_the_tools_of_its_role(story):
    """pitboss's and the manifest's server's, beside the built-in ones; a worker gets none of a lead's."""
    place, run, (worker, redirected, cancelled) = story
    always = {"Bash", "Read", "mcp__side__echo"}
    for actor, tools in (("boss", LEADS_TOOLS), (worker, WORKERS_TOOLS), (redirected, WORKERS_TOOLS)):
        bodies = place.requests(run, actor)
        assert bodies and [offered(body) for body in bodies] == [always | tools] * len(bodies)
    refused = answer_of(run, "spawn_worker", actor=worker)
    assert "No such tool" in refused, "the script asked for it all the same"
    assert len(spawned(run)) == 3


@real
def test_servers_of_the_manifest_stand_beside_pitboss(story):
    _, run, (worker, *_) = story
    for actor, words in (("boss", "again lead"), (worker, "again worker")):
        assert [use["answer"] for use in uses(run, actor) if use["name"] == "mcp__side__echo"] == [words]
        servers = {s["name"]: s["status"] for s in run.log(actor)[0]["mcp_servers"]}
        assert servers == {"pitboss": "connected", "side": "connected"}


@real
def test_tokens_and_the_key_stay_where_they_belong(story):
    """Each actor's token is in its one private file, in no other one, and the API was not told it."""
    place, run, workers = story
    tokens = {name: run.folder / "tasks" / name / "token" for name in ("boss", *workers)}
    assert len({path.read_bytes() for path in tokens.values()}) == 4
    assert {path.stat().st_mode & 0o777 for path in tokens.values()} == {0o600}
    secrets = [KEY.encode(), *(path.read_bytes().strip() for path in tokens.values())]
    files = [path for path in run.folder.rglob("*") if path.is_file() and path not in tokens.values()]
    files += place.api.bodies.glob("*.json")
    assert len(files) > 20
    assert [path for path in files for secret in secrets if secret in path.read_bytes()] == []


# ------------------------------------------------------------------ calls of one turn

@real
def test_calls_of_one_turn_run_together(tree):
    """Twelve waits for a worker, which ends only when the worker spawned by the turn's last call has run.

    claude 2.1.197 sets no bound to that; the variable that bounds it elsewhere is raised all the same.
    """
    text = prompt(
        bash("echo $CLAUDE_CODE_MAX_TOOL_USE_CONCURRENCY"), spawn(tree.gate("gate"), say("opened")),
        together(*[wait("$2.task_id")] * 12, spawn(bash(f"touch {tree.path('gate')}"), say("opens"))),
        wait("$3#12.task_id"), say("${1} at once"))
    run = tree.dispatch(text, run={"max_workers": 12}, lead={"timeout_secs": 100})
    assert check_done(run, "boss")["final_message"] == "14 at once"
    first, second = spawned(run)
    waits = [answer_of(run, "wait_for_worker", n)["final_message"] for n in range(13)]
    assert waits == ["opened"] * 12 + ["opens"]
    assert {check_done(run, name)["final_message"] for name in (first, second)} == {"opened", "opens"}
    check_nothing_lives(run)


# ------------------------------------------------------------------ workers among themselves

@real
def test_workers_share_a_store_and_a_lease(tree):
    """The second is refused while the first holds the lease, and gets it when the first has ended."""
    first = spawn(ask("lease_acquire", name="door", ttl_secs=300),
                  ask("kv_cas", path="/shared/held", expected_version=0, new_value="yes"),
                  ask("kv_wait", path="/shared/refused", timeout_secs=LONG_S), say("the first ends"))
    second = spawn(ask("kv_wait", path="/shared/held", timeout_secs=LONG_S),
                   ask("kv_cas", path="/shared/held", expected_version=0, new_value="mine"),
                   ask("lease_acquire", name="door", ttl_secs=300),
                   ask("kv_set", path="/shared/refused", value="yes"),
                   ask("lease_acquire", name="door", ttl_secs=300, wait_secs=LONG_S),
                   ask("lease_release", lease_id="$5.lease_id"), say("the second ends"))
    text = prompt(together(first, second), together(wait("$1.task_id"),
                                                    wait("$1#1.task_id")),
                  say("${1.task_id} ${1#1.task_id}"))
    run = tree.dispatch(text)
    one, two = check_done(run, "boss")["final_message"].split()
    assert check_done(run, one)["final_message"] == "the first ends"
    assert check_done(run, two)["final_message"] == "the second ends"
    assert answer_of(run, "kv_cas", actor=two) == {"version": 1, "swapped": False}
    refused, granted = (answer_of(run, "lease_acquire", n, two) for n in (0, 1))
    assert (refused["acquired"], refused["holder"]) == (False, one)
    assert (granted["acquired"], granted["version"]) == (True, 2)
    assert answer_of(run, "lease_release", actor=two) == {"ok": True}
    check_nothing_lives(run)


@real
def test_refusals_reach_the_model(tree):
    """With the words that leads in the wild look for; what was refused has not happened."""
    text = prompt(spawn(tree.gate("gate"), say("opened")), spawn(say("never")), wait("nobody"),
                  ask("cancel_worker", task_id="boss"), ask("spawn_worker", promt="x"),
                  bash(f"touch {tree.path('gate')}"), wait("$1.task_id"),
                  spawn(say("never"), directory="/nowhere"), say("done"))
    run = tree.dispatch(text, run={"max_workers": 1})
    check_done(run, "boss")
    refused = [answer_of(run, "spawn_worker", 1), answer_of(run, "wait_for_worker"),
               answer_of(run, "cancel_worker"), answer_of(run, "spawn_worker", 2),
               answer_of(run, "spawn_worker", 3)]
    words = ["worker cap reached: 1 active (max 1)", "unknown task_id: nobody", "forbidden: ", "promt",
             "/nowhere"]
    assert [word for word, text in zip(words, refused) if word not in text] == []
    assert len(spawned(run)) == 1
    check_nothing_lives(run)


# ------------------------------------------------------------------ freezing, pausing, redirecting

@real
def test_a_frozen_worker_stands_still_and_goes_on(tree):
    """All of its processes are stopped, its command's among them; then it goes on as if nothing had been."""
    text = prompt(
        spawn(tree.gate("gate"), say("went on")), until_there(tree.begun("gate")),
        ask("pause_worker", task_id="$1.task_id", mode="freeze"),
        ask("worker_status", task_id="$1.task_id"), tree.gate("looked"),
        ask("continue_worker", task_id="$1.task_id"), ask("worker_status", task_id="$1.task_id"),
        bash(f"touch {tree.path('gate')}"), wait("$1.task_id"), say("${1.task_id}"))
    process, run = tree.start(text)
    wait_for_file(process, tree.begun("looked"))
    (worker,) = spawned(run)
    wait_for(lambda: states_of(run, worker) == {"T"}, 30, "all of its processes to stand still")
    tree.open("looked")
    assert process.wait(LONG_S) == 0
    assert [answer_of(run, "worker_status", n)["state"] for n in (0, 1)] == ["Frozen", "Running"]
    record = check_done(run, worker)
    assert (record["final_message"], record["pause_count"]) == ("went on", 1)
    check_nothing_lives(run)


@real
def test_a_frozen_worker_is_told_something_when_it_goes_on(tree):
    text = prompt(
        spawn(tree.hang("hang"), say("never"), words="Remember the word PLUM."),
        until_there(tree.begun("hang")),
        ask("pause_worker", task_id="$1.task_id", mode="freeze"),
        ask("continue_worker", task_id="$1.task_id", prompt=prompt(say("heard"))),
        wait("$1.task_id"), say("${1.task_id}"))
    run = tree.dispatch(text)
    (worker,) = spawned(run)
    assert check_done(run, worker)["final_message"] == "heard"
    assert "PLUM" in said_by_user(tree.requests(run, worker)[-1])
    check_nothing_lives(run)


@real
def test_a_paused_worker_goes_on_in_its_session(tree):
    """Its process is gone, its session is not: the next hand is told to continue."""
    text = prompt(
        spawn(tree.hang("hang"), say("went on"), words="Remember the word PLUM."),
        until_there(tree.begun("hang")), ask("pause_worker", task_id="$1.task_id"), tree.gate("looked"),
        ask("continue_worker", task_id="$1.task_id"), wait("$1.task_id"), say("done"))
    process, run = tree.start(text)
    wait_for_file(process, tree.begun("looked"))
    (worker,) = spawned(run)
    assert states_of(run, worker) == set(), "a paused worker has no process"
    session = run.log(worker)[0]["session_id"]
    tree.open("looked")
    assert process.wait(LONG_S) == 0
    record = check_done(run, worker, hands=2)
    assert (record["claude_session_id"], record["final_message"]) == (session, "went on")
    last = said_by_user(tree.requests(run, worker)[-1])
    assert "PLUM" in last and "continue" in last
    check_nothing_lives(run)


@real
def test_a_lead_that_waits_is_redirected_by_an_operator(tree):
    """Its call ends with the interrupt; it goes on in the same process, and its bridge still works."""
    text = prompt(spawn(tree.gate("gate"), say("opened")), wait("$1.task_id"),
                  say("never"), words="Remember the word PLUM.")
    process, run = tree.start(text)
    wait_for_file(process, tree.begun("gate"))
    wait_for(lambda: asked(run, "wait_for_worker"), 60, "the lead's wait")
    (worker,) = spawned(run)
    instead = prompt(bash(f"touch {tree.path('gate')}"), wait(worker),
                     say("told by the operator"))
    assert operate(run, "reprompt_worker", task_id="boss", prompt=instead)["event"] == "op_acked"
    assert process.wait(LONG_S) == 0
    assert check_done(run, "boss")["final_message"] == "told by the operator"
    assert moment(run, "delivered", "boss") - moment(run, "reprompted", "boss") < REDIRECT_S
    assert answer_of(run, "wait_for_worker", 1)["final_message"] == "opened"
    assert "PLUM" in said_by_user(tree.requests(run, "boss")[-1])
    check_nothing_lives(run)


@real
def test_a_worker_that_does_not_listen_is_redirected(tree):
    """It gets a new hand in its session, when its echo has not come in ten seconds.

    What it takes up while it is being ended does not count: its session may have lost it.
    """
    text = prompt(spawn(tree.hang("hang"), say("never"), words="Remember the word PLUM."), tree.gate("deaf"),
                  ask("reprompt_worker", task_id="$1.task_id", prompt=prompt(say("redirected"))),
                  wait("$1.task_id"), say("done"))
    process, run = tree.start(text)
    wait_for_file(process, tree.begun("hang"))
    wait_for_file(process, tree.begun("deaf"))
    (worker,) = spawned(run)
    os.kill(agent_pid(run, worker), signal.SIGSTOP)
    tree.open("deaf")
    assert process.wait(LONG_S) == 0
    assert answer_of(run, "reprompt_worker") == {"ok": True, "delivery": "resume"}
    record = check_done(run, worker, hands=2)
    assert (record["final_message"], record["reprompt_count"]) == ("redirected", 1)
    assert record["claude_session_id"] == run.log(worker)[0]["session_id"]
    assert "PLUM" in said_by_user(tree.requests(run, worker)[-1])
    check_nothing_lives(run)


@real
def test_a_frozen_lead_finds_its_wait_answered(tree):
    text = prompt(spawn(tree.gate("gate"), say("opened")), wait("$1.task_id"),
                  say("it said ${2.final_message}"))
    process, run = tree.start(text)
    wait_for_file(process, tree.begun("gate"))
    wait_for(lambda: asked(run, "wait_for_worker"), 60, "the lead's wait")
    (worker,) = spawned(run)
    assert operate(run, "pause_worker", task_id="boss", mode="freeze")["event"] == "op_acked"
    wait_for(lambda: states_of(run, "boss") == {"T"}, 30, "all of its processes to stand still")
    tree.open("gate")
    wait_for(lambda: run.count("closed"), 60, "the worker's end")
    assert operate(run, "continue_worker", task_id="boss")["event"] == "op_acked"
    assert process.wait(LONG_S) == 0
    assert check_done(run, "boss")["final_message"] == "it said opened"
    check_nothing_lives(run)


@real
def test_an_operators_reason_reaches_the_lead(tree):
    """Its wait is answered, and what the operator said comes with the answer."""
    text = prompt(spawn(tree.hang("hang"), say("never")), wait("$1.task_id"),
                  bash("echo one more request"), say("done"))
    process, run = tree.start(text)
    wait_for_file(process, tree.begun("hang"))
    wait_for(lambda: asked(run, "wait_for_worker"), 60, "the lead's wait")
    (worker,) = spawned(run)
    done = operate(run, "cancel_worker", task_id=worker, reason="the WRONG branch")
    assert done["event"] == "op_acked"
    assert process.wait(LONG_S) == 1, "a worker was cancelled"
    assert check_done(run, "boss")["final_message"] == "done"
    assert answer_of(run, "wait_for_worker")["status"] == "Cancelled"
    assert f"[SYSTEM] {worker} was cancelled: the WRONG branch" in json.dumps(tree.requests(run, "boss")[-1])
    assert run.record(worker)["failure_reason"]["message"] == "the WRONG branch"
    check_nothing_lives(run)


# ------------------------------------------------------------------ deaths

def start_of(pid: int) -> str:
    """When a process was started: a pid alone may be used again."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


@real
def test_a_killed_dispatcher_and_a_tree_that_waits(tree):
    """Agents go on; the next dispatcher answers what they wait for, and hears what they have said."""
    text = prompt(
        together(spawn(tree.gate("one"), say("first")),
                 spawn(tree.gate("two"), ask("kv_set", path="/shared/go", value="now"), say("second")),
                 spawn(ask("kv_wait", path="/shared/go", timeout_secs=LONG_S),
                       say("third: ${1.entry.value}"))),
        together(wait("$1.task_id"), wait("$1#1.task_id"), wait("$1#2.task_id")),
        spawn(say("fourth")), wait("$3.task_id"), say("all four"))
    process, run = tree.start(text)
    wait_for_file(process, tree.begun("one"))
    wait_for_file(process, tree.begun("two"))
    wait_for(lambda: asked(run, "wait_for_worker") == 3, 60, "the lead's waits")
    workers = spawned(run)
    wait_for(lambda: any(asked(run, "kv_wait", name) for name in workers), 60, "a worker's wait")
    pids = {name: agent_pid(run, name) for name in ["boss", *workers]}
    began = {name: start_of(pid) for name, pid in pids.items()}
    process.kill()
    process.wait()
    tree.open("one")
    tree.open("two")
    wait_for(lambda: list(run.folder.glob("tasks/*/exit.1")), LONG_S, "the first worker's end")
    wait_for(lambda: any(asked(run, "kv_set", name) for name in workers), 60, "what is said to nobody")
    assert run.count("hand_ended") + run.count("kv_written") == 0
    living = [name for name, pid in pids.items() if alive(pid)]
    assert len(living) == 3 and [start_of(pids[name]) for name in living] == [began[name] for name in living]
    tree.home.pitboss("resume", run.name, timeout=LONG_S, check=0)
    assert check_done(run, "boss")["final_message"] == "all four"
    finals = [check_done(run, name)["final_message"] for name in spawned(run)]
    assert sorted(finals) == ["first", "fourth", "second", "third: now"]
    waited = [answer_of(run, "wait_for_worker", n)["final_message"] for n in range(4)]
    assert waited == ["first", "second", "third: now", "fourth"]
    assert len(tree.requests(run, "boss")) == 5, "nothing was asked twice"
    check_nothing_lives(run)


@real
def test_a_spawn_that_nobody_was_there_to_hear(tree):
    """It waits in the bridge, and happens once when the next dispatcher comes."""
    text = prompt(tree.gate("gate"), spawn(bash(f"echo ran >>{tree.path('ran')}"), say("spawned")),
                  wait("$2.task_id"), say("${3.final_message}"))
    process, run = tree.start(text)
    wait_for_file(process, tree.begun("gate"))
    process.kill()
    process.wait()
    tree.open("gate")
    wait_for(lambda: asked(run, "spawn_worker"), 60, "the call")
    tree.home.pitboss("resume", run.name, timeout=LONG_S, check=0)
    assert check_done(run, "boss")["final_message"] == "spawned"
    assert tree.path("ran").read_text() == "ran\n" and len(spawned(run)) == 1
    check_nothing_lives(run)


@real
@pytest.mark.parametrize("shim_too", [False, True])
def test_a_lead_that_was_killed_is_dealt_again(tree, shim_too):
    """In its session, with a digest of its workers, who go on; it waits for them anew."""
    text = prompt(
        together(spawn(tree.gate("gate"), say("first")), spawn(say("second"))),
        together(wait("$1.task_id"), wait("$1#1.task_id")),
        together(wait("$1.task_id"), wait("$1#1.task_id")),
        say("${3.final_message} ${3#1.final_message}"), words="Remember the word PLUM.")
    process, run = tree.start(text)
    wait_for_file(process, tree.begun("gate"))
    wait_for(lambda: asked(run, "wait_for_worker") == 2 and run.count("closed"), 60, "the lead's waits")
    session, claude = run.log("boss")[0]["session_id"], agent_pid(run, "boss")
    for pid in [shim_pid(run, "boss")] * shim_too + [claude]:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: asked(run, "wait_for_worker") == 4, LONG_S, "the second hand's waits")
    tree.open("gate")
    assert process.wait(60) == 0
    record = check_done(run, "boss", hands=2)
    assert (record["claude_session_id"], record["final_message"]) == (session, "first second")
    assert record["cost_usd"] > run.results("boss")[-1]["total_cost_usd"], "both hands are paid for"
    told = said_by_user(tree.requests(run, "boss")[-1])
    assert "PLUM" in told and "[SYSTEM] You were started again." in told
    first, second = spawned(run)
    states = {name: run.record(name)["final_message"] for name in (first, second)}
    for name, final in states.items():
        assert f"- {name}: {'Running' if final == 'first' else 'Completed'}; asked: " in told
        check_done(run, name)
    check_nothing_lives(run)


@real
def test_a_tree_is_cancelled(tree):
    """Lead and workers, and what their commands have started in sessions of their own."""
    def sleeper(name):
        pid = tree.path(name)
        return bash(f"env -i setsid sleep 600 & echo $! >{pid}.part; mv {pid}.part {pid}; sleep 600")

    text = prompt(together(spawn(sleeper("one"), say("never")), spawn(sleeper("two"), say("never"))),
                  together(wait("$1.task_id"), wait("$1#1.task_id")), say("never"))
    process, run = tree.start(text)
    for name in ("one", "two"):
        wait_for_file(process, tree.path(name))
    wait_for(lambda: asked(run, "wait_for_worker") == 2, 60, "the lead's waits")
    pids = [int(tree.path(name).read_text()) for name in ("one", "two")]
    assert all(map(alive, pids))
    tree.home.pitboss("cancel", run.name, "--reason", "enough", timeout=60, check=0)
    assert process.wait(30) == 1
    assert [record["status"] for record in run.records().values()] == ["Cancelled"] * 3
    assert run.summary()["was_interrupted"] is True
    check_nothing_lives(run, *pids)


@real
def test_a_finished_tree_is_dealt_again(tree):
    """A new run: the lead alone, its prompt again in its session; it spawns anew."""
    text = prompt(spawn(say("worked")), wait("$1.task_id"), say("it ${2.final_message}"),
                  words="Remember the word PLUM.")
    old = tree.dispatch(text)
    before = check_done(old, "boss")
    new = tree.resume(old)
    assert new.name != old.name
    assert json.loads((new.folder / "meta.json").read_text())["resumed_from"] == old.name
    after = check_done(new, "boss")
    assert after["claude_session_id"] == before["claude_session_id"]
    assert before["final_message"] == after["final_message"] == "it worked"
    assert said_by_user(tree.requests(new, "boss")[-1]).count("PLUM") == 2
    assert len(spawned(new)) == 1 and set(new.records()) == {"boss", *spawned(new)}
    worker, = spawned(new)
    assert check_done(new, worker)["claude_session_id"] != old.record(spawned(old)[0])["claude_session_id"]
    check_nothing_lives(new)


# ------------------------------------------------------------------ not the real claude

LATE = """#!{python}
import json, os, signal, sys

def tell(**event):
    print(json.dumps(event), flush=True)

def echo(line):
    message = json.loads(line)
    if message["type"] == "user":
        tell(**message, isReplay=True, session_id=session)
    return message

def end(*_):
    for line in sys.stdin:
        echo(line)
    os._exit(143)

if "--version" in sys.argv:
    sys.exit(print("2.1.197 (Claude Code)"))
again = "--resume" in sys.argv
session = sys.argv[sys.argv.index("--resume" if again else "--session-id") + 1]
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, end)
tell(type="system", subtype="init", session_id=session)
told = echo(sys.stdin.readline())["message"]["content"]
if again:
    tell(type="result", subtype="success", is_error=False, result="told: " + told, session_id=session,
         total_cost_usd=0, usage={{}}, modelUsage={{}})
    sys.exit()
open({begun!r}, "w").close()
while True:
    signal.pause()
"""


@pytest.mark.slow
def test_what_is_taken_up_at_the_very_end_is_told_again(home):
    """As a claude that is ended right after its echo: the session that goes on does not know the message."""
    begun, program = home.root / "begun", home.root / "claude"
    program.write_text(LATE.format(python=sys.executable, begun=str(begun)))
    program.chmod(0o755)
    home.env["PITBOSS_CLAUDE_BINARY"] = str(program)
    task = {"id": "a", "directory": str(home.repo()), "prompt": "x"}
    process = home.start("dispatch", home.manifest(manifest(task)))
    wait_for_file(process, begun)
    home.pitboss("reprompt", home.run_dir().name, "a", "do something else", timeout=60, check=0)
    assert process.wait(60) == 0
    record = Run(home.run_dir()).record()
    assert (record["status"], record["hands"]) == ("Success", 2)
    assert "do something else" in record["final_message"]


@real
def test_a_sublead_leads_its_own_workers(tree):
    """The root sees spawn_sublead, its sub-lead everything else of a lead; each knows its own layer only."""
    sub = prompt(ask("kv_get", path="/ref/plan"), spawn(ask("kv_set", path="/shared/found", value="gold"), say("found it")),
                 wait("$2.task_id"), ask("spawn_sublead", prompt="deeper", model=MODEL), say("the sub-lead is done"))
    text = prompt(
        together(ask("spawn_sublead", prompt=sub, model=MODEL, budget_usd=2, max_workers=2,
                     initial_ref={"plan": {"steps": 1}}),
                 ask("spawn_sublead", prompt=prompt(say("nothing to do")), model=MODEL, read_down=True)),
        together(ask("wait_actor", actor_id="$1.sublead_id"), ask("wait_actor", actor_id="$1#1.sublead_id")),
        ask("budget_status"), say("all is done"))
    run = tree.dispatch(text, lead={"allow_subleads": True})
    first, second = [e["actor"] for e in read_events(run.folder) if e["kind"] == "actor_added" and e["role"] == "sublead"]
    record, other = run.record(first), run.record(second)
    assert (record["status"], other["status"], record["final_message"]) == ("Success", "Success", "the sub-lead is done")
    worker, = [e["actor"] for e in read_events(run.folder) if e["kind"] == "actor_added" and e["role"] == "worker"]
    assert run.record(worker)["parent_task_id"] == first and run.record(first)["parent_task_id"] == "boss"
    assert json.loads(answer_of(run, "kv_get", actor=first)["entry"]["value"]) == {"steps": 1}
    assert "No such tool" in answer_of(run, "spawn_sublead", actor=first)
    spent = record["cost_usd"] + run.record(worker)["cost_usd"]
    told = {a["Sublead"]["sublead_id"]: a["Sublead"] for a in (answer_of(run, "wait_actor", n) for n in (0, 1))}
    assert told[first]["spent_usd"] == pytest.approx(spent) and told[first]["unspent_usd"] == pytest.approx(2 - spent)
    assert answer_of(run, "budget_status")["reserved_usd"] == 0
    for actor, tools in (("boss", LEADS_TOOLS | {"mcp__pitboss__spawn_sublead"}), (first, LEADS_TOOLS), (second, LEADS_TOOLS)):
        bodies = tree.requests(run, actor)
        assert bodies and [offered(body) for body in bodies] == [{"Bash", "Read"} | tools] * len(bodies)
