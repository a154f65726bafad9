"""Fixtures of the whole suite."""
from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools import Home  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes longer than five seconds")
    config.addinivalue_line("markers", "real: drives a real agent program; PITBOSS_TEST_CLAUDE and its like name it")


@pytest.fixture
def home(tmp_path):
    """A user's machine of one test's own; whatever it left alive is killed at the end."""
    place = Home(tmp_path)
    yield place
    place.end_everything()
