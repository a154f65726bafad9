"""The shared database: its shape moves forwards only, and nothing that is wrong with it is more than a sentence."""
from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading

import pytest

import pitboss
from pitboss import Health

LIMIT = Health("demo:1", "limit", 1000.5, 2000.25, True, 3, "some run")


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "data" / "house.sqlite")


def test_what_was_told_is_read(path):
    assert pitboss.read_health(path) == {}, "no database yet"
    assert not os.path.exists(path), "reading makes none"
    pitboss.write_health(path, LIMIT)
    pitboss.write_health(path, Health("claude:2", "auth", 7.0))
    assert pitboss.read_health(path) == {"demo:1": LIMIT, "claude:2": Health("claude:2", "auth", 7.0)}
    better = Health("demo:1", "ok", 3000.0, run="another")
    pitboss.write_health(path, better)
    assert pitboss.read_health(path)["demo:1"] == better


def test_only_its_owner_may_read_it(path):
    before = os.umask(0)
    try:
        pitboss.write_health(path, LIMIT)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o700


def version_of(path: str) -> int:
    with sqlite3.connect(path) as db:
        return db.execute("PRAGMA user_version").fetchone()[0]


def set_version(path: str, version: int) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version = {version}")


def test_an_empty_database_is_brought_forwards(path):
    set_version(path, 0)
    assert pitboss.read_health(path) == {}
    pitboss.write_health(path, LIMIT)
    assert version_of(path) == len(pitboss.HOUSE_STEPS) and pitboss.read_health(path) == {"demo:1": LIMIT}


def test_a_further_step_keeps_what_is_there(path, monkeypatch):
    pitboss.write_health(path, LIMIT)
    steps = (*pitboss.HOUSE_STEPS, "CREATE TABLE more (x)", "INSERT INTO more VALUES (1)")
    monkeypatch.setattr(pitboss, "HOUSE_STEPS", steps)
    pitboss.write_health(path, LIMIT._replace(account="demo:2"))
    assert version_of(path) == len(steps) and set(pitboss.read_health(path)) == {"demo:1", "demo:2"}


def test_a_step_that_fails_changes_nothing(path, monkeypatch):
    pitboss.write_health(path, LIMIT)
    before = open(path, "rb").read()
    monkeypatch.setattr(pitboss, "HOUSE_STEPS", (*pitboss.HOUSE_STEPS, "CREATE TABLE more (x)", "NONSENSE"))
    with pytest.raises(pitboss.HouseFault):
        pitboss.write_health(path, LIMIT)
    with sqlite3.connect(path) as db:
        assert [n for n, in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")] == ["health"]
    monkeypatch.undo()
    assert open(path, "rb").read() == before and pitboss.read_health(path) == {"demo:1": LIMIT}


def faulty_newer(path):
    set_version(path, len(pitboss.HOUSE_STEPS) + 1)


def faulty_corrupt(path):
    os.makedirs(os.path.dirname(path))
    with open(path, "wb") as f:
        f.write(b"not a database\n" * 1000)


def faulty_folder(path):
    os.makedirs(path)


def faulty_shape(path):
    set_version(path, len(pitboss.HOUSE_STEPS))


def faulty_parent(path):
    with open(os.path.dirname(path), "w"):
        pass


FAULTY = {"newer": (faulty_newer, "version"), "corrupt": (faulty_corrupt, "not a database"),
          "a folder": (faulty_folder, ""), "another shape": (faulty_shape, "no such table"),
          "no folder": (faulty_parent, "")}


@pytest.mark.parametrize("fault, says", FAULTY.values(), ids=FAULTY)
def test_what_is_wrong_is_one_error_with_its_path(path, fault, says):
    fault(path)
    before = open(path, "rb").read() if os.path.isfile(path) else None
    with pytest.raises(pitboss.HouseFault) as error:
        pitboss.write_health(path, LIMIT)
    assert path.rpartition("/")[0] in str(error.value) and says in str(error.value)
    if os.path.exists(path):
        with pytest.raises(pitboss.HouseFault):
            pitboss.read_health(path)
    assert before is None or open(path, "rb").read() == before, "nothing was changed in it"


def test_a_database_that_somebody_else_writes_is_not_waited_for_long(path):
    pitboss.write_health(path, LIMIT)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    for attempt in (pitboss.read_health, lambda p: pitboss.write_health(p, LIMIT)):
        with pytest.raises(pitboss.HouseFault, match="locked"):
            attempt(path)
    other.execute("COMMIT")
    other.close()
    assert pitboss.read_health(path) == {"demo:1": LIMIT}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_database_that_may_only_be_read_is_read():
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        path = os.path.join(folder, "house.sqlite")
        pitboss.write_health(path, LIMIT)
        os.chmod(path, 0o644)
        os.seteuid(65534)
        try:
            assert pitboss.read_health(path) == {"demo:1": LIMIT}
            with pytest.raises(pitboss.HouseFault, match="ermission denied"):
                pitboss.write_health(path, LIMIT)
        finally:
            os.seteuid(0)


def test_what_a_killed_writer_left_is_mended(path):
    """It was killed between two pages: the next one, also one that only reads, sees the state before."""
    pitboss.write_health(path, LIMIT)
    code = ("import os, sqlite3, sys\ndb = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
            "db.execute('PRAGMA cache_size = 1')\ndb.execute('BEGIN IMMEDIATE')\n"
            "db.execute('DELETE FROM health')\n"
            "db.executemany('INSERT INTO health VALUES (?, ?, 1, 1, 1, 1, ?)',"
            " [(str(n), 'x' * 3000, 'r') for n in range(200)])\nos.kill(os.getpid(), 9)")
    assert subprocess.run([sys.executable, "-c", code, path]).returncode == -9
    assert os.path.exists(path + "-journal"), "it left nothing to mend"
    assert pitboss.read_health(path) == {"demo:1": LIMIT}


def test_a_house_is_read_again_only_when_it_has_changed(path, monkeypatch):
    house, reads = pitboss.House(path), []
    real = pitboss.read_health
    monkeypatch.setattr(pitboss, "read_health", lambda p: reads.append(p) or real(p))
    assert house.news() is None and reads == []
    pitboss.write_health(path, LIMIT)
    assert house.news() == {"demo:1": LIMIT} and house.news() is None
    pitboss.write_health(path, LIMIT._replace(state="ok"))
    assert house.news()["demo:1"].state == "ok" and house.news() is None and len(reads) == 2


def test_a_house_that_could_not_be_read_is_left_alone_for_a_while(path):
    faulty_corrupt(path)
    house = pitboss.House(path)
    with pytest.raises(pitboss.HouseFault):
        house.news()
    assert house.news() is None
    os.unlink(path)
    pitboss.write_health(path, LIMIT)
    house.again_at = 0.0
    assert house.news() == {"demo:1": LIMIT}


def test_many_writers_at_once_lose_nothing(path):
    """Whoever is turned away is told so; what was written is there."""
    told, lock = [], threading.Lock()

    def write(n: int) -> None:
        for _ in range(100):
            try:
                pitboss.write_health(path, Health(f"demo:{n}", "limit", float(n)))
            except pitboss.HouseFault:
                continue
            with lock:
                told.append(f"demo:{n}")
            return

    threads = [threading.Thread(target=write, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == sorted(pitboss.read_health(path)) and len(told) == 12
