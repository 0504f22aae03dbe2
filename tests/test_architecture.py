"""The shape of the code base: one direction of imports, short files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dpo"

# From raw text to a reply: a module (or sub-package) imports only from its left.
ORDER = (
    # data, which knows nothing of models
    "run",
    "quickstart",
    "models",
    "dialogue",
    "formats",
    "columns",
    "rows",
    "listing",
    "audit",
    "tokens",
    "store",
    "batch",
    "sampler",
    "texts",
    "pairs",
    "data",
    "prompts",
    # models and the loss
    "masks",
    "attention",
    "logps",
    "sharing",
    "generation",
    "online",
    "losses",
    "adapters",
    "reference",
    "cache",
    "cached",
    "metrics",
    "schedules",
    "finite",
    "slim",
    "position",
    "training",
    "module",
    "sft",
    "preflight",
    # a run and what it leaves
    "checkpoints",
    "resuming",
    "loggers",
    "callbacks",
    "console",
    "report",
    "export",
    "hub",
    "words",
    "options",
    "precision",
    "allocator",
    "standard",
    "cli",
    "rebuild",
    "demo",
    "serving",
)
# These import from all.
ENTRANCES = {"__init__", "__main__"}

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
def test_imports_come_from_the_left(file: Path) -> None:
    own = unit(file)
    if own in ENTRANCES:
        return
    assert own in ORDER, f"say in ORDER where dpo/{own} stands"
    assert imported_units(file) <= set(ORDER[: ORDER.index(own)])


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
def test_no_file_is_longer_than_400_lines(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400


@pytest.mark.parametrize("name", ["train.py", "serve.py"])
def test_command_lines_stay_under_50_lines(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) < 50


def test_the_map_names_every_module() -> None:
    text = (PACKAGE / "__init__.py").read_text(encoding="utf-8")
    missing = {unit(file) for file in FILES} - ENTRANCES - {name for name in ORDER if f"`{name}`" in text}
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
