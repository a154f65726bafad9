"""The README says what the code says: its tables are the code's, its commands run, its tests exist."""
from __future__ import annotations

import re
import tomllib

import pytest
from tools import ROOT, make_repo

import pitboss

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_reference_is_what_the_code_prints():
    shown = re.search(r"<!-- reference: .*? -->\n(.*?)<!-- end of reference -->", README, re.S)[1]
    assert shown.strip() == pitboss.render_reference().strip(), "run `python3 pitboss.py reference` and put it there"


def test_every_test_file_that_is_named_exists():
    named = set(re.findall(r"`(tests/[\w/.]+)`", README))
    assert named and [name for name in named if not (ROOT / name).exists()] == []


def test_every_command_that_is_shown_exists():
    shown = set(re.findall(r"python3 pitboss\.py ([a-z-]+)", README))
    assert shown >= {"demo", "validate", "dispatch", "resume"} and shown <= set(pitboss.COMMANDS)


def test_every_make_target_that_is_named_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z-]+)`", README)) <= targets


@pytest.mark.parametrize("agent", ["claude", "demo"])
def test_the_first_manifest_is_valid(home, agent):
    text = re.search(r"```toml\n(\[run\].*?)```", README, re.S)[1]
    tomllib.loads(text)
    make_repo(home.root / "app")
    manifest = home.manifest(text.replace("[defaults]", f'[defaults]\nagent = "{agent}"'))
    done = home.pitboss("validate", manifest, check=0)
    assert done.stdout == "OK: flat, 2 tasks, max_parallel=3\n"


def test_the_project_speaks_of_itself_alone():
    for path in [ROOT / "pitboss.py", ROOT / "README.md", *(ROOT / "tests").glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "../" + "shared" not in text and not re.search(r"\bissue #?\d", text, re.I), path


def test_the_top_level_holds_the_file_and_little_else():
    """What people vendor and read is one file: nothing else gathers beside it."""
    wanted = {"pitboss.py", "tests", "README.md", "LICENSE", "Makefile"}
    there = {p.name for p in ROOT.iterdir() if not p.name.startswith((".", "__"))}
    assert there == wanted, there ^ wanted
