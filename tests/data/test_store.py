"""Token stores: damage is noticed and named, the tokens are made again, and nothing of killed processes stays."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo.data import store
from dpo.data.preferences import HHRLHF
from dpo.quickstart import POLICY_FOLDER
from tests.support.data import cache
from tests.support.runs import pairs

__all__ = ["cache"]  # used by every test


def prepared() -> HHRLHF:
    data = HHRLHF(str(pairs()), tokenizer=str(POLICY_FOLDER))
    data.prepare_data()
    data.setup("fit")
    return data


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    for place in random.Random(0).sample(range(len(content) // 2, len(content)), 1000):
        content[place] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


DAMAGES: list[tuple[str, Callable[[Path], None], str]] = [
    ("train.arrow", flip, "was changed or cut off after it was written: its SHA-256 is not the one in sha256.json"),
    ("test.arrow", cut, "was changed or cut off after it was written: its SHA-256 is not the one in sha256.json"),
    ("test.arrow", Path.unlink, "is gone"),
    ("sha256.json", Path.unlink, ", which holds the SHA-256 of every file, cannot be read"),
    ("sha256.json", cut, ", which holds the SHA-256 of every file, cannot be read"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_a_damaged_store_is_named_and_made_again(name: str, damage: Callable[[Path], None], message: str) -> None:
    first = prepared()
    file = first.store_folder / name
    whole, examples = file.read_bytes(), [*first.pairs_by_split["train"]]
    damage(file)
    with pytest.warns(UserWarning) as warned:
        second = prepared()
    (text,) = (str(warning.message) for warning in warned)
    assert text.startswith(str(file)) and message in text and text.endswith("The rows are tokenized again.")
    assert file.read_bytes() == whole
    assert [*second.pairs_by_split["train"]] == examples
    assert second.training_sha256 == first.training_sha256
    assert list(first.store_folder.parent.iterdir()) == [first.store_folder]


def test_every_file_of_a_store_has_its_hash() -> None:
    folder = prepared().store_folder
    digests = json.loads((folder / store.DIGESTS_FILE).read_text())
    assert digests.keys() == {"train.arrow", "test.arrow", "audit.json"}
    assert {path.name for path in folder.iterdir()} == {*digests, store.DIGESTS_FILE}
    assert store.find_damage(folder) == ""


def test_what_a_killed_tokenization_leaves_is_swept_by_the_next_start(cache: Path) -> None:
    script = "import os, sys; from dpo.data import store; from dpo.data.preferences import HHRLHF\n"
    script += "store.audit_split = lambda *_: os._exit(9)\n"  # after the rows, before the folder gets its name
    script += "HHRLHF(sys.argv[1], tokenizer=sys.argv[2]).prepare_data()"
    words = [sys.executable, "-c", script, str(pairs()), str(POLICY_FOLDER)]
    assert subprocess.run(words, capture_output=True, timeout=200).returncode == 9
    (leftover,) = cache.iterdir()
    assert leftover.name.startswith(".tokens-") and leftover.name.endswith(".tmp")
    (cache / ".reference-0.safetensors.7.tmp").touch()
    folder = prepared().store_folder
    assert list(cache.iterdir()) == [folder]
