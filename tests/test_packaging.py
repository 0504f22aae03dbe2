"""The package as pip installs it: complete, with its configurations, usable from any folder."""

import configparser
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SNIPPET = """
import lightning as L
from dpo import DPO, HHRLHF, LoRA, losses

data = HHRLHF(batch_size=16, limit=64, val_fraction=0.5)  # the generated dialogues
model = DPO(loss=losses.DPO(beta=0.1), adapter=LoRA(r=16))
trainer = L.Trainer(max_steps=2, gradient_clip_val=1.0, logger=False, enable_progress_bar=False, accelerator="cpu")
trainer.fit(model, data)
trainer.validate(model, data)
print(model.generate(["How do I boil an egg?"]), model.generate(["How do I boil an egg?"], reference=True))
print(model.rewards("How do I boil an egg?", ["In water.", "No."]))
model.save_pretrained("my-policy")
DPO.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
"""


def test_every_package_is_listed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "dpo").rglob("*.py")}
    expected = {".".join(folder.parts) for folder in folders} | {"dpo.configs"}
    assert set(setup["options"]["packages"].split()) == expected


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    source = folder / "source"
    files = subprocess.check_output(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, text=True
    ).splitlines()
    for name in files:  # built from a copy: setuptools leaves a build folder behind
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/", "benchmarks/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, folder: Path, *words: str) -> str:
    """Run Python with the installed package alone, from another folder."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_what_the_program_reads(installed: Path) -> None:
    for name in ("py.typed", "configs/quickstart.yaml", "configs/losses/ipo.yaml", "serving/page/index.html"):
        assert (installed / "dpo" / name).is_file(), name
    shipped = {str(file.relative_to(ROOT)) for file in (ROOT / "configs").rglob("*.yaml")}
    packed = {str(file.relative_to(installed / "dpo")) for file in (installed / "dpo" / "configs").rglob("*.yaml")}
    assert shipped == packed
    assert "dpo = dpo.__main__:run" in next(installed.glob("*.dist-info")).joinpath("entry_points.txt").read_text()


def test_python_from_anywhere(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    (tmp_path / "notebook.py").write_text(SNIPPET)
    run(installed, tmp_path, "notebook.py")
    assert (tmp_path / "my-policy" / "adapter_config.json").is_file()


def test_the_command_from_anywhere(installed: Path, tmp_path: Path) -> None:
    assert "  fit           Train a policy." in run(installed, tmp_path, "-m", "dpo", "--help")
    options = ["--data.limit=64", "--trainer.max_steps=2", "--trainer.enable_progress_bar=false", "--name=one"]
    run(installed, tmp_path, "-m", "dpo", "fit", "--config", "configs/quickstart.yaml", *options)
    assert (tmp_path / "runs" / "one" / "export" / "origin.json").is_file()
