"""Short public names, and what importing them loads."""

import importlib
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ["spg", *(f"spg.{p.name}" for p in (ROOT / "spg").iterdir() if p.is_dir())]
PACKAGES = [name for name in PACKAGES if not name.endswith("__")]


@pytest.mark.parametrize("name", PACKAGES)
def test_public_names_exist_and_hide_no_module(name):
    package = importlib.import_module(name)
    for public in getattr(package, "__all__", []):
        assert hasattr(package, public)
    for path in (ROOT / name.replace(".", "/")).glob("[!_]*.py"):
        module = importlib.import_module(f"{name}.{path.stem}")
        assert isinstance(module, types.ModuleType)
        if (name, path.stem) != ("spg", "rollout"):  # spg.rollout is the function
            assert getattr(package, path.stem) is module


def test_importing_the_library_loads_no_environment_checkpoints_or_plots():
    heavy = "{'gymnax', 'brax', 'mujoco', 'orbax', 'matplotlib', 'tensorboardX'}"
    names = "spg, spg.estimators, spg.exact, spg.filters, spg.kernels, spg.worlds, spg.rollout"
    code = f"import sys, {names}; print(*{heavy} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.strip() == ""
