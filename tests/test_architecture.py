"""The shape of the code base: packages that import from few others, short files, names and docstrings."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dpo"

# A package (or top-level module) imports from these, `BASE` and itself; nothing imports from what comes further down.
ALLOWED = {
    "files": set(),
    "secrets": set(),
    "losses": set(),
    "quickstart": set(),
    "models": {"quickstart"},
    "data": {"models", "quickstart"},
    "training": {"data", "models", "losses"},
    "planning": {"training", "data", "models"},
    "runs": {"models"},
    "evaluation": {"models", "data", "runs"},
    "reports": {"runs"},
    "callbacks": {"training", "data", "runs"},
    "serving": {"models", "data", "runs"},
    "cli": {
        "callbacks",
        "training",
        "data",
        "runs",
        "models",
        "quickstart",
        "serving",
        "evaluation",
        "reports",
        "planning",
    },
}
BASE = {"files", "secrets"}  # modules that all may import
# These import from all.
ENTRANCES = {"__init__", "__main__"}
MOST = 400  # lines of a file

FILES = sorted(PACKAGE.rglob("*.py"))


def unit(file: Path) -> str:
    """Top-level module or sub-package below `dpo` to which a file belongs."""
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def _absolute(node: ast.ImportFrom, file: Path) -> str:
    """Absolute module of a `from ... import`, with leading dots resolved."""
    package = (PACKAGE.name, *file.relative_to(PACKAGE).parent.parts)
    base = package[: len(package) - node.level + 1] if node.level else ()
    return ".".join([*base, *([node.module] if node.module else [])])


def imported_names(file: Path) -> set[str]:
    """Every module that a file may import, as absolute dotted names (members of modules included)."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, file)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def imported_units(file: Path) -> set[str]:
    """Units below `dpo` that a file imports, its own excepted."""
    parts = [name.split(".") for name in imported_names(file)]
    known = {unit(other) for other in FILES}
    return {p[1] for p in parts if p[0] == PACKAGE.name and len(p) > 1 and p[1] in known} - {unit(file)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_package_imports_only_from_those_it_may(file: Path) -> None:
    own = unit(file)
    if own in ENTRANCES:
        return
    assert own in ALLOWED, f"say in ALLOWED from where dpo/{own} may import"
    assert imported_units(file) <= ALLOWED[own] | BASE


def test_what_may_be_imported_is_above() -> None:
    order = list(ALLOWED)
    assert all(order.index(above) < order.index(own) for own in order for above in ALLOWED[own])


def test_nothing_is_allowed_that_nobody_needs() -> None:
    used = {own: set().union(*(imported_units(file) for file in FILES if unit(file) == own)) for own in ALLOWED}
    assert used == {own: allowed | (used[own] & BASE) for own, allowed in ALLOWED.items()}


def test_only_the_command_line_needs_more_than_three_others() -> None:
    assert {own for own, allowed in ALLOWED.items() if len(allowed) > 3} == {"cli"}


def test_the_package_does_not_import_itself_by_its_public_names() -> None:
    """`from dpo import DPO` inside would hide from which package it comes."""
    units = {unit(file) for file in FILES} | {"__version__"}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "dpo" and file != PACKAGE / "__init__.py":
                assert {alias.name for alias in node.names} <= units, file


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from dpo.tokens import encode", {"dpo.tokens.encode"}),
        ("from dpo import tokens", {"dpo.tokens"}),
        ("from . import tokens", {"dpo.tokens"}),
        ("from .tokens import encode", {"dpo.tokens.encode"}),
        ("def f():\n    import dpo.tokens as t", {"dpo.tokens"}),
    ],
)
def test_every_way_to_import_is_seen(source: str, expected: set[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tests.test_architecture.PACKAGE", tmp_path / "dpo")
    (tmp_path / "dpo").mkdir()
    file = tmp_path / "dpo" / "losses.py"
    file.write_text(source)
    assert imported_names(file) == expected


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_is_too_long(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MOST


@pytest.mark.parametrize("name", ["train.py", "serve.py"])
def test_command_lines_stay_under_50_lines(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) < 50


@pytest.mark.parametrize("file", sorted((ROOT / "tests").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_what_tests_share_is_in_no_test(file: Path) -> None:
    imported = re.findall(r"^\s*(?:from|import) tests\.(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    assert not [name for name in imported if re.search(r"\b(conftest|test_)", name)]


def public_definitions(file: Path) -> list[tuple[str, ast.AST]]:
    """Qualified name and node of every public class, function, method and property of a file."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            found.append((node.name, node))
            members = node.body if isinstance(node, ast.ClassDef) else []
            found += [(f"{node.name}.{m.name}", m) for m in members if isinstance(m, kinds) and m.name[0] != "_"]
    return found


PUBLIC = [(file, name, node) for file in FILES for name, node in public_definitions(file)]


def test_at_most_a_quarter_of_public_names_are_one_lowercase_word() -> None:
    names = [name.rpartition(".")[2] for _, name, _ in PUBLIC]
    words = [name for name in names if re.fullmatch("[a-z]+", name)]
    assert len(words) / len(names) <= 0.25, sorted(words)


def test_no_two_public_things_share_a_name() -> None:
    """But for the loss and the stage that are both called DPO, and the entry points of verbs."""
    counts = Counter(name for _, name, _ in PUBLIC if "." not in name)
    assert {name for name, count in counts.items() if count > 1} <= {"DPO", "main"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_public_docstrings_say_something(file: Path) -> None:
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), "a module says what it is for"
    for name, node in public_definitions(file):
        inherited = any(getattr(each, "id", "") == "override" for each in node.decorator_list)
        text = ast.get_docstring(node) or ""
        assert len(text.split()) > 3 or inherited, f"{name}: {text!r}"


def test_the_design_lists_every_file_once() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(dpo/[^`]+\.py)` \|", text, re.MULTILINE)
    assert sorted(listed) == [str(file.relative_to(ROOT)) for file in FILES]


def test_the_design_says_what_packages_may_import() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|$", text, re.MULTILINE)
    assert {own: set(re.findall(r"`(\w+)`", allowed)) for own, allowed in rows} == ALLOWED


def test_the_way_of_a_row_is_counted_right() -> None:
    """The files that the design follows a row through are there, numbered, and as many as it says."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\| (\d+) \| `([^`]+)` \|", text, re.MULTILINE)
    assert [int(number) for number, _ in steps] == list(range(1, len(steps) + 1))
    assert all((PACKAGE / name).is_file() for _, name in steps)
    assert f"passes through {len(steps)} files" in text
