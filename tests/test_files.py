"""What is written is whole or not there, also when the disk is full, a line is torn, or two want one run.

Faults come from calls of the operating system, exchanged for one test: a write that is short or says ENOSPC.
"""
from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import random
import subprocess
import sys
import threading
import uuid
from pathlib import Path

import pytest

import pitboss
from tools import wait_for

BIG = "x" * (pitboss.BLOB_FROM + 1)


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def journals(run_dir):
    """A function that opens the run's journal where it ends now; all are closed at the end of the test."""
    opened = []

    def open_journal(mask=pitboss.make_mask(())) -> pitboss.Journal:
        run = pitboss.fold_run(str(run_dir)) if (run_dir / "journal.jsonl").exists() else pitboss.RunState()
        opened.append(pitboss.Journal(str(run_dir), mask, run.seq, run.last_at))
        return opened[-1]
    yield open_journal
    for journal in opened:
        os.close(journal.fd)


def read(run_dir: Path) -> list[dict]:
    return list(pitboss.read_journal(str(run_dir / "journal.jsonl")))


def fail_with(number: int):
    def fail(*_args, **_named):
        raise OSError(number, os.strerror(number))
    return fail


# ------------------------------------------------------------------ names

def test_run_ids_are_uuids_ordered_by_time():
    chance = random.Random(8)
    moments = sorted(chance.uniform(0, 4e9) for _ in range(500))
    ids = [pitboss.mint_run_id(at) for at in moments]
    for at, run_id in zip(moments, ids):
        parsed = uuid.UUID(run_id)
        assert parsed.version == 7 and parsed.variant == uuid.RFC_4122 and str(parsed) == run_id
        assert re.fullmatch(pitboss.RUN_ID, run_id) and int(run_id.replace("-", "")[:12], 16) == int(at * 1000)
    assert ids == sorted(ids)
    assert len({pitboss.mint_run_id(1.0) for _ in range(1000)}) == 1000
    assert uuid.UUID(pitboss.mint_uuid()).version == 4


@pytest.mark.parametrize("env, folder", [
    ({"XDG_DATA_HOME": "/d", "HOME": "/h"}, "/d/pitboss/runs"),
    ({"HOME": "/h"}, "/h/.local/share/pitboss/runs"),
    ({"XDG_DATA_HOME": "", "HOME": "/h"}, "/h/.local/share/pitboss/runs"),
])
def test_where_runs_are(env, folder):
    assert pitboss.runs_folder(env) == folder
    assert pitboss.runs_folder(env, "/else/where/") == "/else/where"


def test_a_run_is_found_by_the_beginning_of_its_id(tmp_path):
    ids = ["01a1fec3-9ee4-7b50-855b-ae40a9d45f4d", "01a1fec3-9ee5-7b50-855b-ae40a9d45f4d",
           "02a1fec3-9ee4-7b50-855b-ae40a9d45f4d"]
    for name in (*ids, ".new-" + ids[0], ".sessions", "notes", ids[0] + "-copy"):
        (tmp_path / name).mkdir()
    assert pitboss.list_runs(str(tmp_path)) == ids[::-1], "newest first, and nothing that is no run"
    for prefix, found in ((ids[0], ids[0]), ("02", ids[2]), ("01A1FEC3-9EE5", ids[1])):
        assert pitboss.find_run(str(tmp_path), prefix) == str(tmp_path / found)
    with pytest.raises(pitboss.NotFound) as error:
        pitboss.find_run(str(tmp_path), "01")
    assert ids[0] in str(error.value) and ids[1] in str(error.value) and ids[2] not in str(error.value)
    for prefix in ("03", "", ".", "..", "../x", "/", str(tmp_path / ids[0]),
                   "01a1fec3-9ee4-7b50-855b-ae40a9d45f4d-copy"):
        with pytest.raises(pitboss.NotFound):
            pitboss.find_run(str(tmp_path), prefix)
    assert pitboss.list_runs(str(tmp_path / "nothing")) == []


# ------------------------------------------------------------------ whole files

def test_everything_is_private_under_the_loosest_umask(run_dir, journals):
    before = os.umask(0)
    try:
        journal = journals()
        journal.append("x", {"text": BIG})
        os.write(journal.fd, b"{torn")
        pitboss.mend_journal(journal.path)
        pitboss.write_file(str(run_dir / "a.json"), b"{}")
        pitboss.keep_reserve(str(run_dir))
        os.close(pitboss.take_lock(str(run_dir)))
        (run_dir / "tasks").mkdir(0o700)
        assert pitboss.fence_off(str(run_dir / "tasks"), 1)
    finally:
        os.umask(before)
    paths = sorted(run_dir.rglob("*"))
    assert {p.name for p in paths} >= {"journal.jsonl", "journal.torn", "blobs", "a.json", "reserve", "lock",
                                       "hand.1"}
    modes = {str(p.relative_to(run_dir)): p.stat().st_mode & 0o777 for p in paths}
    assert {n: oct(m) for n, m in modes.items() if m != (0o700 if (run_dir / n).is_dir() else 0o600)} == {}


def test_a_written_file_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    kept = path.open("rb")
    pitboss.write_file(str(path), b"new" * 100_000)
    assert path.read_bytes() == b"new" * 100_000
    assert kept.read() == b"old", "a reader of the old one is not disturbed"
    kept.close()
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_half_one(tmp_path, monkeypatch, call):
    path = tmp_path / "f"
    path.write_bytes(b"old")
    real = os.write
    if call == "write":
        calls = iter((lambda fd, data: real(fd, bytes(data)[:5]), fail_with(errno.ENOSPC)))
        monkeypatch.setattr(os, "write", lambda fd, data: next(calls)(fd, data))
    else:
        monkeypatch.setattr(os, call, fail_with(errno.EIO))
    with pytest.raises(OSError):
        pitboss.write_file(str(path), b"new" * 100, durable=True)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_short_writes_go_on_where_they_stopped(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:7]))
    pitboss.write_file(str(tmp_path / "f"), bytes(range(256)))
    assert (tmp_path / "f").read_bytes() == bytes(range(256))


def test_json_documents_come_back_as_they_were(tmp_path):
    value = {"a": 1, "rows": [{"x": [1, {"y": None}]}, {"z": "ä\ud800\n"}], "none": [], "list": [1, "b"],
             "d": {"e": {}}}
    pitboss.write_json(str(tmp_path / "f"), value, pitboss.make_mask(()))
    assert pitboss.read_json(str(tmp_path / "f")) == value
    assert len((tmp_path / "f").read_text().splitlines()) == 2 + 5 + 3, "one line a key, and one a row"
    with pytest.raises(ValueError):
        pitboss.write_json(str(tmp_path / "f"), {"a": float("nan")}, pitboss.make_mask(()))
    assert pitboss.read_json(str(tmp_path / "f")) == value
    for broken in (b"", b"{", b"\xff", b"nul"):
        (tmp_path / "g").write_bytes(broken)
        assert pitboss.read_json(str(tmp_path / "g")) is None
    assert pitboss.read_json(str(tmp_path / "missing")) is None


# ------------------------------------------------------------------ the journal

def test_events_are_ascii_lines_that_come_back_as_they_went_in(run_dir, journals):
    facts = {"text": "ä漢\ud800\n\x00\"", "list": [1, 2.5, None, True], "inner": {"a": {"b": []}}}
    written = [journals().append("first", facts), journals().append("second", {})]
    assert read(run_dir) == written and [e["seq"] for e in written] == [1, 2]
    assert {k: written[0][k] for k in facts} == facts
    (run_dir / "journal.jsonl").read_bytes().decode("ascii")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_refused(run_dir, journals, number):
    journal = journals()
    journal.append("good", {})
    with pytest.raises(ValueError):
        journal.append("bad", {"a": {"b": [number]}})
    journal.append("good", {})
    assert [(e["seq"], e["kind"]) for e in read(run_dir)] == [(1, "good"), (2, "good")]


def test_time_never_goes_back(run_dir, journals, monkeypatch):
    journal = journals()
    moments = [journal.append("x", {})["at"] for _ in range(3)]
    monkeypatch.setattr(pitboss.time, "time", lambda: 1_000_000.0)        # somebody set the clock back
    moments += [journal.append("x", {})["at"] for _ in range(3)]
    moments += [journals().append("x", {})["at"]
                for _ in range(3)]      # the next dispatcher goes on from there
    assert moments == sorted(moments) and moments[-1] - moments[0] < 60
    monkeypatch.setattr(pitboss.time, "time", lambda: 3e9)
    assert journals().append("x", {})["at"] >= 3e9, "after a restart the clock is believed when it is ahead"


def test_time_is_monotonic_time(journals, monkeypatch):
    journal = journals()
    mono = journal.base_mono
    monkeypatch.setattr(pitboss.time, "monotonic", lambda: mono + 100.0)
    assert journal.now() == pytest.approx(journal.base_at + 100)


@pytest.mark.parametrize("how", ["short", "nothing", "error"])
def test_a_line_that_did_not_fit_is_taken_back_and_the_reserve_given_up_once(run_dir, journals, monkeypatch,
                                                                             how):
    journal, real, refuse = journals(), os.write, [True]
    pitboss.keep_reserve(str(run_dir))
    assert (run_dir / "reserve").stat().st_size == pitboss.RESERVE
    journal.append("first", {})

    def write(fd, data):
        if fd != journal.fd or not refuse or (len(refuse) == 1 and not (run_dir / "reserve").exists()):
            return real(fd, data)
        written = real(fd, bytes(data)[:len(data) // 2]) if how == "short" else 0
        if how == "error":
            raise OSError(errno.ENOSPC, "No space left on device")
        return written
    monkeypatch.setattr(os, "write", write)
    assert journal.full is False
    journal.append("second", {})              # there is room again once the reserve is gone
    assert journal.full is True and not (run_dir / "reserve").exists()
    assert [(e["seq"], e["kind"]) for e in read(run_dir)] == [(1, "first"), (2, "second")]
    refuse.append(True)                       # and then there is none
    with pytest.raises(pitboss.EnvironmentFault) as error:
        journal.append("third", {})
    assert "make room" in error.value.hint and "resume" in error.value.hint
    refuse.clear()
    journal.append("fourth", {})
    assert [(e["seq"], e["kind"]) for e in read(run_dir)] == [(1, "first"), (2, "second"), (3, "fourth")]


def test_another_error_leaves_the_reserve_and_the_journal_as_they_were(run_dir, journals, monkeypatch):
    journal = journals()
    pitboss.keep_reserve(str(run_dir))
    journal.append("first", {})
    monkeypatch.setattr(os, "write", fail_with(errno.EIO))
    with pytest.raises(pitboss.EnvironmentFault) as error:
        journal.append("second", {})
    monkeypatch.undo()
    assert "journal" in str(error.value) and (run_dir / "reserve").exists() and journal.full is False
    assert [e["kind"] for e in read(run_dir)] == ["first"]


@pytest.mark.parametrize("name", pitboss.NO_ROOM)
def test_what_says_that_there_is_no_room(name):
    assert pitboss.has_no_room(OSError(getattr(errno, name), "x"))
    assert "make room" in pitboss.fault_of(OSError(getattr(errno, name), "x", "/f"), "doing").hint
    assert not pitboss.has_no_room(OSError(errno.EIO, "x"))
    assert str(pitboss.fault_of(OSError(errno.EACCES, "Permission denied", "/f"),
                                "doing it")) == "doing it: Permission denied: /f"


# ------------------------------------------------------------------ torn and broken

def whole_journal(run_dir: Path, journals) -> bytes:
    journal = journals()
    for n in range(4):
        journal.append("event", {"n": n, "text": "ä\ud800" * n})
    return (run_dir / "journal.jsonl").read_bytes()


def test_a_tail_that_was_torn_anywhere_is_set_aside_and_the_count_goes_on(run_dir, journals):
    raw, path = whole_journal(run_dir, journals), run_dir / "journal.jsonl"
    ends = [n + 1 for n, byte in enumerate(raw) if byte == ord("\n")]
    for cut in range(len(raw) + 1):
        path.write_bytes(raw[:cut])
        (run_dir / "journal.torn").unlink(missing_ok=True)
        whole = max([0] + [end for end in ends if end <= cut])
        assert len(read(run_dir)) == ends.index(whole) + 1 if whole else read(run_dir) == []
        assert pitboss.mend_journal(str(path)) == cut - whole
        assert path.read_bytes() == raw[:whole]
        torn = (run_dir / "journal.torn").read_bytes() if cut > whole else b"\n"
        assert torn == raw[whole:cut] + b"\n"
    path.write_bytes(raw[:-9])
    pitboss.mend_journal(str(path))
    journals().append("after", {})
    assert [(e["seq"], e["kind"]) for e in read(run_dir)] == [(1, "event"), (2, "event"), (3, "event"),
                                                              (4, "after")]


@pytest.mark.parametrize("tail", [b"{", b"\x00" * 4096, b"\xff\xfe\n", b"{}\n", b"[1]\n", b'{"seq":5}\n',
                                  b"null\n", b"[" * 50_000 + b"\n",
                                  b'{"seq":"5","at":1.0,"kind":"x"}\n', b'{"seq":5,"at":"x","kind":"x"}\n'],
                         ids=range(10))
def test_a_last_line_that_is_no_event_is_torn(run_dir, journals, tail):
    raw, path = whole_journal(run_dir, journals), run_dir / "journal.jsonl"
    path.write_bytes(raw + tail)
    assert len(read(run_dir)) == 4
    assert pitboss.mend_journal(str(path)) == len(tail)
    assert path.read_bytes() == raw and (run_dir / "journal.torn").read_bytes() == tail + b"\n"
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("line", [1, 2, 3])
def test_a_broken_line_in_the_middle_is_an_error_that_names_it(run_dir, journals, line):
    lines, path = whole_journal(run_dir, journals).splitlines(keepends=True), run_dir / "journal.jsonl"
    lines[line - 1] = b'{"seq": nonsense}\n'
    raw = b"".join(lines)
    path.write_bytes(raw)
    with pytest.raises(pitboss.JournalError) as error:
        read(run_dir)
    assert f"{path}:{line}:" in str(error.value) and error.value.hint
    pitboss.mend_journal(str(path))
    assert path.read_bytes() == raw, "nothing is thrown away for it"
    with pytest.raises(pitboss.JournalError):
        pitboss.fold_run(str(run_dir))


def test_torn_tails_of_several_crashes_are_all_kept(run_dir, journals):
    for n in range(3):
        journal = journals()
        journal.append("x", {})
        os.write(journal.fd, b'{"torn":%d' % n)
        pitboss.mend_journal(journal.path)
    assert (run_dir / "journal.torn").read_bytes() == b'{"torn":0\n{"torn":1\n{"torn":2\n'
    assert [e["seq"] for e in read(run_dir)] == [1, 2, 3]


def test_a_journal_that_is_missing_is_a_fault(run_dir):
    with pytest.raises(pitboss.EnvironmentFault):
        read(run_dir)


# ------------------------------------------------------------------ blobs

TEXTS = (BIG, "ä漢" * 3000, "\ud800\udfff" * 3000, "\x00" * 5000, "line\n" * 2000)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_long_text_lies_beside_the_journal_and_comes_back(run_dir, journals, text):
    event = journals().append("x", {"final": text, "short": "y" * pitboss.BLOB_FROM})
    assert event["final"]["head"] == text[:200] and event["short"] == "y" * pitboss.BLOB_FROM
    data = text.encode("utf-8", "surrogatepass")
    assert event["final"]["blob"] == hashlib.sha256(data).hexdigest()
    assert (run_dir / "blobs" / event["final"]["blob"]).read_bytes() == data
    assert pitboss.get_blob(str(run_dir), read(run_dir)[0]["final"]) == text


def test_what_is_no_blob_is_itself_and_a_lost_one_is_its_beginning(run_dir):
    for value in (None, "text", {"other": 1}, 7):
        assert pitboss.get_blob(str(run_dir), value) == value
    assert pitboss.get_blob(str(run_dir), {"blob": "0" * 64, "head": "begin"}) == "begin"
    (run_dir / "blobs").mkdir()
    (run_dir / "secret").write_text("no")
    assert pitboss.get_blob(str(run_dir),
                            {"blob": "../secret", "head": "begin"}) == "begin", "a name is never a path"


def watch_calls(monkeypatch, run_dir: Path) -> list[str]:
    """The names of the files that are written, forced to disk and renamed, as it happens."""
    seen = []

    def name_of(fd: int) -> str:
        return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
    real = {name: getattr(os, name) for name in ("write", "fsync", "replace")}
    monkeypatch.setattr(os, "write", lambda fd,
                        data: (seen.append(f"write {name_of(fd)}"), real["write"](fd, data))[1])
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(f"fsync {name_of(fd)}"), real["fsync"](fd))[1])
    monkeypatch.setattr(os, "replace", lambda a,
                        b: (seen.append(f"rename {os.path.basename(b)}"), real["replace"](a, b))[1])
    return seen


@pytest.mark.skipif(sys.platform != "linux", reason="names of descriptors come from /proc")
def test_a_blob_is_on_disk_before_the_event_that_names_it(run_dir, journals, monkeypatch):
    journal = journals()
    seen = watch_calls(monkeypatch, run_dir)
    blob = journal.append("x", {"final": BIG})["final"]["blob"]
    order = [next(n for n, call in enumerate(seen) if call.startswith(start))
             for start in (f"write {blob}", f"fsync {blob}", f"rename {blob}", "write journal.jsonl")]
    assert order == sorted(order), seen
    seen.clear()
    journal.append("x", {"final": BIG})
    assert seen == ["write journal.jsonl"], "the same text is kept once"


def test_where_there_is_no_room_for_a_blob_its_beginning_is_kept(run_dir, journals, monkeypatch):
    journal, real = journals(), os.write
    pitboss.keep_reserve(str(run_dir))
    monkeypatch.setattr(os, "write", lambda fd,
                        data: real(fd, data) if fd == journal.fd else fail_with(errno.ENOSPC)())
    event = journal.append("x", {"final": "begin " + BIG})
    assert journal.full and not (run_dir / "reserve").exists()
    assert pitboss.get_blob(str(run_dir), event["final"]).startswith("begin xxx")
    assert os.listdir(run_dir / "blobs") == []


# ------------------------------------------------------------------ secrets

def test_secrets_do_not_reach_the_journal_or_its_blobs(run_dir, journals):
    secret, token = 'pass"word\\with\nall', "ghp_" + "a1" * 18
    journal = journals(pitboss.make_mask([{"DB_PASSWORD": secret}]))
    long = f"{BIG} {secret} {token}"
    event = journal.append("hand_ended", {"actor": "a", "final": long, "leftovers": [f"7 psql {secret}"],
                                          "reason": {"kind": "unknown", "message": f"a\n{token}\n{secret}"}})
    assert read(run_dir) == [event], "every line is still JSON, and what was stepped is what was written"
    assert event["reason"] == {"kind": "unknown",
                               "message": "a\n***\n***"} and event["leftovers"] == ["7 psql ***"]
    assert pitboss.get_blob(str(run_dir), event["final"]) == f"{BIG} *** ***"
    everything = b"".join(p.read_bytes() for p in run_dir.rglob("*") if p.is_file())
    for form in (secret, json.dumps(secret)[1:-1], token):
        assert form.encode() not in everything


# ------------------------------------------------------------------ the lock

HOLD = """import sys; sys.path.insert(0, sys.argv[1]); import pitboss
pitboss.take_lock(sys.argv[2]); print("held", flush=True); sys.stdin.read()"""


@pytest.fixture
def holder(run_dir):
    """Another process that holds the run."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(Path(pitboss.__file__).parent), str(run_dir)],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.stdin.close()
    process.stdout.close()
    process.wait(10)


def test_a_held_run_is_refused_at_once_and_its_holder_named(run_dir, holder, monkeypatch):
    monkeypatch.setattr(pitboss.time, "sleep", lambda _: pytest.fail("it waits for a holder that lives"))
    with pytest.raises(pitboss.Refused) as error:
        pitboss.take_lock(str(run_dir))
    assert f"process {holder.pid} on {os.uname().nodename}" in str(error.value)
    assert pitboss.is_locked(str(run_dir))


def test_a_lock_ends_with_its_holder(run_dir, holder):
    holder.kill()
    holder.wait()
    assert not pitboss.is_locked(str(run_dir))
    lock = pitboss.take_lock(str(run_dir))
    content = json.loads((run_dir / "lock").read_text())
    assert content["pid"] == os.getpid() and pitboss.is_living_holder(content)
    os.close(lock)
    assert not pitboss.is_locked(str(run_dir)) and not pitboss.is_locked(str(run_dir / "nothing"))


def probe(path: Path) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_CREAT, 0o600)
    fcntl.flock(fd, fcntl.LOCK_SH)
    return fd


def test_a_reader_that_probes_does_not_turn_the_next_holder_away(run_dir):
    """`list` looks at the lock for a moment; whoever takes the run then is patient."""
    reader = probe(run_dir / "lock")
    closer = threading.Timer(0.2, os.close, [reader])
    closer.start()
    os.close(pitboss.take_lock(str(run_dir)))
    closer.join()


def test_patience_ends(run_dir, monkeypatch):
    monkeypatch.setattr(pitboss, "LOCK_PATIENCE_S", 0.1)
    reader = probe(run_dir / "lock")
    (run_dir / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "boot": "x", "start": "1"}))
    with pytest.raises(pitboss.Refused) as error:
        pitboss.take_lock(str(run_dir))
    assert "process 1 on elsewhere" in str(error.value)
    os.close(reader)


def test_two_who_want_a_run_do_not_both_get_it(run_dir):
    got = []
    threads = [threading.Thread(target=lambda: got.append(try_lock(run_dir))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = [fd for fd in got if fd is not None]
    assert len(held) == 1
    os.close(held[0])


def try_lock(run_dir: Path) -> int | None:
    try:
        return pitboss.take_lock(str(run_dir))
    except pitboss.Refused:
        return None


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_a_fault_with_a_remedy(run_dir, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", fail_with(number))
    with pytest.raises(pitboss.EnvironmentFault) as error:
        pitboss.take_lock(str(run_dir))
    assert "--run-dir" in error.value.hint


def test_a_holder_is_known_by_more_than_its_number():
    me = {"pid": os.getpid(), "host": os.uname().nodename, "boot": pitboss.boot_id(),
          "start": pitboss.process_start(os.getpid())}
    assert pitboss.is_living_holder(me)
    for key, other in (("pid", 1), ("pid", None), ("host", "elsewhere"), ("boot", "x"), ("start", "1"),
                       ("start", None)):
        assert not pitboss.is_living_holder({**me, key: other}), key
    assert not pitboss.is_living_holder({})


def test_a_dead_process_has_no_start():
    child = subprocess.Popen(["true"])
    wait_for(lambda: pitboss.process_start(child.pid) is None)       # a zombie is dead
    child.wait()
    assert pitboss.process_start(child.pid) is None
    assert pitboss.process_start(os.getpid()) == pitboss.process_start(os.getpid()) is not None


# ------------------------------------------------------------------ the pinned copy

def test_bytecode_of_an_earlier_source_is_not_pinned(run_dir, tmp_path):
    source = Path(pitboss.__file__).read_text(encoding="utf-8")
    copy = tmp_path / "lib" / "pitboss.py"
    copy.parent.mkdir()
    copy.write_text(source.replace(f'"{pitboss.VERSION}"', '"1.0.0"'), encoding="utf-8")
    subprocess.run([sys.executable, "-m", "py_compile", copy], check=True)
    copy.write_text(source.replace(f'"{pitboss.VERSION}"', '"20.0.0"'), encoding="utf-8")
    script = f"import pitboss; pitboss.pin_self({str(run_dir)!r})"
    env = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(copy.parent)}
    subprocess.run([sys.executable, "-c", script], env=env, cwd=copy.parent, check=True)
    done = subprocess.run([*pitboss.self_argv(str(run_dir)), "version"], capture_output=True, text=True)
    assert done.stdout == "pitboss 20.0.0\n", done.stderr


def test_the_pinned_copy_runs_without_the_file_it_came_from(run_dir):
    pitboss.pin_self(str(run_dir))
    here = run_dir / "self"
    assert (here / "pitboss.py").read_bytes() == Path(pitboss.__file__).read_bytes()
    assert list((here / "__pycache__").glob("*.pyc")), "it starts without compiling"
    done = subprocess.run([*pitboss.self_argv(str(run_dir)), "version"], capture_output=True, text=True,
                          cwd="/",
                          env={"PATH": os.environ["PATH"]}, check=False)
    assert done.stdout == f"pitboss {pitboss.VERSION}\n", done.stderr


# ------------------------------------------------------------------ run folders of other tools

@pytest.mark.parametrize("text, values", [
    ('{"a": 1}{"a": 2}', [{"a": 1}, {"a": 2}]), ('{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]), ("", []), ("\n \n", []),
    ('{"a": 1}{"a": 2', [{"a": 1}]), ('{"a"\n{"a": 2}', [{"a": 2}]), ('{"a": 1}x{"b": 1}\n{"a": 2}', [{"a": 1}, {"a": 2}]),
    ('\ufeff{"a": 1}\n[2]', [[2]]), ("[" * 100_000 + '\n{"a": 2}', [{"a": 2}]),
])
def test_values_are_read_whether_or_not_a_line_break_stands_between(tmp_path, text, values):
    (tmp_path / "f").write_text(text, encoding="utf-8")
    assert pitboss.read_joined(str(tmp_path / "f")) == values
    assert pitboss.read_joined(str(tmp_path / "missing")) == []


@pytest.mark.parametrize("names, foreign", [
    ((), False), (("lock",), False), (("meta.json",), True), (("summary.jsonl",), True), (("tasks",), True),
    (("meta.json", "journal.jsonl"), False), (("meta.json", "self"), False), (("notes.txt",), False),
])
def test_a_folder_of_another_tool_has_neither_journal_nor_pinned_code(run_dir, names, foreign):
    for name in names:
        (run_dir / name).touch()
    assert pitboss.is_foreign(str(run_dir)) == foreign
    with pytest.raises(pitboss.Refused):
        pitboss.check_whole(str(run_dir))


def test_what_is_no_part_of_a_run_is_seen(run_dir):
    for name in ("journal.jsonl", "meta.json", "control.sock", "journal.jsonl.123.new", "notes.txt", "lock2"):
        (run_dir / name).touch()
    assert pitboss.strange_entries(str(run_dir)) == ["lock2", "notes.txt"]


def test_a_removed_run_is_out_of_sight_at_once_and_then_gone(run_dir, monkeypatch):
    import shutil

    run = run_dir / "019d9900-aaaa-7000-8000-000000000001"
    (run / "tasks").mkdir(parents=True)
    monkeypatch.setattr(shutil, "rmtree", fail_with(errno.EACCES))
    with pytest.raises(PermissionError):
        pitboss.remove_run(str(run))
    assert pitboss.list_runs(str(run_dir)) == [] and len(os.listdir(run_dir)) == 1
    monkeypatch.undo()
    run.mkdir()
    with pytest.raises(OSError):                 # what an earlier removal left is in the way
        (run_dir / f"{pitboss.GONE}{run.name}" / "x").touch()
        pitboss.remove_run(str(run))
    shutil.rmtree(run_dir / f"{pitboss.GONE}{run.name}")
    pitboss.remove_run(str(run))
    assert os.listdir(run_dir) == []
