"""Rules about the files themselves that neither ruff nor mypy knows (`make test` runs those two itself)."""

import configparser
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def requirements() -> list[Requirement]:
    config = setup_cfg()
    blocks = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    lines = "\n".join(blocks).splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines if not line.startswith("#")]
    assert all(found), "constraints.txt holds exact pins only: no URL, no build suffix, no range"
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def test_every_requirement_is_pinned_within_its_range() -> None:
    versions = pins()
    for requirement in requirements():
        if requirement.name == "lm_eval":  # the extra `harness`, of which setup.cfg says why; it is pinned there
            continue
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement


def test_pins_are_free_of_a_platform() -> None:
    assert not [name for name in pins() if name.startswith(("nvidia", "cuda", "triton"))]


def test_malicious_lightning_releases_are_out_of_range() -> None:
    (lightning,) = [r for r in requirements() if r.name == "lightning"]
    assert not any(lightning.specifier.contains(version) for version in ("2.6.2", "2.6.3", "2.6.5", "2.7.0"))


def test_ruff_rules_are_all_on() -> None:
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["lint"]
    assert {"E", "F", "I", "UP", "B", "ANN", "D", "SIM", "RUF", "C90"} <= set(lint["select"])
    assert lint["mccabe"]["max-complexity"] <= 7
    assert "F821" not in lint["ignore"], "an undefined name is never allowed"


def test_mypy_is_strict() -> None:
    assert setup_cfg()["mypy"].getboolean("strict")


def test_signatures_hold_real_types() -> None:
    """Postponed annotations are strings, which neither jsonargparse nor the shape checks can read."""
    files = [*(ROOT / "dpo").rglob("*.py"), ROOT / "train.py", ROOT / "serve.py"]
    late = [f.name for f in files if "from __future__ import annotations" in f.read_text(encoding="utf-8")]
    assert not late
