"""Models, tokenizers and data sets by their hub ids, from a local hub: in its layout, in revisions, and on bad days."""

import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from huggingface_hub import HfApi, constants

from dpo.data.preferences import HHRLHF, PreferencePairs
from dpo.models.loading import ModelLoader, weights_sha256
from dpo.runs.hub import push
from tests.support.data import cache as cache
from tests.support.hub import TOKEN, Hub, serve_hub
from tests.support.runs import Lab, metrics, pairs, policy, rows

HH_SUBSETS = ("harmless-base", "helpful-base", "helpful-online", "helpful-rejection-sampled")
CHUNK = 1024  # bytes that a download keeps at a time; 10 MB otherwise
Read = Callable[[str], Any]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as state:
        yield state


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The token of an account."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture
def hh_layout(tmp_path: Path) -> Path:
    """Four subsets of pairs, and what stands beside them: transcripts of another kind, the card, settings of git."""
    folder = tmp_path / "hh"
    for subset in HH_SUBSETS:
        shutil.copytree(pairs() / "pairs", folder / subset)
    transcripts = json.dumps([{"transcript": "\n\nHuman: Hello.", "rating": 1.0}]).encode()
    (folder / "red-team-attempts").mkdir()
    (folder / "red-team-attempts" / "red_team_attempts.jsonl.gz").write_bytes(gzip.compress(transcripts))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / ".gitattributes").write_text("*.gz filter=lfs\n")
    return folder


def write_flat(folder: Path, count: int) -> Path:
    """Write pairs as one file, which is large enough to be an object."""
    folder.mkdir(parents=True)
    lines = (json.dumps({"chosen": chosen, "rejected": rejected}) + "\n" for chosen, rejected in rows(0, count))
    (folder / "train.jsonl").write_text("".join(lines))
    return folder


def write_hh(folder: Path, count: int) -> Path:
    """Write pairs in the layout of hh-rlhf, as one file that is large enough to be an object."""
    file = write_flat(folder / "one", count) / "train.jsonl"
    assert file.stat().st_size > 1_000
    return folder


def read_hh(name: str, **options: Any) -> HHRLHF:
    data = HHRLHF(name, tokenizer=str(policy()), val_fraction=0.0, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def read_pairs(name: str) -> PreferencePairs:
    data = PreferencePairs(name, tokenizer=str(policy()), val_fraction=0.0)
    data.prepare_data()
    data.setup("fit")
    return data


def kept(data: HHRLHF | PreferencePairs) -> int:
    return data.audits_by_split["train"].counts_by_subset["total"].kept


def model_of(name: str) -> Any:
    return ModelLoader().load_model(name)


def tokenizer_of(name: str) -> Any:
    return ModelLoader().load_tokenizer(name)


# Each way to read, the name of the repository that it reads, and a folder that it can read.
READERS = pytest.mark.parametrize(
    ("read", "prefix", "make"),
    [
        (read_hh, "datasets/", write_hh),
        (read_pairs, "datasets/", write_flat),
        (model_of, "", lambda *_: policy()),
        (tokenizer_of, "", lambda *_: policy()),
    ],
    ids=["hh", "pairs", "model", "tokenizer"],
)


# huggingface_hub passes uploads to its HTTP client in a way that is deprecated there.
@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw:DeprecationWarning")
def test_a_run_from_the_hub_and_back(
    hub: Hub, hh_layout: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on ids of a model and of hh-rlhf in its real layout; its export is pushed, and read by its id again."""
    hub.publish("datasets/Anthropic/hh-rlhf", hh_layout)
    hub.publish("someone/policy", policy())
    words = ("--model.policy=someone/policy", "--data.path=Anthropic/hh-rlhf", "--trainer.max_steps=2")
    run = Lab(tmp_path).fit("one", *words)
    assert [row["step"] for row in metrics(run)] == [1, 2]
    audit = json.loads(run.audit_path.read_text())["train"]
    assert list(audit) == [*HH_SUBSETS, "total"]
    assert not [request for request in hub.requests if "resolve" in request and "red_team" in request]
    printed = capsys.readouterr()
    assert "Error" not in printed.err + printed.out
    push(run.folder, "me/mine", private=False, api=HfApi(endpoint=hub.url, token=TOKEN))
    exported = ModelLoader().load_model(str(run.export_folder))
    assert weights_sha256(ModelLoader().load_model("me/mine")) == weights_sha256(exported)
    assert weights_sha256(exported) != weights_sha256(ModelLoader().load_model("someone/policy"))


def test_a_data_set_is_downloaded_once_and_found_without_the_hub(hub: Hub, hh_layout: Path, cache: Path) -> None:
    hub.publish("datasets/someone/once", hh_layout)
    assert kept(read_hh("someone/once", subsets=["helpful-base"])) == 24
    downloads = [request for request in hub.requests if request.startswith("GET /datasets/")]
    assert len(downloads) == 2 and all("/helpful-base/" in request for request in downloads)
    hub.requests.clear()
    read_hh("someone/once", subsets=["helpful-base"])
    assert not [request for request in hub.requests if "/resolve/" in request]
    with patch.object(constants, "HF_HUB_OFFLINE", True):
        assert kept(read_hh("someone/once", subsets=["helpful-base"])) == 24
    with pytest.raises(ValueError, match=rf"found {', '.join(HH_SUBSETS)}, not red-team-attempts"):
        read_hh("someone/once", subsets=["red-team-attempts"])


@pytest.mark.parametrize("read", [read_hh, read_pairs])
def test_the_newest_revision_is_read_and_an_older_one_by_its_address(
    hub: Hub, cache: Path, tmp_path: Path, read: Read
) -> None:
    name = f"someone/revised-{read.__name__}"
    old = hub.publish(f"datasets/{name}", write_hh(tmp_path / "old", 24))
    assert kept(read(name)) == 24
    new = hub.publish(f"datasets/{name}", write_hh(tmp_path / "new", 30))
    hub.requests.clear()
    assert kept(read(name)) == 30
    assert {request.split("/resolve/")[1].split("/")[0] for request in hub.requests if "/resolve/" in request} == {new}
    assert kept(read_pairs(f"hf://datasets/{name}@{old}/one/train.jsonl")) == 24


@READERS
def test_what_is_missing_is_said_in_one_line(
    hub: Hub, cache: Path, read: Read, prefix: str, make: Callable[..., Path]
) -> None:
    with pytest.raises(
        ValueError, match=r"'nobody/nothing'.* the hub has nothing of this name, or it is private: che"
    ) as e:
        read("nobody/nothing")
    assert "\n" not in str(e.value) and "hf auth login" in str(e.value)


@READERS
def test_what_is_gated_says_to_log_in(
    hub: Hub, cache: Path, tmp_path: Path, read: Read, prefix: str, make: Callable[..., Path]
) -> None:
    name = f"someone/gated-{read.__name__}"
    hub.publish(f"{prefix}{name}", make(tmp_path / "made", 24), access="accepted")
    with pytest.raises(ValueError, match=rf"{name}.*: it is gated: accept its conditions .* run `hf auth login`") as e:
        read(name)
    assert "\n" not in str(e.value)
    with patch.dict("os.environ", HF_TOKEN=TOKEN):
        read(name)


@READERS
@pytest.mark.usefixtures("token")
def test_an_account_that_was_not_admitted_is_told_so(
    hub: Hub, cache: Path, tmp_path: Path, read: Read, prefix: str, make: Callable[..., Path]
) -> None:
    name = f"someone/closed-{read.__name__}"
    hub.publish(f"{prefix}{name}", make(tmp_path / "made", 24), access="admitted")
    with pytest.raises(ValueError, match=rf"{name}.*: the account of the token was not admitted to it") as e:
        read(name)
    assert "\n" not in str(e.value)


@READERS
def test_a_download_that_was_cut_is_completed(
    hub: Hub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Read, prefix: str, make: Any
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between two attempts
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    folder, name = make(tmp_path / "made", 24), f"someone/cut-{read.__name__}"
    hub.publish(f"{prefix}{name}", folder)
    hub.cuts = 1
    data = read(name)
    assert hub.cuts == 0, "a download was cut"
    if prefix:
        assert kept(data) == 24
    elif read is model_of:
        assert weights_sha256(data) == weights_sha256(model_of(str(folder)))
        received = (folder / "model.safetensors").stat().st_size // 2
        assert hub.ranges == [f"bytes={received // CHUNK * CHUNK}-"], "only the rest is asked for"


@READERS
def test_a_download_that_is_always_cut_is_refused_in_one_line(
    hub: Hub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Read, prefix: str, make: Any
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    name = f"someone/torn-{read.__name__}"
    hub.publish(f"{prefix}{name}", make(tmp_path / "made", 24))
    hub.cuts = 1_000
    with pytest.raises(ValueError, match=rf"{name}.* {hub.url} does not answer, or not to the end") as e:
        read(name)
    assert "\n" not in str(e.value)
    assert not list(cache.glob("tokens-*")), "nothing is kept of half a file"


@READERS
def test_a_hub_that_does_not_answer_in_time_is_named(
    hub: Hub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Read, prefix: str, make: Any
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    name = f"someone/slow-{read.__name__}"
    hub.publish(f"{prefix}{name}", make(tmp_path / "made", 24))
    hub.delay = 0.4
    limits = {"HF_HUB_ETAG_TIMEOUT": 0.05, "HF_HUB_DOWNLOAD_TIMEOUT": 0.05, "DEFAULT_REQUEST_TIMEOUT": 0.05}
    with (
        patch.multiple(constants, **limits),
        pytest.raises(ValueError, match=rf"{name}.* {hub.url} does not answer") as e,
    ):
        read(name)
    assert "\n" not in str(e.value)
