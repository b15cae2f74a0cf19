"""The house rules: narrow lines, short files and functions, imports that go one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OWN = ("critic", "risk", "dvpo", "rollout", "tasks", "harness", "train", "experiments")
# What each room may import of ours.
IMPORTS = {
    "critic": (),
    "risk": (),
    "dvpo": ("critic", "risk"),
    "rollout": ("dvpo",),
    "tasks": ("critic", "risk", "dvpo", "rollout", "tasks"),
    "harness": ("critic", "risk", "dvpo", "rollout", "tasks", "harness"),
    "train": ("critic", "risk", "dvpo", "rollout", "tasks", "harness"),
    "experiments": OWN,
    "tests": OWN,
}
LINES = {"critic": 220, "risk": 150, "dvpo": 300, "rollout": 280, "train": 300}
FILES = {
    room: sorted(ROOT.glob(f"{room}.py")) or sorted(ROOT.glob(f"{room}/*.py")) for room in IMPORTS
}


def num_lines(*rooms):
    return sum(len(path.read_text().splitlines()) for room in rooms for path in FILES[room])


def imported(path):
    """The modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


@pytest.mark.parametrize("room", IMPORTS)
def test_imports_go_one_way(room):
    assert FILES[room]
    for path in FILES[room]:
        found = {name.split(".")[0] for name in imported(path)} & set(OWN)
        assert found <= set(IMPORTS[room]), path


@pytest.mark.parametrize("room", ["tasks", "harness"])
def test_there_are_no_circles(room):
    """A file comes after all those of its folder that it imports."""
    left = {}
    for path in FILES[room]:
        names = set(imported(path))
        others = (other.stem for other in FILES[room] if other.stem != "__init__")
        inside = {o for o in others if any(f"{name}.".startswith(f"{room}.{o}.") for name in names)}
        left[path.stem] = inside
    while left:
        free = {name for name, needs in left.items() if not needs & left.keys()}
        assert free, left
        left = {name: needs for name, needs in left.items() if name not in free}


@pytest.mark.parametrize("name", LINES)
def test_each_of_the_five_files_is_short(name):
    assert num_lines(name) <= LINES[name], "with lines of your own, raise its number in LINES"


def test_rooms_are_small():
    assert num_lines(*LINES) <= 1250
    assert num_lines("tasks", "harness") <= 1909
    assert num_lines("experiments") <= 3133


def test_lines_are_narrow():
    wide = []
    for path in sorted(path for files in FILES.values() for path in files):
        lines = enumerate(path.read_text().splitlines(), 1)
        wide += [f"{path.name}:{number}" for number, line in lines if len(line) > 100]
    assert wide == []


def test_functions_are_short():
    long = []
    for path in (path for room in IMPORTS if room != "tests" for path in FILES[room]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 50:
                long.append(f"{path.name}: {node.name}")
    assert long == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().split()) <= 1650
