"""Imports run one way: the arrows of the design, and the few imports inside functions."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS: dict[str, set[str]] = {
    "types": set(),
    "limits": set(),
    "distributions": set(),
    "scans": set(),
    "worlds": {"types"},
    "filters": {"worlds", "scans"},
    "envs": {"worlds"},
    "kernels": {"filters", "distributions", "scans", "worlds"},  # worlds: models to filter
    "estimators": {"kernels", "scans", "distributions"},
    "rollout": {"kernels"},
    "exact": {"kernels", "worlds", "scans", "distributions"},
    "training": {"exact", "estimators", "rollout", "envs", "worlds", "kernels", "scans"},
}
"""A room, and the rooms it may import besides itself, `types` and `limits`."""

BACKEND = "importing Gymnax starts JAX's backend, and the command line sets its devices before"
SLOW = "importing Brax and MuJoCo takes seconds, and only their environments need them"
PAGE = "importing Orbax, TensorBoard and matplotlib takes seconds, and a page of help needs none"
LATE = {
    "envs/brax.py": ({"brax", "brax.io"}, SLOW),
    "training/cli.py": ({"spg.training"}, PAGE),
    "training/loop.py": ({"spg.training.directory", "spg.training.resume"}, PAGE),
    "training/grids.py": ({"spg.training"}, PAGE),
    "training/films.py": ({"spg.envs", "spg.training"}, BACKEND),
    "training/off_policy.py": ({"spg.envs"}, BACKEND),
    "training/options.py": ({"spg.envs"}, BACKEND),
    "training/policies.py": ({"spg.envs"}, BACKEND),
    "worlds/traps.py": ({"gymnax.environments.classic_control.cartpole"}, BACKEND),
}
"""The imports inside functions, each with its reason."""

FILES = sorted(str(p.relative_to(ROOT / "spg")) for p in (ROOT / "spg").rglob("*.py"))


def imported(tree: ast.AST) -> list[str]:
    """The modules that a file imports, `from spg import envs` as `spg.envs`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            whole = node.module == "spg"
            found += [f"spg.{a.name}" for a in node.names] if whole else [node.module]
    return found


def room(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("path", [f for f in FILES if f != "__init__.py"])
def test_a_room_imports_only_the_rooms_below(path):
    modules = imported(ast.parse((ROOT / "spg" / path).read_text()))
    rooms = {m.split(".")[1] if "." in m else m for m in modules if m.split(".")[0] == "spg"}
    own = room(path)
    assert rooms <= ROOMS[own] | {own, "types", "limits"}
    assert not any(m.split(".")[0] in ("scripts", "tests") for m in modules)


def test_imports_inside_functions_are_those_that_have_a_reason():
    late = {}
    for path in FILES:
        tree = ast.parse((ROOT / "spg" / path).read_text())
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        if inside := {name for function in functions for name in imported(function)}:
            late[path] = inside
    assert late == {path: modules for path, (modules, _) in LATE.items()}


def test_there_are_no_circles_and_no_rooms_without_a_rule():
    assert {room(path) for path in FILES} - {"__init__"} == set(ROOMS)
    below: set[str] = set()
    while ready := {r for r in ROOMS.keys() - below if ROOMS[r] <= below}:
        below |= ready
    assert below == set(ROOMS)
