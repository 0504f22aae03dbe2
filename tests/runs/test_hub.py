"""Uploads of an export to a local server that implements the part of the hub's HTTP API in use."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from transformers import AutoTokenizer, PreTrainedModel

from dpo import quickstart
from dpo.__main__ import main
from dpo.runs.hub import NO_TOKEN_MESSAGE, export_files, push
from tests.support.hub import TOKEN, Hub, Repository, serve_hub

# huggingface_hub passes uploads to its HTTP client in a way that is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as state:
        yield state


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run: an export with small and large files, and files that must not be uploaded."""
    files = {
        "export/README.md": "---\nlicense: apache-2.0\n---\n# Card: café\n",
        "export/config.json": '{"model_type": "llama"}',
        "export/train_config.yaml": "model:\n  loss: DPO\n",
        "export/tokenizer.json": json.dumps({"vocab": [f"word{i}" for i in range(500)]}),
        "checkpoints/last.ckpt": "weights and optimizer",
        "metrics.csv": "step,train/loss\n",
        "wandb/debug.log": "log",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    weights(tmp_path / "export" / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def weights(file: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file: length of the header, the header, then binary data with every byte value."""
    header = json.dumps({"__metadata__": metadata}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(range(256)) * 40)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def api(hub: Hub, token: str = TOKEN) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def test_the_hub_receives_the_export_byte_for_byte(hub: Hub, run: Path) -> None:
    url = push(run, "user/name", private=False, api=api(hub))
    repository = hub.repositories["user/name"]
    assert repository.files == contents(run / "export")
    assert (repository.commits, repository.private, url) == (1, False, f"{hub.url}/user/name/commit/1")
    # The two larger files are sent as objects, the small ones inside the commit.
    assert set(hub.objects.values()) == {
        (run / "export" / name).read_bytes() for name in ("model.safetensors", "tokenizer.json")
    }


def test_unchanged_files_are_not_sent_again(hub: Hub, run: Path) -> None:
    push(run, "user/name", private=False, api=api(hub))
    (run / "export" / "config.json").write_text('{"model_type": "gpt2"}')
    hub.requests.clear()
    push(run, "user/name", private=False, api=api(hub))
    assert not [request for request in hub.requests if "/objects/" in request and request.startswith("PUT")]
    assert hub.repositories["user/name"].files == contents(run / "export")
    push(run, "user/name", private=False, api=api(hub))
    assert hub.repositories["user/name"].commits == 2


def test_only_files_of_an_export_are_sent(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = contents(run / "export")
    extra = [
        ".env",
        "optimizer.safetensors",
        "pytorch_model.bin",
        "train.log",
        "checkpoints/model.safetensors",
    ]
    for name in extra:
        (run / "export" / name).parent.mkdir(exist_ok=True)
        (run / "export" / name).write_text("x")
    push(run, "user/name", private=False, api=api(hub))
    assert hub.repositories["user/name"].files == expected
    assert (
        f"Not uploaded, because they are not part of an export: {', '.join(sorted(extra))}" in capsys.readouterr().out
    )


def test_results_of_benchmarks_are_sent_to_where_the_hub_reads_them(hub: Hub, run: Path) -> None:
    for name in (".eval_results/bench.yaml", ".eval_results/notes.txt", "deeper/.eval_results/bench.yaml"):
        (run / "export" / name).parent.mkdir(parents=True, exist_ok=True)
        (run / "export" / name).write_text("[]")
    push(run, "user/name", private=False, api=api(hub))
    sent = hub.repositories["user/name"].files
    assert [name for name in sent if "eval_results" in name] == [".eval_results/bench.yaml"]


def test_all_files_that_transformers_saves_are_sent(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    export = tmp_path / "export"
    tiny_model("llama").save_pretrained(export, max_shard_size="50KB")
    AutoTokenizer.from_pretrained(quickstart.POLICY_FOLDER).save_pretrained(export)
    (export / "README.md").write_text("# Card")
    names = {file.name for file in export_files(tmp_path)}
    assert names == set(contents(export))
    assert "model.safetensors.index.json" in names  # the weights are sharded


def test_a_private_repository_is_created_and_a_public_one_refused(hub: Hub, run: Path) -> None:
    push(run, "user/hidden", private=True, api=api(hub))
    assert hub.repositories["user/hidden"].private
    hub.repositories["user/open"] = Repository(private=False)
    with pytest.raises(ValueError, match="user/open exists and is public"):
        push(run, "user/open", private=True, api=api(hub))
    assert hub.repositories["user/open"].files == {}


def test_a_failed_upload_leaves_the_repository_as_it_was(hub: Hub, run: Path) -> None:
    hub.refuse_uploads = True
    with pytest.raises(OSError, match=r"(?s)The upload to user/name .* failed: .*403"):
        push(run, "user/name", private=False, api=api(hub))
    assert hub.repositories["user/name"].files == {}


def test_a_wrong_token_is_reported(hub: Hub, run: Path) -> None:
    with pytest.raises(OSError, match=r"(?s)The upload to user/name .* failed: .*401"):
        push(run, "user/name", private=False, api=api(hub, token="hf_wrong"))
    assert hub.repositories == {}


def test_an_unreachable_hub_is_reported(hub: Hub, run: Path) -> None:
    nowhere = HfApi(endpoint="http://127.0.0.1:9", token=TOKEN)  # the discard port, where nothing listens
    with pytest.raises(OSError, match=r"The upload to user/name at http://127.0.0.1:9 failed: .*refused"):
        push(run, "user/name", private=False, api=nowhere)


def test_offline_mode_is_reported(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"The upload to user/name .* failed: .*HF_HUB_OFFLINE"):
        push(run, "user/name", private=False, api=api(hub))


@pytest.mark.parametrize("to", ["name", "a/b/c", "user/na me", ""])
def test_a_repository_has_a_user_and_a_name(hub: Hub, run: Path, to: str) -> None:
    with pytest.raises(ValueError, match=r"user/name|Repo id"):
        push(run, to, private=False, api=api(hub))
    assert hub.requests == []


@pytest.mark.parametrize(
    ("secret", "kind"),
    [
        (TOKEN, "what looks like a Hugging Face token"),
        ("wandb_v1_" + "aB3" * 10, "what looks like a Weights & Biases key"),
        ("sk-" + "aB3-" * 10, "what looks like an API key"),
        ("ghp_" + "aB3" * 12, "what looks like an API key"),
        ("AKIA" + "A1B2" * 4, "what looks like an API key"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "what looks like a private key"),
        ("0123456789abcdef" * 2, "the value of the environment variable WANDB_API_KEY"),
    ],
)
@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "model.safetensors"])
def test_a_secret_stops_the_upload(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, name: str, secret: str, kind: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2)
    file = run / "export" / name
    if file.suffix == ".safetensors":
        weights(file, metadata={"comment": f"key: {secret}"})
    else:
        file.write_text(f'{file.read_text(encoding="utf-8")}"key": "{secret}"', encoding="utf-8")
    with pytest.raises(ValueError) as refusal:
        push(run, "user/name", private=False, api=api(hub))
    assert f"{file} contains {kind}" in str(refusal.value)
    assert secret not in str(refusal.value)
    assert hub.requests == []


def test_a_secret_in_another_file_does_not_stop_the_upload(hub: Hub, run: Path) -> None:
    (run / "export" / ".env").write_text(f"HF_TOKEN={TOKEN}")
    push(run, "user/name", private=False, api=api(hub))
    assert not any(TOKEN.encode() in file for file in hub.repositories["user/name"].files.values())


def test_links_out_of_the_export_are_refused(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("home")
    (outside / "id_ed25519").write_text("key")
    for name, target in {
        "LICENSE": outside / "id_ed25519",
        "results.json": Path("../metrics.csv"),
        "folder": outside,
    }.items():
        link = run / "export" / name
        link.symlink_to(target)
        with pytest.raises(ValueError, match=f"{name} links to a place outside"):
            export_files(run)
        link.unlink()
    (run / "export").rename(outside / "export")
    (run / "export").symlink_to(outside / "export")
    with pytest.raises(ValueError, match="export links to a place outside"):
        export_files(run)


def test_links_to_the_run_and_inside_the_export_are_followed(run: Path, tmp_path: Path) -> None:
    (run / "export" / "LICENSE").symlink_to("README.md")
    (run / "latest").symlink_to(run)
    assert {file.name for file in export_files(run / "latest")} == set(contents(run / "export"))


@pytest.mark.parametrize("missing", ["README.md", "config.json", "model.safetensors", None])
def test_an_unfinished_export_is_refused(run: Path, missing: str | None) -> None:
    if missing is None:
        (run / "export").rename(run / "elsewhere")
    else:
        (run / "export" / missing).unlink()
    with pytest.raises(ValueError, match="Expected a model card, a configuration and weights"):
        export_files(run)


def run_command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"} | variables
    return subprocess.run(
        (sys.executable, "-m", "dpo", *arguments), env=environment, capture_output=True, text=True, timeout=120
    )


def test_command_line(hub: Hub, run: Path) -> None:
    arguments = ("push", "--run", str(run), "--to", "user/name", "--private")
    done = run_command(*arguments, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{hub.url}/user/name/commit/1"
    assert hub.repositories["user/name"].files == contents(run / "export")
    assert hub.repositories["user/name"].private


def test_command_line_without_a_token(hub: Hub, run: Path) -> None:
    done = run_command("push", "--run", str(run), "--to", "user/name", HF_ENDPOINT=hub.url)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"error: {NO_TOKEN_MESSAGE}\n")
    assert hub.requests == []


def test_verbs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert re.search(r"push +Upload a run's export", capsys.readouterr().out)
    assert main([]) == main(["pull"]) == 2
    assert "usage: dpo <verb>" in capsys.readouterr().err
