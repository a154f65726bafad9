"""Other people's MCP clients talk to a run through the bridge, as the agents of its actors do.

The official Python SDK (PITBOSS_TEST_MCP_SDK: a folder with the package `mcp`, 2.3 or newer) checks each
result against the schema that the tool declares; the MCP inspector (PITBOSS_TEST_INSPECTOR: its program
`mcp-inspector`) knows nothing of pitboss. Without them these tests are skipped.

    python3 -m pip install --target D mcp                               PITBOSS_TEST_MCP_SDK=D
    npm i --ignore-scripts --prefix D @modelcontextprotocol/inspector   its program: D/node_modules/.bin/

The agents of the runs are the scripted ones.
"""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import read_events, read_records, wait_for

SDK, INSPECTOR = os.environ.get("PITBOSS_TEST_MCP_SDK", ""), os.environ.get("PITBOSS_TEST_INSPECTOR", "")


def needs(path: str, what: str):
    """Marks a test that needs the program or folder at `path`, which the variable `what` names."""
    reason = f"{what} names {path}, which is not there" if path else f"{what} does not name one"
    return lambda test: pytest.mark.real(pytest.mark.skipif(not os.path.exists(path), reason=reason)(test))


# What the SDK is asked for, and what it makes of the answers: a JSON object on stdout.
CLIENT = """
import asyncio, json, sys
from mcp import ClientSession
from mcp.client.stdio import StdioServerParameters, stdio_client

seen, steps = {}, json.loads(sys.argv[2])

def shown(model):
    return model.model_dump(mode="json", by_alias=True, exclude_none=True)

async def call(session, tool, arguments, seconds=None):
    try:
        return shown(await session.call_tool(tool, arguments, read_timeout_seconds=seconds))
    except Exception as e:
        return {"raised": type(e).__name__, "words": str(e)}

async def main():
    with open(sys.argv[1]) as f:
        server = json.load(f)["mcpServers"]["pitboss"]
    async with stdio_client(StdioServerParameters(command=server["command"], args=server["args"])) as streams:
        async with ClientSession(*streams) as session:
            seen["initialize"] = shown(await session.initialize())
            seen["tools"] = shown(await session.list_tools())["tools"]
            seen["answers"] = []
            for step in steps:
                seen["answers"].append(await asyncio.gather(*(call(session, *one) for one in step)))
            await session.send_ping()
            seen["pinged"] = True
    print(json.dumps(seen))

asyncio.run(main())
"""


@pytest.fixture
def run(home):
    """The folder of a run whose lead `boss` waits for a file, with a worker `worker-1` that does, too."""
    home.repo()
    gate = f"until [ -e {home.root}/gate ]; do sleep 0.1; done"
    worker = json.dumps({"prompt": f"$ run touch {home.root}/begun; {gate}\n$ say worked"})
    process = home.start("dispatch", home.manifest(f"""
[run]
max_workers = 3
budget_usd = 5.0
[defaults]
agent = "demo"
[lead]
id = "boss"
directory = "repo"
prompt = '''
$ call spawn_worker {worker}
$ run {gate}
$ say done
'''
"""))

    def there():
        assert process.poll() is None, process.communicate()
        return (home.root / "begun").exists()

    wait_for(there, 60, "the worker")
    yield home.run_dir()
    (home.root / "gate").touch()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, (out, err)
    assert not list(home.run_dir().glob("sockets.log")), "a bug was reported"


def talk(home, run: Path, actor: str, *steps: list) -> dict:
    """What the SDK saw as this actor; each step is a list of calls that it makes at once."""
    script = home.root / "client.py"
    script.write_text(CLIENT)
    done = subprocess.run([sys.executable, str(script), str(run / "tasks" / actor / "mcp-config.json"),
                           json.dumps(steps)], env={**home.env, "PYTHONPATH": SDK}, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs(SDK, "PITBOSS_TEST_MCP_SDK")
def test_the_sdk_as_a_lead(home, run):
    """It spawns, waits for several at once, gives a wait up, is refused; every result is as declared."""
    spawn = ["spawn_worker", {"prompt": "$ run sleep 1\n$ say hello"}]
    wait = ["wait_for_worker", {"task_id": "worker-1"}]
    seen = talk(
        home, run, "boss", [spawn, spawn],
        [["wait_for_worker", {"task_id": "worker-2"}], ["wait_for_worker", {"actor_id": "worker-3"}],
         ["wait_for_any", {"task_ids": ["worker-1", "worker-3"], "timeout_secs": 60}]],
        [[*wait, 0.5], ["wait_for_worker", {"task_id": "worker-1", "timeout_secs": 0}],
         ["worker_status", {"task_id": "worker-1"}], ["list_workers", {}], ["budget_status", {}]],
        [["pause_worker", {"task_id": "worker-1", "mode": "freeze"}]],
        [["continue_worker", {"task_id": "worker-1"}]],
        [["wait_for_worker", {"task_id": "nobody"}], ["wait_for_worker", {}], ["no_such_tool", {}],
         ["wait_for_worker", {"task_id": "worker-1", "seconds": 1}]])
    assert seen["initialize"]["serverInfo"]["name"] == "pitboss" and seen["pinged"]
    names = {tool["name"] for tool in seen["tools"]}
    assert {"spawn_worker", "wait_for_any", "kv_set", "lease_acquire"} <= names
    spawned, settled, looked, (froze,), (thawed,), refused = seen["answers"]
    assert [a["structuredContent"]["task_id"] for a in spawned] == ["worker-2", "worker-3"]
    assert [a["structuredContent"]["final_message"] for a in settled[:2]] == ["hello", "hello"]
    assert settled[2]["structuredContent"]["task_id"] == "worker-3"
    assert json.loads(settled[0]["content"][0]["text"]) == settled[0]["structuredContent"]
    given_up, timed_out, status, listed, books = looked
    assert "raised" in given_up and "imed out" in given_up["words"]
    assert timed_out["structuredContent"] == {"settled": False, "state": "Running"}
    assert status["structuredContent"]["state"] == "Running"
    assert [row["state"] for row in listed["structuredContent"]["workers"]] == ["Running"] + ["Completed"] * 2
    assert books["structuredContent"]["workers_live"] == 1
    assert froze["structuredContent"] == thawed["structuredContent"] == {"ok": True}
    assert [a["isError"] for a in refused] == [True] * 4
    words = [a["content"][0]["text"] for a in refused]
    assert "unknown task_id: nobody" in words[0] and "task_id" in words[1] and "seconds" in words[3]
    assert "no_such_tool" in words[2]


@needs(SDK, "PITBOSS_TEST_MCP_SDK")
def test_the_sdk_as_a_worker(home, run):
    """The store and leases, and nothing of a lead's."""
    seen = talk(
        home, run, "worker-1",
        [["kv_set", {"path": "/shared/a", "value": "text"}],
         ["kv_set", {"path": "/shared/b", "value": [0, 255]}],
         ["kv_set", {"path": "/peer/self/c", "value": {"base64": "AP8="}}]],
        [["kv_get", {"path": "/shared/a"}], ["kv_get", {"path": "/shared/b"}],
         ["kv_get", {"path": "/peer/worker-1/c"}], ["kv_get", {"path": "/shared/none"}]],
        [["kv_cas", {"path": "/shared/a", "expected_version": 1, "new_value": "next"}],
         ["kv_cas", {"path": "/shared/a", "expected_version": 1, "new_value": "late"}]],
        [["kv_wait", {"path": "/shared/a", "timeout_secs": 60, "min_version": 2}],
         ["kv_wait", {"path": "/shared/none", "timeout_secs": 0.2}], ["kv_list", {"glob": "/shared/*"}]],
        [["kv_delete", {"path": "/shared/b"}], ["lease_acquire", {"name": "door", "ttl_secs": 60}],
         ["run_lease_acquire", {"key": "house", "ttl_secs": 60}]],
        [["lease_list", {}], ["run_lease_release", {"key": "house"}], ["spawn_worker", {"prompt": "x"}],
         ["kv_set", {"path": "/ref/x", "value": "no"}]])
    assert {tool["name"].partition("_")[0] for tool in seen["tools"]} == {"kv", "lease", "run"}
    wrote, read, swapped, waited, ended, last = ([a.get("structuredContent", a) for a in step]
                                                 for step in seen["answers"])
    assert wrote == [{"version": 1}] * 3
    assert [answer["entry"] and answer["entry"]["value"] for answer in read] == [
        "text", [0, 255], {"base64": "AP8="}, None]
    assert swapped == [{"version": 2, "swapped": True}, {"version": 2, "swapped": False}]
    assert waited[0]["entry"]["value"] == "next" and waited[1] == {"settled": False, "entry": None}
    assert [row["path"] for row in waited[2]["entries"]] == ["/shared/a", "/shared/b"]
    assert ended[0] == {"existed": True} and [lease["acquired"] for lease in ended[1:]] == [True, True]
    assert [lease["name"] for lease in last[0]["leases"]] == ["door"] and last[1] == {"ok": True}
    assert [a["isError"] for a in last[2:]] == [True, True]
    assert [e["actor"] for e in read_events(run) if e["kind"] == "actor_added"] == ["boss", "worker-1"]


# The SDK's other client asks for what only newer servers know, before it does as the one above.
AUTO_CLIENT = """
import asyncio, json, sys
from mcp import Client
from mcp.client.stdio import StdioServerParameters

async def main():
    with open(sys.argv[1]) as f:
        server = json.load(f)["mcpServers"]["pitboss"]
    async with Client(StdioServerParameters(command=server["command"], args=server["args"])) as client:
        tools = await client.list_tools()
        books = await client.call_tool("budget_status", {})
        workers = books.structured_content["max_workers"]
        print(json.dumps([client.protocol_version, len(tools.tools), workers]))

asyncio.run(main())
"""


@needs(SDK, "PITBOSS_TEST_MCP_SDK")
def test_the_sdk_that_asks_for_a_newer_protocol(home, run):
    """It is told that there is no such method, and takes the newest version that both know."""
    script = home.root / "client.py"
    script.write_text(AUTO_CLIENT)
    done = subprocess.run([sys.executable, str(script), str(run / "tasks" / "boss" / "mcp-config.json")],
                          env={**home.env, "PYTHONPATH": SDK}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    version, tools, max_workers = json.loads(done.stdout)
    assert (version, max_workers) == ("2025-11-25", 3) and tools > 10


def inspect(home, run: Path, actor: str, method: str, *args: str) -> dict:
    """What the inspector prints for one method."""
    done = subprocess.run([INSPECTOR, "--cli", "--config", str(run / "tasks" / actor / "mcp-config.json"),
                           "--server", "pitboss", "--method", method, *args], env=home.env,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs(INSPECTOR, "PITBOSS_TEST_INSPECTOR")
def test_the_inspector(home, run):
    """Each command line of it is a client of its own, of an actor that has its agent as well."""
    call = ("boss", "tools/call", "--tool-name")
    wait = (*call, "wait_for_worker", "--tool-arg")
    tools = {tool["name"]: tool for tool in inspect(home, run, "boss", "tools/list")["tools"]}
    assert tools["wait_for_worker"]["annotations"]["readOnlyHint"] is True
    assert tools["wait_for_worker"]["inputSchema"]["required"] == ["task_id"]
    workers = {tool["name"] for tool in inspect(home, run, "worker-1", "tools/list")["tools"]}
    assert workers < set(tools) and "spawn_worker" not in workers
    set_it = inspect(home, run, *call, "kv_set", "--tool-arg", "path=/shared/x", "value=seen by all")
    assert set_it["structuredContent"] == {"version": 1}
    got = inspect(home, run, "worker-1", *call[1:], "kv_get", "--tool-arg", "path=/shared/x")
    assert got["structuredContent"]["entry"]["value"] == "seen by all"
    spawned = inspect(home, run, *call, "spawn_worker", "--tool-arg", "prompt=$ say hello")
    assert spawned["structuredContent"]["task_id"] == "worker-2"
    settled = inspect(home, run, *wait, "task_id=worker-2", "timeout_secs=60")
    assert settled["structuredContent"]["final_message"] == "hello"
    refused = inspect(home, run, *wait, "task_id=nobody")
    assert refused["isError"] is True and "unknown task_id: nobody" in refused["content"][0]["text"]
