"""The shape of the code base: rooms that import from few others, short files."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dpo"

# A package (or top-level module) imports from these, `files` and itself; nothing imports from what comes further down.
ALLOWED = {
    "files": set(),
    "losses": set(),
    "quickstart": set(),
    "models": {"quickstart"},
    "data": {"models", "quickstart"},
    "training": {"data", "models", "losses"},
    "runs": {"models", "losses"},
    "callbacks": {"training", "data", "runs", "models"},
    "serving": {"models", "data", "runs", "quickstart"},
    "cli": {"callbacks", "training", "data", "runs", "models", "quickstart"},
}
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
    assert imported_units(file) <= ALLOWED[own] | {"files"}


def test_what_may_be_imported_is_above() -> None:
    order = list(ALLOWED)
    assert all(order.index(above) < order.index(own) for own in order for above in ALLOWED[own])


def test_nothing_is_allowed_that_nobody_needs() -> None:
    used = {own: set().union(*(imported_units(file) for file in FILES if unit(file) == own)) for own in ALLOWED}
    assert used == {own: allowed | (used[own] & {"files"}) for own, allowed in ALLOWED.items()}


def test_few_need_more_than_three_others() -> None:
    assert {own for own, allowed in ALLOWED.items() if len(allowed) > 3} <= {"callbacks", "serving", "cli"}


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


def test_the_map_names_every_package() -> None:
    text = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    missing = {unit(file) for file in FILES} - ENTRANCES - {name for name in ALLOWED if f"`{name}`" in text}
    assert not missing, f"say in dpo/__init__.py what {sorted(missing)} are for"


def defined(file: Path) -> set[str]:
    """Public classes, type aliases and constants of a file."""
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [node.name] if isinstance(node, ast.ClassDef) else [t.id for t in targets if isinstance(t, ast.Name)]
        found |= {name for name in names if name[0].isupper()}
    return found


@pytest.mark.parametrize("name", ["Columns", "Rows", "SPLITS"])
def test_what_is_spoken_of_everywhere_has_one_meaning(name: str) -> None:
    assert len([file for file in FILES if name in defined(file)]) == 1
