"""The cache of reference log-probabilities: its content, its use, and the refusal of files that do not fit."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from dpo.data.logps_cache import (
    CacheKey,
    ColumnArrays,
    allocate_cache_file,
    hash_row_id,
    load_cache_file,
    map_cache_file,
    write_checksum,
)
from dpo.data.sampler import pack_rows_by_tokens
from dpo.models.batch import Batch, Example, collate
from dpo.models.loading import ModelLoader, weights_sha256
from dpo.models.scoring import score
from dpo.training import precomputed
from tests.support.runs import Lab, metrics, policy

KEY = CacheKey("weights", "tokens", "32-true torch.float32")
LENGTHS = np.array([[2, 3], [1, 4], [5, 1]], np.int32)
FIT = ["--trainer.max_steps=3", "--trainer.val_check_interval=3", "--optimizer.lr=1e-3"]
CACHED = "--model.reference=Cached"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A complete file of three rows with the values 0, 1, 2, ..."""
    path = tmp_path / "cache.safetensors"
    allocate_cache_file(path, KEY, np.array([-5, 0, 7]), LENGTHS)
    columns = map_cache_file(path, "r+")
    columns["values"][:] = np.arange(16)
    write_checksum(path)
    return path


# The file.


def test_what_was_written_is_read_back_memory_mapped(file: Path) -> None:
    columns = load_cache_file(file, KEY)
    assert all(isinstance(column, np.memmap) for column in columns.values())
    assert columns["ids"].tolist() == [-5, 0, 7] and columns["lengths"].tolist() == LENGTHS.tolist()
    assert columns["starts"].tolist() == [0, 2 + 3, 2 + 3 + 1 + 4]
    assert columns["values"].tolist() == list(range(16))
    columns["values"][0] = 9.0
    assert load_cache_file(file, KEY)["values"][0] == 0.0, "changes stay in memory"


def test_it_is_a_safetensors_file(file: Path) -> None:
    with safe_open(file, "numpy") as opened:
        assert opened.get_tensor("values").tolist() == list(range(16))
        assert opened.metadata()["weights"] == "weights"


def test_row_ids_are_hashed_to_signed_64_bit_numbers() -> None:
    numbers = [hash_row_id(f"subset/train:{line}") for line in range(1000)]
    assert len(set(numbers)) == 1000 and min(numbers) < 0 < max(numbers)
    assert np.array(numbers, np.int64).tolist() == numbers


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def grow(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def empty(file: Path) -> None:
    file.write_bytes(b"")


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1  # a bit of the last value
    file.write_bytes(content)


def change_metadata(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"weights":"weights"', b'"weights":"WEIGHTS"'))


def remove_checksum(file: Path) -> None:
    digest = safe_open(file, "numpy").metadata()["sha256"]
    file.write_bytes(file.read_bytes().replace(digest.encode(), b"0" * 64))


def replace_header(file: Path) -> None:
    file.write_bytes((4).to_bytes(8, "little") + b"{}  ")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"it has the wrong size: expected [\d,]+ bytes, got [\d,]+"),
        (grow, "it has the wrong size: expected"),
        (empty, "its header cannot be read"),
        (replace_header, "its header cannot be read"),
        (flip_bit, "it was changed after it was written"),
        (change_metadata, "it was changed after it was written"),
        (remove_checksum, "it was changed after it was written"),
    ],
)
def test_a_damaged_file_is_refused(file: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(file)
    with pytest.raises(ValueError, match=message) as refusal:
        load_cache_file(file, KEY)
    assert str(file) in str(refusal.value) and "Remove the file" in str(refusal.value)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("weights", "it belongs to another reference"),
        ("tokens", "it belongs to other rows or another tokenizer"),
        ("precision", "it was computed in another precision"),
        ("version", "it was written by another version"),
    ],
)
def test_a_file_of_another_key_is_refused(file: Path, field: str, message: str) -> None:
    other = replace(KEY, **{field: "other"})
    with pytest.raises(ValueError, match=message):
        load_cache_file(file, other)
    assert other.short_hash != KEY.short_hash, "the file name differs too"


# The reference that reads it.


class Data(list[Example]):
    """Examples and their lengths, as in a split of the data."""

    @property
    def token_counts(self) -> list[int]:
        return [len(e.prompt) + sum(map(len, e.answers)) for e in self]

    @property
    def answer_token_counts(self) -> list[int]:
        return [sum(map(len, e.answers)) for e in self]


def examples(count: int, seed: int = 0) -> Data:
    draw = torch.Generator().manual_seed(seed)

    def tokens() -> list[int]:
        return torch.randint(3, 128, (int(torch.randint(1, 12, (), generator=draw)),), generator=draw).tolist()

    return Data(Example(f"s/train:{line}", tokens(), (tokens(), tokens())) for line in range(count))


def test_the_hash_of_the_rows_depends_on_every_token_but_not_on_order() -> None:
    rows = examples(20)

    def digest(*splits: Data) -> str:
        return precomputed.index_stage_rows(splits).tokens_sha256

    whole = digest(rows)
    assert whole == digest(Data(reversed(rows))) == digest(Data(rows[:15]), Data(rows[15:]))
    changed = {
        "a row less": Data(rows[1:]),
        "another id": Data([replace(rows[0], id="s/train:99"), *rows[1:]]),
        "another token": Data([replace(rows[0], prompt=[*rows[0].prompt[:-1], 127]), *rows[1:]]),
        "answers swapped": Data([replace(rows[0], answers=rows[0].answers[::-1]), *rows[1:]]),
        "a token moved": Data([Example("s/train:0", [5], ([6, 7], [8])), *rows[1:]]),
        "back": Data([Example("s/train:0", [5, 6], ([7], [8])), *rows[1:]]),
    }
    assert len({whole, *(digest(other) for other in changed.values())}) == 1 + len(changed)
    with pytest.raises(ValueError, match="expected unique ids, got one id twice"):
        digest(rows, rows)


def test_packs_hold_every_row_once_longest_first() -> None:
    costs = np.array([5, 90, 20, 20, 60, 1, 200])
    found = list(pack_rows_by_tokens(costs, 100))
    assert found == [[6], [1], [4, 2, 3], [0, 5]]  # 200 alone, 90, 60 + 20 + 20, 5 + 1
    assert sorted(row for pack in found for row in pack) == list(range(7))


def stored(model: PreTrainedModel, rows: Data, file: Path) -> ColumnArrays:
    """Compute the values of rows, and read them back."""
    indexed = precomputed.index_stage_rows([rows])
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    precomputed.score_rows_into_file(model, indexed, file, KEY, 64, trainer)
    precomputed.verify_cached_logps(load_cache_file(file, KEY), model, indexed, file)
    return load_cache_file(file, KEY)


def test_rows_are_found_by_id_in_any_order(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    model, rows = tiny_model(), examples(40)
    columns = stored(model, rows, tmp_path / "cache")
    for part in (rows[7:12], rows[::-3], rows[:1]):
        batch = collate(part)
        torch.testing.assert_close(
            precomputed.lookup_logps(columns, batch), score(model, batch).logps.detach(), rtol=1e-5, atol=1e-5
        )


def test_other_rows_and_other_lengths_are_errors(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    rows = examples(40)
    columns = stored(tiny_model(), rows, tmp_path / "cache")
    longer = replace(rows[3], answers=(rows[3].answers[0], [*rows[3].answers[1], 5]))
    for wrong, name in ((replace(rows[0], id="s/test:0"), "s/test:0"), (longer, "s/train:3")):
        with pytest.raises(ValueError, match=f"the cache has no values for {name} with answers of these lengths"):
            precomputed.lookup_logps(columns, collate([rows[1], wrong]))


def test_values_that_are_not_finite_are_never_stored(
    tiny_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[0] = torch.inf
    with pytest.raises(ValueError, match="log-probabilities of the reference are not finite: check the rows s/train"):
        stored(model, examples(3), tmp_path / "cache")


# Whole runs.


@pytest.fixture(scope="module")
def folder(lab: Lab) -> Path:
    """The folder of a cache that a run has written."""
    lab.fit("first", *FIT, CACHED, f"--model.reference.folder={lab.folder / 'cache'}")
    return lab.folder / "cache"


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Paths of the files that are computed instead of found."""
    files: list[Path] = []
    compute = precomputed.score_rows_into_file

    def counting(model: PreTrainedModel, rows: Any, file: Path, *more: Any) -> None:
        files.append(file)
        compute(model, rows, file, *more)

    monkeypatch.setattr(precomputed, "score_rows_into_file", counting)
    return files


def test_a_cached_run_equals_the_run_with_the_model(lab: Lab, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    expected, found = (metrics(lab.fit(n, *FIT, *w)) for n, w in (("model", []), ("again", [CACHED])))
    assert len(expected) == len(found) == 3
    assert caplog.text.count("nats per token apart; the loss is 0.693147") == 2, "step 0 is checked with a cache too"
    for row, other in zip(expected, found, strict=True):
        for name in ("train/loss", "train/rewards/margins", "train/grad_norm", "val/loss", "val/rewards/accuracies"):
            assert (name in row) == (name in other)
            assert other.get(name, 0) == pytest.approx(row.get(name, 0), rel=1e-4, abs=1e-5), name
    assert sorted(path.name for path in folder.iterdir()) == ["fit.safetensors", "fit.safetensors.lock"]


def test_one_file_serves_every_loss_beta_and_learning_rate(lab: Lab, computed: list[Path]) -> None:
    words = [*FIT, CACHED, "--data.limit=13"]
    lab.fit("seed", *words)
    assert len(computed) == 1
    changed = ["--model.loss=IPO", "--model.loss.beta=0.5", "--optimizer.lr=1e-4", "--data.batch_size=3"]
    lab.fit("loss", *words, *changed, "--data.seed=1", "--data.val_fraction=0.3", "--data.max_tokens=200")
    lab.fit("lora", *words, "--model.adapter=LoRA")
    assert len(computed) == 1, "options that are not in the key do not matter"
    lab.fit("other", *words, f"--model.policy={policy(seed=1)}")
    assert len(computed) == 2, "another reference"


def test_no_reference_model_is_left_in_memory(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    import dpo.cli.main

    seen: dict[str, Any] = {}
    after = dpo.cli.main.TrainingCLI.after_fit
    monkeypatch.setattr(dpo.cli.main.TrainingCLI, "after_fit", lambda cli: (seen.update(cli=cli), after(cli))[1])
    lab.fit("memory", *FIT, CACHED)
    reference = seen["cli"].model.reference
    assert list(reference.parameters()) == [] == list(reference.children()) and reference.owned_models == {}


def test_every_stage_has_its_rows(lab: Lab, computed: list[Path]) -> None:
    run = lab.fit("stages", *FIT, CACHED)
    del computed[:]
    for verb in ("validate", "test", "predict"):
        assert lab.main(verb, CACHED, "--name=stages", f"--ckpt_path={run.checkpoint_folder / 'last.ckpt'}") == 0
    assert len(computed) == 2, "predict stores nothing"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([f"--model.policy={policy(seed=1)}"], "it belongs to another reference"),
        (["--data.limit=12"], "it belongs to other rows or another tokenizer"),
        (["--trainer.precision=bf16-mixed"], "it was computed in another precision"),
    ],
    ids=["weights", "tokens", "precision"],
)
def test_a_given_folder_that_does_not_fit_is_refused(
    lab: Lab,
    folder: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    name = f"--name=refused-{request.node.callspec.id}"
    before = (folder / "fit.safetensors").read_bytes()
    assert lab.main("fit", name, *FIT, CACHED, f"--model.reference.folder={folder}", *words) == 1
    assert message in capsys.readouterr().err
    assert (folder / "fit.safetensors").read_bytes() == before


def test_values_that_the_reference_does_not_compute_are_refused(
    lab: Lab, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is complete and has the right key, as if another version of some library had computed it."""
    file = tmp_path / "fit.safetensors"
    metadata = safe_open(folder / "fit.safetensors", "numpy").metadata()
    content = (folder / "fit.safetensors").read_bytes().replace(metadata["sha256"].encode(), b"0" * 64)
    file.write_bytes(content)
    map_cache_file(file, "r+")["values"][:] += 0.01
    write_checksum(file)
    assert lab.main("fit", "--name=refused", *FIT, CACHED, f"--model.reference.folder={tmp_path}") == 1
    assert "the reference computes other values here. Expected a difference of at most 0.001" in capsys.readouterr().err


def test_a_failed_computation_leaves_no_file(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaking(*_: object) -> Batch:
        raise ValueError("broken")

    monkeypatch.setattr(precomputed, "score", breaking)
    assert lab.main("fit", "--name=broken", *FIT, CACHED, f"--model.reference.folder={tmp_path}") == 1
    assert "broken" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["fit.safetensors.lock"]


@pytest.mark.slow  # four runs, two of them in two processes
def test_two_processes_write_the_same_file_as_one(lab: Lab, folder: Path) -> None:
    two = lab.folder / "two"
    process = lab.start(
        *("fit", "--name=two", *FIT, CACHED, f"--model.reference.folder={two}"),
        *("--trainer.devices=2", "--trainer.strategy=ddp"),
        OMP_NUM_THREADS="1",
    )
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]
    one, other = (load_unchecked(path / "fit.safetensors") for path in (folder, two))
    assert one["ids"].tolist() == other["ids"].tolist()
    assert np.abs(one["values"] - other["values"]).max() <= 1e-5


def load_unchecked(file: Path) -> dict[str, Any]:
    with safe_open(file, "numpy") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def test_the_metadata_describe_the_values(folder: Path) -> None:
    metadata = safe_open(folder / "fit.safetensors", "numpy").metadata()
    assert metadata.keys() == {"weights", "tokens", "precision", "version", "sha256"}
    assert metadata["precision"] == "32-true torch.float32"
    assert metadata["weights"] == weights_sha256(ModelLoader().load_model(str(policy())))
    assert len(metadata["tokens"]) == 64
