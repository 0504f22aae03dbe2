"""Pairs that are left out by their ids: from the start, on resuming, and as the audit counts them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo.data.preferences import HHRLHF
from dpo.data.sampler import EpochPlan
from dpo.runs.folder import Run
from dpo.runs.ledger import read_ledger
from tests.support.runs import Lab, checkpoint, pairs, policy, weights

BASE = ["--data.val_fraction=0", "--optimizer.lr=1e-3", "--trainer.max_epochs=2"]  # six steps of four pairs an epoch


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(lab: Lab) -> Run:
    return lab.fit("whole", *BASE)


def prepared(exclude: list[str] | str | None) -> HHRLHF:
    """Return data of 24 training and 6 test pairs."""
    data = HHRLHF(str(pairs()), tokenizer=str(policy()), max_length=128, val_fraction=0.3, exclude=exclude)
    data.prepare_data()
    data.setup("fit")
    return data


def ids(data: HHRLHF, split: str) -> list[str]:
    return [example.id for example in data.pairs_by_split[split]]


def trained(run: Run) -> dict[int, set[str]]:
    """Return the ids of the pairs of every training step."""
    rows = [row for row in read_ledger(run).to_pylist() if row["trained"]]
    return {step: {row["id"] for row in rows if row["step"] == step} for step in {row["step"] for row in rows}}


def test_pairs_of_every_split_are_left_out_and_counted(tmp_path: Path) -> None:
    everything = prepared(None)
    chosen = [ids(everything, split)[1] for split in ("train", "val", "test")]
    file = tmp_path / "ids.txt"
    file.write_text(f"{chosen[0]}, {chosen[1]}\n\n{chosen[2]}\n")
    for option in (chosen, ", ".join(chosen), str(file), [str(file)]):
        data = prepared(option)
        for split in ("train", "val", "test"):
            assert ids(data, split) == [each for each in ids(everything, split) if each not in chosen]
        counts = {split: audit.counts_by_subset["total"] for split, audit in data.audits_by_split.items()}
        assert [(count.read, count.kept, count.excluded) for count in counts.values()] == [(24, 22, 2), (6, 5, 1)]


def test_the_other_pairs_keep_their_order() -> None:
    left_out = (0, 3, 17)
    kept = np.delete(np.arange(20), left_out)
    order = EpochPlan(4, shuffle=True, seed=3).epoch_order(20, 5)
    found = EpochPlan(4, shuffle=True, seed=3, left_out=left_out).epoch_order(17, 5)
    assert kept[found].tolist() == [place for place in order if place not in left_out]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("pairs/train", "expected ids of pairs, such as helpful-base/train:12, or a file of ids, got 'pairs/train'"),
        ("pairs/train:25", "expected ids of pairs that would be used, got pairs/train:25: no row has this id"),
        ("other/train:2", "expected ids of pairs that would be used, got other/train:2"),
        ("pairs/val:2", "expected ids of pairs that would be used, got pairs/val:2"),
    ],
)
def test_ids_of_no_pair_are_refused(option: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape("--data.exclude: " + message)):
        prepared(option)


def test_a_run_goes_on_without_a_pair(lab: Lab, whole: Run, caplog: pytest.LogCaptureFixture) -> None:
    """The steps before are those of the whole run, and the pairs of the epoch that are left come in their order."""
    steps = trained(whole)
    excluded = min(steps[3])
    run = lab.fit("parts", *BASE, "--trainer.max_steps=2")
    lab.fit("parts", *BASE, "--ckpt_path=last", f"--data.exclude={excluded}")
    line = f"--data.exclude: {excluded} left out now. From step 3 on, this is another run than the uninterrupted one."
    assert caplog.text.count(line) == caplog.text.count("this is another run") == 1
    found = trained(run)
    assert [found[step] for step in (1, 2)] == [steps[step] for step in (1, 2)]
    rest = set().union(*(steps[step] for step in range(3, 7)))
    assert set().union(*(found[step] for step in range(3, 7))) == rest - {excluded}
    assert all(excluded not in names for names in found.values())
    audit = json.loads(run.audit_path.read_text())
    assert audit["train"]["total"]["excluded"] == 1 and audit["train"]["total"]["kept"] == 23
    lab.fit("parts", *BASE, "--ckpt_path=last", f"--data.exclude={excluded}")
    assert caplog.text.count("this is another run") == 1, "nothing has changed since"


def test_a_run_without_pairs_from_the_start_resumes_as_itself(lab: Lab) -> None:
    words = [*BASE, "--data.exclude=[pairs/train:3,pairs/train:9]"]
    expected = lab.fit("uninterrupted", *words)
    lab.fit("stopped", *words, "--trainer.max_steps=4")
    run = lab.fit("stopped", *words, "--ckpt_path=last")
    found, wanted = weights(run), weights(expected)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert trained(run) == trained(expected)


def test_an_epoch_may_become_shorter_than_the_place_where_the_run_goes_on(lab: Lab) -> None:
    """The checkpoint is after step 5 of 6; with five pairs fewer, an epoch has five steps."""
    lab.fit("short", *BASE, "--trainer.max_steps=5")
    words = [f"pairs/train:{line}" for line in range(1, 6)]
    run = lab.fit("short", *BASE, "--ckpt_path=last", f"--data.exclude={','.join(words)}")
    assert checkpoint(run)["global_step"] == 10
    assert set().union(*(trained(run)[step] for step in range(6, 11))) == {
        f"pairs/train:{line}" for line in range(6, 25)
    }
