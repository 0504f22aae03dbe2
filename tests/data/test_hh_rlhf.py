"""`HHRLHF`: reading, the store of tokens, splits and steps."""

import errno
import gzip
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer

from dpo.data import store
from dpo.data.columns import PairRow
from dpo.data.dialogue import DialoguePair, Refusal, parse_pair
from dpo.data.formats import Fault, read_rows
from dpo.data.preferences import HHRLHF
from dpo.data.sampler import Step
from dpo.data.sources import HH_COLUMNS, find_hh_files
from dpo.data.tokenization import EncodedPair, PairEncoder
from dpo.models.batch import Example
from tests.support.data import ODD, ODD_FILE, OF_MESSAGES, byte_level
from tests.support.data import cache as cache
from tests.support.runs import Lab

KEPT = [row for row in ODD if row["expect"] == "kept"]


def line(question: str, chosen: str = " yes", rejected: str = " no") -> bytes:
    prompt = f"\n\nHuman: {question}\n\nAssistant:"
    return json.dumps({"chosen": prompt + chosen, "rejected": prompt + rejected}).encode() + b"\n"


def write(folder: Path, subset: str, split: str, lines: Iterable[bytes]) -> Path:
    file = folder / subset / f"{split}.jsonl.gz"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(gzip.compress(b"".join(lines), mtime=0))
    return file


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two subsets of 40 and 10 training rows, with 20 openings in all, and 3 test rows each."""
    write(tmp_path / "data", "one", "train", [line(f"what is {i % 20}?", f" it is {i}") for i in range(40)])
    write(tmp_path / "data", "two", "train", [line(f"what is {i}?", f" two {i}") for i in range(10)])
    for subset in ("one", "two"):
        write(tmp_path / "data", subset, "test", [line(f"what is {subset} {i}?") for i in range(3)])
    return tmp_path / "data"


def ready(tokenizer: str, folder: Path | str, **options: object) -> HHRLHF:
    data = HHRLHF(str(folder), tokenizer=tokenizer, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def examples(data: HHRLHF, name: str) -> list[Example]:
    return [data.pairs_by_split[name][i] for i in range(len(data.pairs_by_split[name]))]


def ids(data: HHRLHF, name: str) -> list[str]:
    return [example.id for example in examples(data, name)]


# --- reading ---------------------------------------------------------------------------------------------------------

GOOD = line("a")
BAD = {
    b'{"chosen": "\xff", "rejected": ""}\n': Fault.INVALID_UTF8,
    b'{"chosen": "\\ud800", "rejected": ""}\n': Fault.INVALID_UTF8,
    b'{"chosen": "a", "rejected": \n': Fault.BROKEN_JSON,
    b"\n": Fault.BROKEN_JSON,
    b"[" * 100_000 + b"\n": Fault.BROKEN_JSON,
    b'{"chosen": "a", "chosen": "b", "rejected": "c"}\n': Fault.REPEATED_KEY,
    b'{"chosen": "a"}\n': Fault.MISSING_FIELD,
    b'{"rejected": "a"}\n': Fault.MISSING_FIELD,
    b'{"chosen": "a", "rejected": null}\n': Fault.WRONG_TYPE,
    b'{"chosen": ["a"], "rejected": "b"}\n': Fault.WRONG_TYPE,
    b'["a", "b"]\n': Fault.WRONG_TYPE,
    b'{"chosen": "a", "reje': Fault.CUT_LINE,
}
bad_lines = pytest.mark.parametrize(("bad", "fault"), BAD.items(), ids=range(len(BAD)))


def test_every_fault_has_an_example() -> None:
    assert set(BAD.values()) == set(Fault)


@bad_lines
def test_a_bad_row_yields_its_fault(tmp_path: Path, bad: bytes, fault: Fault) -> None:
    file = write(tmp_path, "a", "train", [GOOD, GOOD, bad])
    with file.open("rb") as raw:
        *good, last = read_rows(raw, str(file), HH_COLUMNS.parse_row, skip_bad=True)
    assert [type(row) for row in good] == [PairRow, PairRow]
    assert last is fault


@bad_lines
def test_a_bad_row_stops_the_build_and_leaves_no_files(
    tokenizer: str, tmp_path: Path, cache: Path, bad: bytes, fault: Fault
) -> None:
    file = write(tmp_path, "a", "train", [GOOD, bad])
    with pytest.raises(ValueError) as error:
        ready(tokenizer, tmp_path)
    for part in (str(file), "line 2", fault, "--data.on_bad_row skip"):
        assert part in str(error.value)
    assert list(cache.iterdir()) == []


def test_bad_rows_can_be_skipped_and_are_counted(tokenizer: str, tmp_path: Path) -> None:
    *others, cut = BAD
    write(tmp_path, "a", "train", [line("b"), *others, line("c"), cut])
    data = ready(tokenizer, tmp_path, on_bad_row="skip", val_fraction=0.0)
    counts = data.audits_by_split["train"].counts_by_subset["a"]
    expected = {fault: list(BAD.values()).count(fault) for fault in Fault}
    assert (counts.read, counts.kept, counts.bad) == (2 + len(BAD), 2, expected)
    assert ids(data, "train") == ["a/train:1", f"a/train:{2 + len(others)}"]


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            gzip.compress(GOOD * 9, mtime=0)[:-9],
            "train.jsonl.gz, after row .*file ended before .*Download the file",
        ),
        (b"no gzip", "train.jsonl.gz, after row 0: cannot be read .*Not a gzipped file"),
        (gzip.compress(b"", mtime=0), "train.jsonl.gz, line 1: the file is empty"),
        (b"", "train.jsonl.gz, line 1: the file is empty"),
    ],
)
def test_a_broken_file_is_never_skipped(
    tokenizer: str, tmp_path: Path, cache: Path, content: bytes, message: str, on_bad_row: str
) -> None:
    file = write(tmp_path, "a", "train", [])
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ready(tokenizer, tmp_path, on_bad_row=on_bad_row)
    assert list(cache.iterdir()) == []


def test_plain_and_compressed_files_give_the_same_examples(tokenizer: str, tmp_path: Path) -> None:
    write(tmp_path / "gz", "a", "train", [line("b"), line("c")])
    plain = tmp_path / "plain" / "a" / "train.jsonl"
    plain.parent.mkdir(parents=True)
    plain.write_bytes(line("b") + line("c"))
    one, two = (ready(tokenizer, tmp_path / name, val_fraction=0.0) for name in ("gz", "plain"))
    assert examples(one, "train") == examples(two, "train")
    write(tmp_path / "plain", "a", "train", [line("b")])
    with pytest.raises(ValueError, match=r"train\.jsonl\.gz and train\.jsonl both exist"):
        ready(tokenizer, tmp_path / "plain")


def test_subsets_are_read_in_the_given_order(folder: Path) -> None:
    assert [(s.subset, s.split) for s in find_hh_files(folder, None)] == [
        ("one", "train"), ("one", "test"), ("two", "train"), ("two", "test"),
    ]  # fmt: skip
    assert [s.subset for s in find_hh_files(folder, ["two", "one"])] == ["two", "two", "one", "one"]
    with pytest.raises(ValueError, match="found one, two, not three"):
        find_hh_files(folder, ["two", "three"])
    with pytest.raises(ValueError, match="found none"):
        find_hh_files(folder / "one", None)


def test_a_path_that_is_not_a_folder_is_looked_up_on_the_hub(tokenizer: str) -> None:
    for path in ("nobody/has-this", "no/such/folder"):
        with pytest.raises(ValueError, match=f"'{path}' is not a folder on this machine and cannot be read from"):
            ready(tokenizer, path)


def test_only_the_given_subsets_are_downloaded(tokenizer: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot(repository: str, *, allow_patterns: list[str], repo_type: str, local_files_only: bool) -> str:
        assert (repository, repo_type) == ("some/data", "dataset")
        asked.append((local_files_only, *allow_patterns))
        return str(folder)

    monkeypatch.setattr("dpo.data.sources.snapshot_download", snapshot)
    data = ready(tokenizer, "some/data", subsets=["two"])
    patterns = ("two/train.jsonl*", "two/test.jsonl*")
    assert asked == [(False, *patterns), (True, *patterns)]  # downloaded once, then read from the cache
    assert list(data.audits_by_split["train"].counts_by_subset) == ["two", "total"]
    with pytest.raises(ValueError, match="found one, two, not three"):
        ready(tokenizer, "some/data", subsets=["three"])


# --- tokenized once --------------------------------------------------------------------------------------------------


def test_odd_rows_are_counted_under_their_reason(tokenizer: str, tmp_path: Path) -> None:
    write(tmp_path, "odd", "train", [ODD_FILE.read_bytes()])
    data = ready(tokenizer, tmp_path, max_length=64, val_fraction=0.0)
    counts = data.audits_by_split["train"].counts_by_subset["odd"]
    assert (counts.read, counts.kept) == (len(ODD), len(KEPT))
    assert counts.refused == {reason: int(reason not in OF_MESSAGES) for reason in Refusal}
    numbers = [n for n, row in enumerate(ODD, 1) if row["expect"] == "kept"]
    assert ids(data, "train") == [f"odd/train:{n}" for n in numbers]


def test_examples_equal_the_encoder_output(tokenizer: str, tmp_path: Path) -> None:
    write(tmp_path, "odd", "train", [ODD_FILE.read_bytes()])
    data = ready(tokenizer, tmp_path, max_length=64, val_fraction=0.0)
    encoder = PairEncoder(byte_level(), 64)
    for row, example, cost in zip(
        KEPT, examples(data, "train"), data.pairs_by_split["train"].token_counts, strict=True
    ):
        parsed = parse_pair(row["chosen"], row["rejected"])
        assert isinstance(parsed, DialoguePair)
        expected = encoder.encode(parsed)
        assert isinstance(expected, EncodedPair)
        assert (example.prompt, *example.answers) == (expected.prompt, expected.chosen, expected.rejected)
        assert cost == len(expected.prompt) + len(expected.chosen) + len(expected.rejected)


def test_an_existing_store_is_reused_and_its_audit_printed_again(
    tokenizer: str, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = ready(tokenizer, folder)
    shown = capsys.readouterr().out
    monkeypatch.setattr(store, "build_store", None)
    second = ready(tokenizer, folder, val_fraction=0.5, batch_size=2, max_tokens=None, seed=1)
    assert capsys.readouterr().out == shown[shown.index("Rows of the train split") :]
    assert second.audits_by_split == first.audits_by_split
    (made,) = cache.iterdir()
    stored = json.loads((made / "audit.json").read_text())
    assert stored == {split: audit.to_dict() for split, audit in first.audits_by_split.items()}


@pytest.mark.parametrize(
    "change",
    [{"max_length": 64}, {"limit": 3}, {"on_bad_row": "skip"}, {"subsets": ["one"]}, {"subsets": ["two", "one"]}],
)
def test_options_that_change_the_rows_get_a_store_of_their_own(
    tokenizer: str, folder: Path, cache: Path, change: dict[str, object]
) -> None:
    ready(tokenizer, folder)
    ready(tokenizer, folder, **change)
    assert len(list(cache.iterdir())) == 2


def test_a_changed_file_is_tokenized_again(tokenizer: str, folder: Path) -> None:
    before = ready(tokenizer, folder)
    write(folder, "two", "test", [line("new?")])
    after = ready(tokenizer, folder)
    assert (len(before.pairs_by_split["test"]), len(after.pairs_by_split["test"])) == (6, 4)


def test_an_existing_store_is_not_replaced(tokenizer: str, folder: Path, cache: Path) -> None:
    data = ready(tokenizer, folder)
    (made,) = cache.iterdir()
    before = (made / "train.arrow").stat()
    store.build_store(made, find_hh_files(folder, None), data.encoder, None, False)
    assert (made / "train.arrow").stat() == before
    assert list(cache.iterdir()) == [made]


def test_an_interrupted_build_leaves_no_files(
    tokenizer: str, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    data = HHRLHF(str(folder), tokenizer=tokenizer)
    assert data.encoder.max_length == data.max_length  # created before encode_batch is replaced
    monkeypatch.setattr(PairEncoder, "encode_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.prepare_data()
    assert list(cache.iterdir()) == []


# --- splits and steps ------------------------------------------------------------------------------------------------


def opening(example: Example) -> str:
    return byte_level().decode(example.prompt).split("\n\n")[1]


def test_no_opening_is_in_both_train_and_val(tokenizer: str, folder: Path) -> None:
    sizes = []
    for val_fraction in (0.2, 0.5):
        data = ready(tokenizer, folder, val_fraction=val_fraction)
        train, val = ({opening(example) for example in examples(data, name)} for name in ("train", "val"))
        assert not train & val
        assert len(train | val) == 20
        assert len(data.pairs_by_split["train"]) + len(data.pairs_by_split["val"]) == 50
        sizes.append(ids(data, "val"))
        assert len(data.pairs_by_split["test"]) == 6  # the test split is never divided
    assert set(sizes[0]) < set(sizes[1])  # a larger share holds out the same rows and more


def test_without_a_validation_split(tokenizer: str, folder: Path) -> None:
    data = ready(tokenizer, folder, val_fraction=0.0)
    assert len(data.pairs_by_split["train"]) == 50
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match=r"val_fraction: expected more than 0, to validate"):
        data.setup("validate")


def test_limit_applies_to_each_file(tokenizer: str, folder: Path) -> None:
    data = ready(tokenizer, folder, limit=2, val_fraction=0.0)
    assert ids(data, "train") == ["one/train:1", "one/train:2", "two/train:1", "two/train:2"]
    assert ids(data, "test") == ["one/test:1", "one/test:2", "two/test:1", "two/test:2"]


def batches(steps: Iterable[Step]) -> list[str]:
    return [name for step in steps for batch in step.micro_batches for name in batch.ids]


def test_steps_cover_the_pairs(tokenizer: str, folder: Path) -> None:
    data = ready(tokenizer, folder, batch_size=7, val_fraction=0.3)
    assert isinstance(data, LightningDataModule)
    in_order = ready(tokenizer, folder, batch_size=1, val_fraction=0.3, shuffle=False)
    assert batches(in_order.train_dataloader()) == ids(data, "train")
    shuffled = batches(data.train_dataloader())
    assert shuffled != ids(data, "train")
    assert sorted(shuffled) == sorted(ids(data, "train"))
    assert sorted(batches(data.test_dataloader())) == sorted(batches(data.predict_dataloader())) == ids(data, "test")
    assert sorted(batches(data.val_dataloader())) == sorted(ids(data, "val"))


class Count(LightningModule):
    """A module that trains nothing and counts its pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": 0, "val": 0}

    def training_step(self, step: Step) -> torch.Tensor:
        self.seen["train"] += sum(map(len, step.micro_batches))
        return self.weight**2

    def validation_step(self, step: Step) -> None:
        self.seen["val"] += sum(map(len, step.micro_batches))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


@pytest.mark.parametrize("val_fraction", [0.0, 0.4])
def test_lightning_runs_over_all_pairs(tokenizer: str, folder: Path, val_fraction: float) -> None:
    data, module = HHRLHF(str(folder), tokenizer=tokenizer, val_fraction=val_fraction), Count()
    Trainer(max_epochs=1, accelerator="cpu", **QUIET).fit(module, datamodule=data)
    sizes = {name: len(pairs) for name, pairs in data.pairs_by_split.items()}
    assert module.seen["train"] == sizes["train"]
    assert (module.seen["val"] > 0) == ("val" in sizes) == (val_fraction > 0)


def test_accumulated_batches_share_the_pairs_of_a_step(tokenizer: str, folder: Path) -> None:
    data, module = HHRLHF(str(folder), tokenizer=tokenizer, batch_size=10, val_fraction=0.0), Count()
    trainer = Trainer(max_epochs=1, accelerator="cpu", accumulate_grad_batches=2, **QUIET)
    trainer.fit(module, datamodule=data)
    assert (trainer.global_step, module.seen["train"]) == (50 / 10, 50)


def test_a_split_without_pairs_raises(tokenizer: str, tmp_path: Path) -> None:
    write(tmp_path, "a", "train", [line("b")])
    data = ready(tokenizer, tmp_path, val_fraction=0.0)
    with pytest.raises(ValueError, match="No pairs are left for 'test'"):
        data.test_dataloader()
    data = ready(tokenizer, tmp_path, val_fraction=0.999999)
    with pytest.raises(ValueError, match="No pairs are left for 'train'"):
        data.train_dataloader()


def test_a_run_without_pairs_fails_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every row is refused, because the text format of hh-rlhf has no system messages."""
    row = {"system": "Be brief.", "prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    words = ["--data=PreferencePairs", f"--data.path={tmp_path / 'a.jsonl'}", "--name=a"]
    assert Lab(tmp_path).main("fit", *words) == 1
    assert "No pairs are left for 'train'" in capsys.readouterr().err


def test_generated_data_is_the_default_and_stored_once(tokenizer: str, cache: Path) -> None:
    first, second = HHRLHF(tokenizer=tokenizer), HHRLHF(tokenizer=tokenizer)
    for data in (first, second):
        data.prepare_data()
        data.setup("fit")
    assert len(list(cache.glob("tokens-*"))) == 1
    assert set(first.pairs_by_split) == {"train", "val", "test"}
    assert first.pairs_by_split["train"][0] == second.pairs_by_split["train"][0]
    total = first.audits_by_split["train"].counts_by_subset["total"]
    assert total.kept == total.read >= 1000


def test_end_tokens_of_the_generation_config_end_answers(tmp_path: Path) -> None:
    byte_level().save_pretrained(tmp_path)
    assert HHRLHF(tokenizer=str(tmp_path)).encoder.end_ids == (0,)
    for ends, expected in ((2, (0, 2)), ([2, 0], (0, 2)), (None, (0,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        assert HHRLHF(tokenizer=str(tmp_path)).encoder.end_ids == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subsets": []}, "subsets: expected at least one name, each once"),
        ({"subsets": ["a", "a"]}, "subsets: expected at least one name, each once"),
        ({"max_length": 7}, "max_length: expected at least 8 tokens, got 7"),
        ({"batch_size": 0}, "batch_size: expected at least 1 pair, got 0"),
        ({"max_tokens": 0}, "max_tokens: expected at least 1 token"),
        ({"val_fraction": 1.0}, "val_fraction: expected a share from 0"),
        ({"val_fraction": -0.1}, "val_fraction: expected a share from 0"),
        ({"limit": 0}, "limit: expected at least 1 row"),
        ({"seed": -1}, "seed: expected at least 0"),
    ],
)
def test_invalid_options_raise_in_the_constructor(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"--data.{message}"):
        HHRLHF(tokenizer="no-tokenizer", **options)


def test_real_rows_add_up(hh_rlhf: Path, pretrained: Path) -> None:
    data = ready(str(pretrained), hh_rlhf, limit=300)
    subsets = sorted(folder.name for folder in hh_rlhf.iterdir() if folder.is_dir())
    for split, audit in data.audits_by_split.items():
        assert list(audit.counts_by_subset) == [*subsets, "total"]
        for subset in subsets:
            rows = len(gzip.decompress((hh_rlhf / subset / f"{split}.jsonl.gz").read_bytes()).splitlines())
            count = audit.counts_by_subset[subset]
            assert count.kept + sum(count.refused.values()) == count.read == min(rows, 300)
            assert sum(count.bad.values()) == 0
    assert (
        len(data.pairs_by_split["train"]) + len(data.pairs_by_split["val"])
        == data.audits_by_split["train"].counts_by_subset["total"].kept
    )


def test_a_full_disk_raises_an_error_with_the_path(
    tokenizer: str, folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store.ArrowWriter, "write_batch", full)
    with pytest.raises(OSError, match=rf"{cache}.*arrow: No space left on device .* another folder with .* DPO_CACHE"):
        ready(tokenizer, folder)
    assert not list(cache.iterdir())
