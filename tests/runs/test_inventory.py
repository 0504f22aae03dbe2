"""What a run has loaded: in audit.json, and in what reads it."""

import hashlib
import json
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

import dpo
from dpo.reports.contents import read_contents
from dpo.reports.provenance import provenance
from dpo.runs.card_sections import data_section
from dpo.runs.folder import Run
from dpo.runs.inventory import code_sha256, code_state, hash_model_files, read_audit, read_inventory
from tests.support.data import cache as cache  # every test has an empty cache of its own
from tests.support.runs import Lab, pairs, policy


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_run_lists_what_it_has_loaded_and_its_readers_find_it(tmp_path: Path) -> None:
    other = policy(seed=1)
    run = Lab(tmp_path).fit("a", "--trainer.max_steps=1", f"--model.reference={other}", "--ledger.enabled=false")
    loaded = json.loads(run.audit_path.read_text())["loaded"]
    weights = {
        str(path): {name: sha256(path / name) for name in ("config.json", "model.safetensors")}
        for path in (policy(), other)
    }
    assert loaded["weights"] == weights
    assert len(loaded["reference_sha256"]) == 64
    files = loaded["tokenizer"][str(policy())]
    assert files["tokenizer.json"] == sha256(policy() / "tokenizer.json")
    data = [pairs() / "pairs" / f"{split}.jsonl.gz" for split in ("train", "test")]
    assert loaded["data"] == {str(file): sha256(file) for file in data}
    assert loaded["code"]["sha256"] == code_sha256()
    assert loaded["libraries"]["torch"] == version("torch")

    assert set(read_audit(run)) == {"train", "test"}
    assert "loaded" not in data_section(run)
    facts = dict(provenance(read_contents(run)))
    assert facts[f"weights {other}/model.safetensors"] == weights[str(other)]["model.safetensors"]
    assert facts[f"data {data[0]}"] == sha256(data[0])
    assert facts["reference in memory"] == loaded["reference_sha256"]
    assert facts["torch"] == version("torch")
    assert not [name for name in facts if "now" in name]


def test_the_report_of_an_older_run_says_what_is_installed_now(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.metrics_path.write_text("step,train/loss\n1,0.6\n")
    run.audit_path.write_text(json.dumps({"train": {"total": {"kept": 4}}}))
    assert read_inventory(run) == {}
    facts = dict(provenance(read_contents(run)))
    assert facts["torch, installed now"] == version("torch")
    assert facts[f"code of dpo-lightning {dpo.__version__}, now"] == code_sha256()


def test_the_model_under_an_adapter_is_listed_too(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
        (folder / "notes.txt").write_text("not loaded")
    (base / "model.safetensors").write_bytes(b"weights")
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").write_bytes(b"more")
    assert hash_model_files([str(adapter), str(base)], ["*.safetensors"]) == {
        str(adapter): {"adapter_model.safetensors": hashlib.sha256(b"more").hexdigest()},
        str(base): {"model.safetensors": hashlib.sha256(b"weights").hexdigest()},
    }


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_commit_is_named_where_the_code_is_in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "dpo"
    package.mkdir()
    (package / "__init__.py").write_text("a = 1\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message=of a user, who has installed the package here")
    monkeypatch.setattr(dpo, "__file__", str(package / "__init__.py"))
    assert (code_state()["commit"], code_state()["changed"]) == (None, [])
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message=the package")
    assert (code_state()["commit"], code_state()["changed"]) == (git(tmp_path, "rev-parse", "HEAD"), [])
    before = code_state()["sha256"]
    (package / "__init__.py").write_text("a = 2\n")
    assert code_state()["changed"] == ["dpo/__init__.py"]
    assert code_state()["sha256"] != before
