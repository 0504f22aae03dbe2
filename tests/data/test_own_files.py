"""Files of one's own: CSV and TSV, splits by name, what is said where no pair is left, images and tools."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from dpo.data.columns import Columns
from dpo.data.dialogue import Refusal
from dpo.data.formats import Fault, read_rows
from dpo.data.preferences import HHRLHF, PreferencePairs
from tests.support.data import CHATML, byte_level
from tests.support.data import cache as cache  # every test has an empty cache of its own
from tests.support.models import make_tiny_model

ROWS = [{"prompt": f"What is {i}?\n", "chosen": f'It is "{i}", é.', "rejected": "No,\nidea."} for i in range(6)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level().save_pretrained(folder)
    return str(folder)


def ready(path: Path, tokenizer: str, **options: Any) -> PreferencePairs:
    data = PreferencePairs(path, tokenizer=tokenizer, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def cells(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    table.writeheader()
    table.writerows(rows)
    return text.getvalue().encode()


# --- CSV and TSV -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "a.tsv.gz"])
def test_cells_give_the_same_examples_as_json(tokenizer: str, tmp_path: Path, name: str) -> None:
    expected = ready(write(tmp_path / "a.jsonl", [row | {"weight": 0.5} for row in ROWS]), tokenizer, val_fraction=0.0)
    text = cells([row | {"weight": "0.5"} for row in ROWS], "\t" if "tsv" in name else ",")
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    found = ready(tmp_path / name, tokenizer, val_fraction=0.0)
    assert list(map(found.pairs_by_split["train"].__getitem__, range(6))) == list(
        map(expected.pairs_by_split["train"].__getitem__, range(6))
    )


def read(file: Path, skip_bad: bool = False) -> list[object]:
    with file.open("rb") as raw:
        return list(read_rows(raw, str(file), Columns().parse_row, skip_bad))


HEADER = b"prompt,chosen,rejected,weight\n"
GOOD = b'"two\nlines",a,b,\n'
BROKEN_CELLS = {
    "too few": (b"a,b\n", r"line 4: wrong_type, expected 4 cells as in the first line, got 2", Fault.WRONG_TYPE),
    "no UTF-8": (b"a,\xff,c,\n", r"line 4: invalid_utf8", Fault.INVALID_UTF8),
    "weight": (b"a,b,c,much\n", r"line 4: wrong_type, column 'weight': expected a number", Fault.WRONG_TYPE),
    "messages": (b"a,\"[{'role': 'user'}]\",c,\n", "line 4: wrong_type, expected text, got messages", Fault.WRONG_TYPE),
}


@pytest.mark.parametrize(("line", "message", "fault"), BROKEN_CELLS.values(), ids=BROKEN_CELLS)
def test_a_bad_row_of_cells_is_named_by_its_line(tmp_path: Path, line: bytes, message: str, fault: Fault) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(HEADER + GOOD + line + GOOD)
    with pytest.raises(ValueError, match=rf"a\.csv, {message}"):
        read(file)
    first, second, third = read(file, skip_bad=True)
    assert second is fault
    assert first == third


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + b'a,"b', "line 2: the quotes cannot be understood"),
        (b"chosen,chosen\na,b\n", "line 1: expected names of columns, each once"),
        (HEADER, "the file is empty"),
    ],
)
def test_a_file_whose_rows_cannot_be_told_apart_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.csv", skip_bad=True)


# --- the class, the splits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["my.jsonl", "here/*.parquet", "s3://bucket/folder", "folder"])
def test_hh_rlhf_names_the_class_for_other_files(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "folder" / "train.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"HHRLHF reads a folder .*use PreferencePairs\('"):
        HHRLHF(path)


def test_a_validation_file_is_the_validation_split(
    tokenizer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, name in enumerate(("train", "val", "test")):
        write(tmp_path / "mine" / f"{name}.jsonl", ROWS[: 6 - number])
    caplog.set_level("INFO")
    data = ready(tmp_path / "mine", tokenizer, val_fraction=0.5)
    assert {name: len(pairs) for name, pairs in data.pairs_by_split.items()} == {"train": 6, "val": 5, "test": 4}
    assert [data.pairs_by_split["val"][0].id, len(data.val_dataloader())] == ["pairs/val:1", 1]
    assert "Validation: the pairs of val.jsonl; none are cut from train (--data.val_fraction)." in caplog.messages
    data.setup("validate")
    only = PreferencePairs(tmp_path / "mine", tokenizer=tokenizer, val_fraction=0.0)
    only.setup("validate")
    assert len(only.pairs_by_split["val"]) == 5


def test_no_test_file_is_answered_with_what_can_help(tokenizer: str, tmp_path: Path) -> None:
    data = ready(write(tmp_path / "a.jsonl", ROWS), tokenizer)
    with pytest.raises(ValueError, match=r"'test' .*no file is of this split.*a file with `test` in its name"):
        data.test_dataloader()


# --- no pair is left -------------------------------------------------------------------------------------------------


def test_no_pair_is_left_says_why(tokenizer: str, tmp_path: Path) -> None:
    same = [row | {"chosen": "a", "rejected": "a"} for row in ROWS]
    empty, images = ROWS[0] | {"chosen": " "}, ROWS[1] | {"images": ["x"]}
    tools = ROWS[1] | {"tools": [{"name": "f"}]}
    data = ready(write(tmp_path / "a.jsonl", [*same, empty, empty, images, images, images, tools]), tokenizer)
    with pytest.raises(ValueError) as error:
        data.require_pairs("train")
    expected = (
        "all 12 rows of 'train' were refused: 6 identical answers, 3 has images, 2 empty answer, 1 for other reasons."
    )
    assert expected in str(error.value)
    assert "subsets" not in str(error.value)


@pytest.mark.parametrize("rendered", [True, False])
def test_a_hint_at_plain_only_where_plain_would_take_the_rows(tokenizer: str, tmp_path: Path, rendered: bool) -> None:
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    text = {"prompt": prompt, "chosen": "Hello.", "rejected": "No."}
    messages = {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": "Hello."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    data = ready(write(tmp_path / "a.jsonl", [text if rendered else messages]), tokenizer)
    with pytest.raises(ValueError, match="1 control token in text") as error:
        data.require_pairs("train")
    assert ("--data.format plain takes them as they stand" in str(error.value)) is rendered
    assert (
        not rendered
        or len(ready(tmp_path / "a.jsonl", tokenizer, format="plain", val_fraction=0.0).pairs_by_split["train"]) == 1
    )


# --- the types of data set that TRL knows ----------------------------------------------------------------------------


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


QUESTION, GOOD_ANSWER, BAD_ANSWER = "What colour is the sky?", "It is blue.", "It is green."
TRL_TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "standard explicit": ("plain", {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}),
    "standard implicit": ("plain", {"chosen": "The sky is blue.", "rejected": "The sky is green."}),
    "conversational explicit": (
        "auto",
        {
            "prompt": [said("user", QUESTION)],
            "chosen": [said("assistant", GOOD_ANSWER)],
            "rejected": [said("assistant", BAD_ANSWER)],
        },
    ),
    "conversational implicit": (
        "auto",
        {
            "chosen": [said("user", QUESTION), said("assistant", GOOD_ANSWER)],
            "rejected": [said("user", QUESTION), said("assistant", BAD_ANSWER)],
        },
    ),
}


@pytest.mark.filterwarnings("ignore")  # of TRL, about a trainer that is only asked for its tokens
@pytest.mark.parametrize(("format", "row"), TRL_TYPES.values(), ids=TRL_TYPES)
def test_rows_are_read_as_trl_reads_them(tmp_path: Path, format: Any, row: dict[str, Any]) -> None:
    template = byte_level(CHATML.replace("<|im_end|>\n", "</s>"))  # TRL scores what follows the end token too
    template.pad_token = "</s>"
    template.save_pretrained(tmp_path / "model")
    make_tiny_model(vocab_size=len(template)).save_pretrained(tmp_path / "model")
    config = DPOConfig(output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to="none", max_length=None)
    trainer = DPOTrainer(
        model=str(tmp_path / "model"), args=config, train_dataset=Dataset.from_list([row]), processing_class=template
    )
    theirs = trainer.train_dataset[0]
    data = ready(write(tmp_path / "a.jsonl", [row]), str(tmp_path / "model"), format=format, val_fraction=0.0)
    ours = data.pairs_by_split["train"][0]
    assert list(ours.prompt) == theirs["prompt_ids"]
    assert [list(ids) for ids in ours.answers] == [theirs["chosen_ids"], theirs["rejected_ids"]]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"images": [{"bytes": "x"}]}, Refusal.HAS_IMAGES),
        ({"image": "x.png"}, Refusal.HAS_IMAGES),
        ({"tools": [{"type": "function"}]}, Refusal.HAS_TOOLS),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, Refusal.HAS_IMAGES),
    ],
)
def test_images_and_tools_are_refused_by_name(more: dict[str, Any], reason: Refusal) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert Columns().parse_row(row | more).pair is reason
    assert Columns().parse_history(row | more) is reason
    assert Columns().parse_row(row | {"images": [], "tools": None}).pair not in set(Refusal)
