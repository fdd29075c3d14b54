"""What README and docs name exists, and what they show runs."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import spg

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "spg").rglob("*.py"))
    if path.stem != "__init__"
]
TESTS = {
    name
    for path in (ROOT / "tests").glob("test_*.py")
    for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
}
# What has been renamed or moved; CHANGELOG.md alone may name it.
OLD_NAMES = r"""
    spg\.(models|hidden_markov|gamp|kstep|ascent|conjugate|decoding|records|checkpoints)\b
    spg\.(plotting|graphs|controllers|cli)\b
    envs\.(problems|traps|pomdp_file|hidden_markov)\b
    estimators\.kstep\b
    from[ ]spg\.worlds\.ringworld\b
    \b(TabularPOMDP|HeldLaw|SeedLaw|Noisy|Replay|replay_drawn|product_law|stationary_law)\b
    \bkrylov_law\b
    \bgamp\.(gamp|solve|Solution)\b
    \bkstep\.(solve|Solution)\b
    \.replay\(
    docs/\w+\.(png|csv)
"""


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def resolve(name):
    """The object of a dotted public name, such as `spg.exact.gamp.arnoldi`."""
    parts = name.split(".")
    path = lambda n: ROOT.joinpath(*parts[:n])
    depth = 1
    while path(depth + 1).is_dir() or path(depth + 1).with_suffix(".py").is_file():
        depth += 1
    found = importlib.import_module(".".join(parts[:depth]))
    for part in parts[depth:]:
        found = getattr(found, part)
    return found


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_methods_name_functions_and_tests_that_exist():
    text = (ROOT / "docs/methods.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if len(row) == 4 and "`test" in row[3]]
    assert len(rows) > 40
    for row in rows:
        names = re.findall(r"`([^`]+)`", " ".join(row[1:]))
        for name in names:
            if name.startswith("spg."):
                assert callable(resolve(name))
            elif "/" in name:
                assert (ROOT / name).exists(), name
            else:
                assert name in TESTS, name


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    named = re.findall(r"\b((?:scripts|spg|tests|docs)/[\w/]+\.\w+)", text)
    assert all((ROOT / path).exists() for path in named), named
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    assert all((page.parent / path).exists() for path in links), links


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_python_of_a_page_compiles_and_its_imports_work(page):
    for block in blocks(page):
        tree = ast.parse(block)
        tree.body = [x for x in tree.body if isinstance(x, ast.Import | ast.ImportFrom)]
        exec(compile(tree, str(page), "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["embedding", "extending"])
def test_python_of_a_page_runs(name):
    for block in blocks(ROOT / "docs" / f"{name}.md"):
        if block not in blocks(ROOT / "README.md"):  # `test_readme_example_runs` runs those
            exec(compile(block, name, "exec"), {"__name__": name})


def test_every_module_is_on_an_api_page():
    text = "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    listed = re.findall(r"^::: (spg\.\S+)", text, re.MULTILINE)
    assert sorted(listed) == sorted([*MODULES, "spg.envs"])


def test_version_is_told_once():
    assert f"version: {spg.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {spg.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_nothing_uses_an_old_name():
    files = [p for d in ("spg", "scripts", "tests", "docs") for p in (ROOT / d).rglob("*")]
    files = [p for p in files if p.suffix in (".py", ".md")] + [*PAGES, ROOT / "pyproject.toml"]
    old = re.compile("|".join(OLD_NAMES.split("\n")[1:-1]).replace("    ", ""), re.VERBOSE)
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in files
        if path != Path(__file__).resolve()
        for match in old.finditer(path.read_text())
    ]
    assert not found


def test_defaults_that_differ_are_listed_as_they_are():
    """One row in docs/runs.md for each option whose default is not the same in all scripts."""
    section = (ROOT / "docs/runs.md").read_text().split("### Where scripts differ")[1]
    head, *rows = re.findall(r"^\| (.*) \|$", section.split("\n## ")[0], re.M)
    scripts = head.split(" | ")[1:]
    configs = [vars(importlib.import_module(f"scripts.{name}").Config()) for name in scripts]
    cells = [{k: _cell(v) for k, v in config.items()} for config in configs]
    differ = {}
    for name in dict.fromkeys(name for config in cells for name in config):
        row = [config.get(name, "-") for config in cells]
        if len({*row} - {"-"}) > 1:
            differ[f"`--{name.replace('_', '-')}`"] = row
    listed = {option: row for option, *row in (row.split(" | ") for row in rows[1:])}
    assert listed == differ


def _cell(value):
    """A default as the page writes it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
