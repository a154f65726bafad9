"""pitboss.py keeps the shape that its street map promises.

`python tests/test_shape.py [FILE]` prints every breach and exits 1 when there is one. Each check is a
function from a parsed file to its breaches, and is itself tested with a file that breaches it.
"""
from __future__ import annotations

import ast
import functools
import io
import re
import sys
import tokenize
from pathlib import Path
from typing import Iterator, NamedTuple

import pytest

PITBOSS = Path(__file__).resolve().parent.parent / "pitboss.py"
MAX_FUNCTION = 60          # lines; a longer one says why:  def f(...):  # long: reason
MAX_LINE = 110             # columns
OLDEST = (3, 8)            # the grammar that every Python can parse, so that an old one gets a sentence
EAGER = {"__future__", "contextlib", "functools", "json", "math", "os", "re", "sys", "time", "typing"}
IMPURE = {"open", "print", "input", "os", "sys", "time", "asyncio", "subprocess", "socket", "sqlite3",
          "shutil",
          "signal", "random", "secrets", "uuid", "tempfile", "curses", "select", "threading", "fcntl",
          "pathlib"}
UNOWNED = {"create_task", "ensure_future", "gather"}   # on the asyncio module: nobody owns the task
BANNER = re.compile(r"^# ([A-Z][A-Z ]*): (.+?)\s+\[(pure|io|async|cli)\]$")
MAPPED = re.compile(r"^    ([A-Z][A-Z ]*?)\s{2,}(.+?)\s+\[(pure|io|async|cli)\]$")
HISTORY = re.compile(r"\bv\d+\.\d|\W#\d{2,}|\bPR \d|\bphase \d|\bpreviously\b|\bused to\b|\bno longer\b",
                     re.I)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)


class Section(NamedTuple):
    """One banner: where it stands, what it says."""

    line: int
    name: str
    about: str
    kind: str


class Program:
    """A source file, its syntax tree and its sections."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines = source.splitlines()
        self.tree = ast.parse(source)
        self.sections = [Section(n, *m.groups()) for n,
                         line in enumerate(self.lines, 1) if (m := BANNER.match(line))]
        self.homes = {name: self.section_of(node) for node in self.tree.body for name in defined_by(node)}

    def section_of(self, node: ast.AST) -> int:
        """The index of the section that a node stands in; -1 above the first banner."""
        return next((n for n in reversed(range(len(self.sections))) if self.sections[n].line <= node.lineno),
                    -1)

    def line_of(self, node: ast.AST) -> str:
        return self.lines[node.lineno - 1]

    def walk(self, *kinds: type) -> Iterator[ast.AST]:
        return (node for node in ast.walk(self.tree) if isinstance(node, kinds))


def defined_by(node: ast.stmt) -> list[str]:
    """The names that a statement of the module defines."""
    if isinstance(node, DEFINITIONS):
        return [node.name]
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return [x.id for t in targets if t is not None for x in ast.walk(t) if isinstance(x, ast.Name)]


def names_read(node: ast.AST) -> Iterator[ast.Name]:
    """Every name that is read in `node`, annotations left out: those are never evaluated."""
    notes = {id(x) for y in ast.walk(node) for a in ("annotation", "returns") if getattr(y, a, None)
             for x in ast.walk(getattr(y, a))}
    return (x for x in ast.walk(node)
            if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load) and id(x) not in notes)


# ------------------------------------------------------------------ checks: a program to (line, breach) pairs

def check_map(program: Program) -> Iterator[tuple[int, str]]:
    """The street map of the docstring and the banners are the same list, in the same order."""
    text = ast.get_docstring(program.tree, clean=False) or ""
    mapped = [(m[1], m[3]) for line in text.splitlines() if (m := MAPPED.match(line))]
    banners = [(s.name, s.kind) for s in program.sections]
    if mapped != banners:
        yield 1, f"the map says {mapped}, the banners are {banners}"


def check_direction(program: Program) -> Iterator[tuple[int, str]]:
    """A section names only what it, a section above it, or the head of the file defines."""
    for node in program.tree.body:
        here = program.section_of(node)
        for name in names_read(node) if here >= 0 else ():
            there = program.homes.get(name.id, -1)
            if there > here:
                yield name.lineno, (f"{program.sections[here].name} names {name.id}, which "
                                    f"{program.sections[there].name} below it defines")


def check_private_names(program: Program) -> Iterator[tuple[int, str]]:
    """A name with an underscore is used in its own section only."""
    for node in program.tree.body:
        here = program.section_of(node)
        for name in names_read(node):
            there = program.homes.get(name.id, here)
            if re.match(r"_[a-zA-Z]", name.id) and there != here:
                yield name.lineno, f"{name.id} belongs to {program.sections[there].name}"


def check_purity(program: Program) -> Iterator[tuple[int, str]]:
    """A [pure] section neither uses nor imports what reaches the world; a parameter of that name is fine."""
    for node in program.tree.body:
        here = program.section_of(node)
        if here < 0 or program.sections[here].kind != "pure":
            continue
        own = {a.arg for x in ast.walk(node) if isinstance(x, ast.arguments) for a in all_arguments(x)}
        used = [(x.lineno, x.id) for x in names_read(node) if x.id not in own]
        used += [(x.lineno, root) for x in ast.walk(node) for root in imported_by(x)]
        for line, name in used:
            if name in IMPURE:
                yield line, f"{program.sections[here].name} is [pure] and uses {name}"


def all_arguments(arguments: ast.arguments) -> list[ast.arg]:
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs,
            *filter(None, (arguments.vararg, arguments.kwarg))]


def imported_by(node: ast.AST) -> list[str]:
    """The top names of the modules that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    return [(node.module or "").split(".")[0]] if isinstance(node, ast.ImportFrom) else []


def check_imports(program: Program) -> Iterator[tuple[int, str]]:
    """Only the standard library; at start-up only its small modules."""
    for node in program.walk(ast.Import, ast.ImportFrom):
        for root in imported_by(node):
            if root not in sys.stdlib_module_names:
                yield node.lineno, f"{root} is not in the standard library"
            elif node.col_offset == 0 and root not in EAGER:
                yield node.lineno, f"{root} is imported at start-up"


def check_start(program: Program) -> Iterator[tuple[int, str]]:
    """Nothing happens at import but definitions, the check of the version, and main."""
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.If, *DEFINITIONS)
    for node in program.tree.body[1:]:
        if not isinstance(node, allowed):
            yield node.lineno, "a statement that runs at import"


def check_unique_names(program: Program) -> Iterator[tuple[int, str]]:
    """A name of the module is defined once, so that a search lands once."""
    seen: dict[str, int] = {}
    for node in program.tree.body:
        for name in defined_by(node):
            if name in seen:
                yield node.lineno, f"{name} is defined at line {seen[name]} already"
            seen[name] = node.lineno


def check_sizes(program: Program) -> Iterator[tuple[int, str]]:
    """A function is short, or its first line says why it is long."""
    for node in program.walk(*FUNCTIONS):
        length = node.end_lineno - node.lineno + 1
        if length > MAX_FUNCTION and "# long:" not in program.line_of(node):
            yield node.lineno, f"{node.name} has {length} lines"


def check_globals(program: Program) -> Iterator[tuple[int, str]]:
    """No function rebinds a name of the module."""
    for node in program.walk(ast.Global):
        yield node.lineno, f"global {', '.join(node.names)}"


def check_excepts(program: Program) -> Iterator[tuple[int, str]]:
    """A broad except stands at a boundary and says why."""
    for node in program.walk(ast.ExceptHandler):
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        broad = any(x is None or isinstance(x, ast.Name) and x.id in ("Exception", "BaseException")
                    for x in caught)
        if broad and "# boundary:" not in program.line_of(node):
            yield node.lineno, "a broad except without `# boundary: reason`"


def check_tasks(program: Program) -> Iterator[tuple[int, str]]:
    """Every task is made by a TaskGroup that somebody holds."""
    for node in program.walk(ast.Attribute):
        if node.attr in UNOWNED and isinstance(node.value, ast.Name) and node.value.id in ("asyncio", "loop"):
            yield node.lineno, f"{node.value.id}.{node.attr}: nobody owns this task"


def check_docstrings(program: Program) -> Iterator[tuple[int, str]]:
    """Every public name of the module, and every public method, says what it is."""
    for node in (program.tree, *(x for x in program.tree.body if isinstance(x, ast.ClassDef))):
        for child in node.body:
            if isinstance(child,
                          DEFINITIONS) and not child.name.startswith("_") and not ast.get_docstring(child):
                yield child.lineno, f"{child.name} has no docstring"


def check_columns(program: Program) -> Iterator[tuple[int, str]]:
    """No line is too long for a screen."""
    for number, line in enumerate(program.lines, 1):
        if len(line) > MAX_LINE:
            yield number, f"{len(line)} columns"


def check_history(program: Program) -> Iterator[tuple[int, str]]:
    """A comment says what is, not what was."""
    for token in tokenize.generate_tokens(io.StringIO(program.source).readline):
        if token.type == tokenize.COMMENT and (found := HISTORY.search(token.string)):
            yield token.start[0], f"history in a comment: {found[0].strip()}"


def check_old_grammar(program: Program) -> Iterator[tuple[int, str]]:
    """An old Python can parse the file, and so say in one sentence that it is too old."""
    try:
        ast.parse(program.source, feature_version=OLDEST)
    except SyntaxError as e:
        yield e.lineno or 1, f"Python {OLDEST[0]}.{OLDEST[1]} cannot parse it: {e.msg}"


CHECKS = (check_map, check_direction, check_private_names, check_purity, check_imports, check_start,
          check_unique_names, check_sizes, check_globals, check_excepts, check_tasks, check_docstrings,
          check_columns, check_history, check_old_grammar)


def breaches(source: str, check) -> list[str]:
    return [f"{line}: {text}" for line, text in check(parsed(source))]


parsed = functools.lru_cache(maxsize=2)(Program)


# ------------------------------------------------------------------ tests

@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_shape(check):
    assert breaches(PITBOSS.read_text(encoding="utf-8"), check) == []


GOOD = '''"""A small program.

    HIGH    pure things     [pure]
    LOW     the world       [io]
"""
import sys

# HIGH: pure things   [pure]

def double(uuid: Low) -> int:
    """Twice."""
    return uuid * 2


# LOW: the world      [io]

class Low:
    """It writes."""

    def write(self) -> None:
        """Write."""
        sys.stdout.write(str(double(2)))
'''

BROKEN = {
    #                    what is put in         in place of
    check_map:           ("# HIGH: pure things   [io]", "# HIGH: pure things   [pure]"),
    check_direction:     ("return Low", "return uuid"),
    check_private_names: ('"""Twice."""\n    _hidden = 1\n\n_hidden = 2\n\n\n'
                          '# LOW: the world      [io]\nprint(_hidden)',
                          '"""Twice."""\n    return uuid * 2\n\n\n# LOW: the world      [io]'),
    check_purity:        ("return sys.maxsize", "return uuid"),
    check_imports:       ("import numpy", "import sys"),
    check_start:         ("import sys\nsys.exit()", "import sys"),
    check_unique_names:  ("import sys\ndouble = 1", "import sys"),
    check_sizes:         ("x = 1\n        " * 61 + "sys", "sys"),
    check_globals:       ("global double\n        sys", "sys"),
    check_excepts:       ("try: pass\n        except (ValueError, Exception): pass\n        sys", "sys"),
    check_tasks:         ("asyncio.create_task(x)\n        sys", "sys"),
    check_docstrings:    ('"nothing" + ""', '"""Twice."""'),
    check_columns:       ("sys.stdout.write(" + "1," * 60, "sys.stdout.write("),
    check_history:       ("import sys  # it was two modules previously", "import sys"),
    check_old_grammar:   ("match uuid:\n        case 1: pass\n    return uuid", "return uuid"),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_each_check_sees_a_breach_and_nothing_where_there_is_none(check):
    new, old = BROKEN[check]
    assert breaches(GOOD, check) == []
    before, there, after = GOOD.rpartition(old)
    assert there and breaches(before + new + after, check) != []


@pytest.mark.parametrize("source", [
    "from asyncio import gather\nimport urllib.request", "def f():\n    import yaml"])
def test_every_way_to_import_is_looked_at(source):
    assert breaches(source, check_imports) != []


def main(paths: list[str]) -> int:
    found = [f"{path}:{breach}" for path in paths for check in CHECKS
             for breach in breaches(Path(path).read_text(encoding="utf-8"), check)]
    print("\n".join(found) or "shape ok")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or [str(PITBOSS)]))
