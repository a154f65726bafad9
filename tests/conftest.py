"""Fixtures of the whole suite."""
from __future__ import annotations

import os
import signal
import sys
import zlib
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from stage import Stage  # noqa: E402
from tools import Home  # noqa: E402


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:      # a shell's `&` does that, and children inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "slow: takes longer than five seconds")
    config.addinivalue_line("markers", "real: drives a real agent program; PITBOSS_TEST_CLAUDE and its like name it")


def pytest_collection_modifyitems(config, items):
    """PITBOSS_TEST_SHARD=K/N keeps the K-th of N parts, so that parts can run side by side."""
    if shard := os.environ.get("PITBOSS_TEST_SHARD"):
        part, count = map(int, shard.split("/"))
        mine = [i for i in items if zlib.crc32(i.nodeid.partition("[")[0].encode()) % count == part]
        config.hook.pytest_deselected(items=[i for i in items if i not in set(mine)])
        items[:] = mine


@pytest.fixture
def home(tmp_path):
    """A user's machine of one test's own; whatever it left alive is killed at the end."""
    place = Home(tmp_path)
    yield place
    place.end_everything()


@pytest.fixture
def stage(home):
    """A function that puts a run on; what it leaves is ended."""
    open_stages = []

    def put_on(**options) -> Stage:
        open_stages.append(Stage(home, **options))
        return open_stages[-1]

    yield put_on
    for one in open_stages:
        one.end()
