"""`watch` says in plain lines what changes in a run, ends with it, and can wait for what needs an operator."""
from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

import pitboss
from stage import DEADLINE_S
from tools import Home, processes_with, read_events, wait_for


class Watch:
    """A `watch` that runs, and the lines that it has printed so far."""

    def __init__(self, home: Home, *args) -> None:
        self.path = home.root / f"watch.{time.monotonic_ns()}"
        self.out = open(self.path, "w")
        self.process = home.start("watch", *args, stdout=self.out)

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines()

    def said(self, *words: str, deadline_s: float = DEADLINE_S) -> str:
        """The first line that has all these words."""
        def look():
            found = [line for line in self.lines() if all(w in line for w in words)]
            assert found or self.process.poll() is None, (words, self.lines(), self.process.stderr.read())
            return found
        return wait_for(look, deadline_s, f"{words} in {self.lines()}")[0]

    def end(self, code: int = 0) -> list[str]:
        """Its lines when it has left by itself."""
        found, err = self.process.wait(DEADLINE_S), self.process.stderr.read()
        assert found == code, (found, err, self.lines())
        assert "Traceback" not in err
        self.out.close()
        return self.lines()


def test_one_line_for_each_change_until_the_end(stage, home):
    run = stage(lead="allow_subleads = true", workers=4)
    lead, operator = run.lead(), run.operator()
    watch, told = Watch(home, run.run.name), Watch(home, run.run.name, "--json")
    assert watch.said(run.run.name, "running: 1 running")
    told.said('"begin"')
    name = run.spawn(lead, "$ run sleep 600")
    watch.said(f"{name}: hand 1 runs")
    assert "for boss (demo" in watch.said(f"{name}: new worker")
    operator.op("pause_worker", task_id=name, mode="freeze")
    watch.said(f"{name}: frozen")
    operator.op("continue_worker", task_id=name)
    watch.said(f"{name}: goes on")
    operator.op("pause_worker", task_id=name)
    watch.said(f"{name}: paused")
    operator.op("continue_worker", task_id=name, prompt="$ run sleep 600")
    watch.said(f"{name}: hand 2 runs")
    operator.op("reprompt_worker", task_id=name, prompt="$ fail no \x1b[31mluck")
    watch.said(f"{name}: is to be told: $ fail no luck")
    watch.said(f"{name}: was told")
    assert "tokens" in watch.said(f"{name}: ✗ Failed", "no luck")
    lead.start("request_approval", {"summary": "may I", "cost_estimate": 2})
    line = watch.said("boss: asks (cost): may I")
    request = line.split()[-1]
    assert f"pitboss approve {run.run.name} {request}" in line
    operator.op("approve", request_id=request, approved=False, reason="too dear")
    watch.said(f"boss: {request} rejected by an operator: too dear")
    sub = lead.call("spawn_sublead", prompt="$ say x", model="claude-sonnet-4-6", budget_usd=1, max_workers=1)["sublead_id"]
    watch.said(f"{sub}: it and its workers are at their end (success), $")
    run.finish(1)
    lines = watch.end()
    assert lines[-1].startswith("run finished: 3 actors, 2 failed, $") and len(lines) == len(set(lines))
    assert not any("\x1b" in line for line in lines)
    rows = [json.loads(line) for line in told.end()]
    assert [r["text"] for r in rows][1:] == lines[1:]
    assert [r["seq"] for r in rows] == sorted(r["seq"] for r in rows)
    assert {"seq", "at", "event", "text"} <= set.intersection(*(set(r) for r in rows))
    assert next(r for r in rows if r["event"] == "frozen")["state"] == "Frozen"
    assert rows[-1]["event"] == "run_finished"
    assert Watch(home, run.run.name).end()[0].startswith(f"{run.run.name}  m  complete: 3 settled; 2 failed")


def test_it_waits_for_what_needs_an_operator_and_then_for_the_next(stage, home):
    run = stage()
    lead, name = run.lead(), run.run.name
    assert Watch(home, name, "--until", "attention", "--timeout", "0.3").end(1)[1:] == []
    waits = Watch(home, name, "--until", "attention", "--json")
    waits.said('"begin"')
    failed = lead.call("spawn_worker", prompt="$ fail no")["task_id"]
    last = json.loads(waits.end()[-1])
    assert last["event"] == "attention" and last["actor"] == failed
    assert (last["need"]["kind"], last["need"]["advice"]) == ("failure", f"pitboss attach {name} {failed}")
    assert last["need"]["text"] == "Failed  no"
    again = Watch(home, name, "--until", "attention", "--json")         # it still stands
    assert json.loads(again.end()[-1])["need"]["kind"] == "failure"
    since = json.loads(again.lines()[-1])["seq"]
    waits = Watch(home, name, "--until", "attention", "--json", "--since", since)
    lead.start("request_approval", {"summary": "may I"})
    last = json.loads(waits.end()[-1])
    assert last["need"]["kind"] == "approval" and last["need"]["request_id"] and last["actor"] == "boss"
    run.operator().op("approve", request_id=last["need"]["request_id"], approved=True)
    waits = Watch(home, name, "--until", "attention", "--since", last["seq"])
    waits.said("approved by an operator")
    run.finish(1)
    assert waits.end()[-1].startswith("run finished: ")


def test_a_dispatcher_that_dies_needs_somebody_and_its_return_is_told(stage, home):
    run = stage()
    lead = run.lead()
    run.spawn(lead, "$ run sleep 600")
    plain = Watch(home, run.run.name)
    waits = Watch(home, run.run.name, "--until", "attention")
    plain.said("running: 2 running")
    waits.said("running: 2 running")
    run.process.kill()
    run.process.wait()
    assert waits.end()[-1] == f"needs you: its dispatcher died; 2 agents live without it: pitboss resume {run.run.name}"
    plain.said("its dispatcher died; 2 agents live without it")
    (run.run / "sockets.json").unlink()
    run.process = home.start("resume", run.run.name, stdout=run.log, stderr=run.log)
    plain.said(f"a dispatcher deals the run (process {run.process.pid})")
    run.finish(0)
    assert sum("its dispatcher died" in line for line in plain.end()) == 1


def test_who_is_silent_for_long_is_told_of_once(stage, home):
    """Ten minutes are made of a log that is as old."""
    run = stage(script="$ run sleep 600")
    run.running(run.lead(), "boss")
    run.operator().op("pause_worker", task_id="boss", mode="freeze")
    watch = Watch(home, run.run.name)
    assert watch.said("needs you: boss is frozen") == (f"needs you: boss is frozen, and nothing else of the run goes on: "
                                                       f"pitboss continue {run.run.name} boss")
    shown = home.pitboss("status", run.run.name, check=0).stdout
    assert f"boss is frozen, and nothing else of the run goes on: pitboss continue {run.run.name} boss" in shown
    rows = json.loads(home.pitboss("status", run.run.name, "--json", check=0).stdout)["attention"]
    assert [(r["kind"], r["actor"]) for r in rows] == [("rest", "boss")]
    home.pitboss("cancel", run.run.name, check=0)
    assert sum("needs you" in line for line in watch.end()) == 1


@pytest.mark.parametrize("args, code, words", [
    (("ffff",), 3, ["no run ffff"]), (("RUN", "--until", "lunch"), 2, ["lunch", "attention"]),
    (("RUN", "--timeout", "-1"), 2, ["-1"]), (("RUN", "--timeout", "soon"), 2, ["soon", "90m", "seconds"]),
    (("RUN", "--since", "x"), 2, ["x"]), ((), 2, ["RUN"])])
def test_what_cannot_be_watched_is_said(home, args, code, words):
    folder = home.runs / "0192f3aa-0000-7000-8000-000000000001"
    folder.mkdir(parents=True)
    said = home.pitboss("watch", *(folder.name if a == "RUN" else a for a in args), check=code)
    assert all(word in said.stderr for word in words) and said.stdout == ""


def test_another_tools_run_is_refused_in_words(home):
    folder = home.runs / "0192f3aa-0000-7000-8000-000000000001"
    (folder / "tasks").mkdir(parents=True)
    (folder / "meta.json").write_text("{}")
    assert "another tool" in home.pitboss("watch", folder.name, check=4).stderr


def test_a_reader_that_goes_away_ends_it_quietly(stage, home):
    run = stage()
    process = home.start("watch", run.run.name)
    assert run.run.name in process.stdout.readline()
    process.stdout.close()
    run.lead().call("spawn_worker", prompt="$ say x")
    assert process.wait(DEADLINE_S) == 0 and process.stderr.read() == ""
    other = home.start("watch", run.run.name)
    other.stdout.readline()
    other.send_signal(signal.SIGINT)
    assert other.wait(DEADLINE_S) == 130 and "Traceback" not in other.stderr.read()
    run.finish(0)


def cpu_s(pid: int) -> float:
    """What a process has used of a processor, seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_watching_a_run_in_which_nothing_happens_costs_nothing(stage, home):
    run = stage()
    watch = Watch(home, run.run.name)
    watch.said("running")
    began, used = time.monotonic(), cpu_s(watch.process.pid)
    wait_for(lambda: time.monotonic() - began > 3, 10)
    assert cpu_s(watch.process.pid) - used <= 0.06               # of one core 2 %, counted in ticks of 10 ms
    run.finish(0)
    watch.end()


def test_every_change_that_has_words_is_a_kind_of_event():
    assert set(pitboss.CHANGES) <= set(pitboss.EVENTS)


@pytest.mark.parametrize("path", sorted((Path(__file__).resolve().parent / "data" / "journals").glob("*.jsonl")),
                         ids=lambda path: path.stem)
def test_recorded_journals_read_well(path):
    """Every line is plain and names somebody, and the last one tells the end."""
    run, lines = pitboss.RunState(), []
    for event in map(json.loads, path.read_text().splitlines()):
        pitboss.step(run, event)
        lines += pitboss.render_watched(run, event)
    assert lines and lines[-1].startswith("run finished: ")
    assert all(line == line.strip() and "\n" not in line and "None" not in line for line in lines)
    assert not any(line.startswith("$") for line in lines)       # a prompt of several lines
    assert pitboss.render_standing(run, "complete").endswith(f"{run.failed} failed")
    for name in run.actors:
        assert any(line.startswith(f"{name}: ") for line in lines)


def test_status_reads_what_nobody_else_reads(stage, home):
    """Without a dispatcher the logs tell what was used since, and what was said last; with hands before it in the sum."""
    run = stage(script="$ say begun\n$ run sleep 600")
    run.running(run.lead(), "boss")
    run.operator().op("pause_worker", task_id="boss")
    run.operator().op("continue_worker", task_id="boss", prompt="$ print 9000\n$ say the last words\n$ run sleep 600")
    log = run.run / "tasks/boss/stdout.log"
    wait_for(lambda: log.read_bytes().count(b'"command":"sleep 600"') == 2, DEADLINE_S, "the second hand at work")
    run.process.kill()
    run.process.wait()
    first = next(e for e in read_events(run.run) if e["kind"] == "hand_ended")
    seen = json.loads(home.pitboss("status", run.run.name, "--json", check=0).stdout)
    [boss] = seen["actors"]
    assert seen["state"] == "stale" and boss["state"] == "Running"
    assert boss["token_usage"]["output"] >= first["usage"][1] + 9000 / pitboss.CHARS_PER_TOKEN * 0.9
    assert boss["cost_usd"] > first["cost_usd"] and seen["total_cost_usd"] == boss["cost_usd"]
    assert "2  Bash" in home.pitboss("status", run.run.name, check=0).stdout         # what it did last


@pytest.mark.parametrize("ended", [True, False])
def test_a_dispatcher_that_left_after_its_last_line_did_not_die(tmp_path, capsys, ended):
    """The lock is free a moment after the end is written: who looked before that and then at the lock looks again."""
    lines = (Path(__file__).resolve().parent / "data/journals/plain.jsonl").read_text().splitlines(keepends=True)
    journal, end = tmp_path / "journal.jsonl", next(n for n, line in enumerate(lines) if '"run_finished"' in line)
    journal.write_text("".join(lines[:end]))
    (tmp_path / "lock").write_text('{"pid": 1, "host": "gone"}')
    watcher = pitboss.Watcher(str(tmp_path), None, False)
    watcher.begin()
    if ended:
        with journal.open("a") as f:
            f.write("".join(lines[end:]))
    kinds = {need.kind for need in watcher.needs()}
    assert ("dispatcher" in kinds) is not ended and "failure" in kinds
    assert ("run finished: " in capsys.readouterr().out) is ended
