"""`PreferencePairs`: shapes of rows, file formats, column names, remote files, mixtures, weights and margins."""

import gzip
import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from dpo.data import store
from dpo.data.columns import Columns, PairRow
from dpo.data.dialogue import DialoguePair, Refusal, Role, Turn
from dpo.data.formats import BadLineError, Fault, read_rows
from dpo.data.preferences import HHRLHF, Part, PreferencePairs, interleave_by_share
from dpo.data.sources import list_data_files
from dpo.models.batch import Example, collate
from tests.support.data import CHATML, byte_level
from tests.support.data import cache as cache  # every test has an empty cache of its own
from tests.support.runs import Lab, metrics

USER, ANSWER = "What is 2?", "It is two."
PAIR = DialoguePair((Turn(Role.HUMAN, f" {USER}"),), f" {ANSWER}", " No idea.")
HH_PROMPT = f"\n\nHuman: {USER}\n\nAssistant:"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str, **more: object) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


SAME = {  # one pair in every shape
    "text": {"prompt": USER, "chosen": ANSWER, "rejected": "No idea."},
    "messages": {"prompt": [user(USER)], "chosen": [bot(ANSWER)], "rejected": [bot("No idea.")]},
    "ultrafeedback": {"prompt": USER, "chosen": [user(USER), bot(ANSWER)], "rejected": [user(USER), bot("No idea.")]},
    "implicit messages": {"chosen": [user(USER), bot(ANSWER)], "rejected": [user(USER), bot("No idea.")]},
    "implicit text": {"chosen": f"{HH_PROMPT} {ANSWER}", "rejected": f"{HH_PROMPT} No idea."},
    "hh prompt": {"prompt": HH_PROMPT, "chosen": f" {ANSWER}", "rejected": " No idea."},
    "hh everywhere": {"prompt": HH_PROMPT, "chosen": f"{HH_PROMPT} {ANSWER}", "rejected": f"{HH_PROMPT} No idea."},
    "mixed": {"prompt": USER, "chosen": ANSWER, "rejected": [bot("No idea.")]},
    "spaces": {"prompt": f" {USER}\n", "chosen": f"{ANSWER} ", "rejected": "\tNo idea."},
    "nulls beside": {"prompt": USER, "chosen": [bot(ANSWER, tool_calls=None)], "rejected": "No idea.", "system": None},
}


def row(fields: dict[str, Any], columns: Columns = Columns()) -> PairRow:  # noqa: B008
    return columns.parse_row(fields)


@pytest.mark.parametrize("fields", SAME.values(), ids=SAME)
def test_a_pair_in_every_shape(fields: dict[str, Any]) -> None:
    assert row(fields) == PairRow(PAIR)


def test_hh_text_is_preserved_byte_for_byte() -> None:
    said = "\n\nHuman:  a \n\nAssistant: b\n\nHuman:c\n\nAssistant:"
    found = row({"chosen": said + " yes\n", "rejected": said + "no"}).pair
    assert isinstance(found, DialoguePair)
    assert (found.prompt_text + found.chosen, found.prompt_text + found.rejected) == (said + " yes\n", said + "no")


def test_system_messages_come_from_a_column_or_the_messages() -> None:
    system = {"role": "system", "content": "Be brief."}
    expected = DialoguePair((Turn(Role.SYSTEM, " Be brief."), *PAIR.history), PAIR.chosen, PAIR.rejected)
    shapes = [
        SAME["text"] | {"system": "Be brief."},
        SAME["ultrafeedback"] | {"system": "Be brief."},
        SAME["messages"] | {"prompt": [system, user(USER)]},
        {side: [system, *SAME["implicit messages"][side]] for side in ("chosen", "rejected")},
        SAME["text"] | {side: [system, *SAME["ultrafeedback"][side]] for side in ("chosen", "rejected")},
    ]
    assert [row(fields).pair for fields in shapes] == [expected] * len(shapes)
    assert row(shapes[0], Columns(system="")).pair == PAIR


REFUSED = {
    "tool role": ({"prompt": [user("a"), {"role": "tool", "content": "1"}]}, Refusal.TOOL_MESSAGE),
    "tool call": ({"chosen": [bot("", tool_calls=[{"name": "f"}])]}, Refusal.TOOL_MESSAGE),
    "null content": ({"rejected": [bot("") | {"content": None, "tool_calls": [1]}]}, Refusal.TOOL_MESSAGE),
    "prompt ends with an answer": ({"prompt": [user("a"), bot("b")]}, Refusal.NOT_ALTERNATING),
    "another prompt": ({"chosen": [user("other"), bot("b")]}, Refusal.HISTORIES_DIFFER),
    "system in one of both": (
        {"chosen": [{"role": "system", "content": "s"}, user(USER), bot("b")]},
        Refusal.HISTORIES_DIFFER,
    ),
    "answer of a human": ({"chosen": [user(USER), bot("b"), user("c")]}, Refusal.ENDS_WITH_HUMAN),
    "same": ({"chosen": "No idea."}, Refusal.IDENTICAL_ANSWERS),
    "empty": ({"chosen": "  "}, Refusal.EMPTY_ANSWER),
    "unmarked": ({"chosen": None, "rejected": None}, Refusal.UNMARKED),
}  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), REFUSED.values(), ids=REFUSED)
def test_unusable_rows_are_refused_with_their_reason(change: dict[str, Any], reason: Refusal) -> None:
    assert row(SAME["text"] | change).pair == reason


WRONG = {
    "a number": ({"chosen": 3}, "column 'chosen': expected text or messages, got '3'"),
    "null": ({"rejected": None}, "column 'rejected': expected text or messages"),
    "no messages": ({"chosen": []}, "expected text or messages"),
    "texts": ({"chosen": ["a"]}, "expected text or messages"),
    "role": ({"chosen": [{"role": "bot", "content": "a"}]}, "role user or assistant or system, got 'bot'"),
    "content": ({"chosen": [{"role": "assistant", "content": None}]}, "column 'chosen': expected text, got 'None'"),
    "surrogate": ({"prompt": "\ud800"}, "surrogates not allowed"),
    "weight": ({"weight": -1}, "column 'weight': expected a number of 0 or more, got -1"),
    "nan": ({"weight": math.nan}, "expected a number of 0 or more"),
    "truth": ({"weight": True}, "expected a number of 0 or more"),
    "margin": ({"margin": "2"}, "column 'margin': expected a finite number, got '2'"),
    "system": ({"system": 1}, "column 'system': expected text"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_unreadable_rows_raise_with_a_detail(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadLineError) as error:
        row(SAME["text"] | change)
    assert message in error.value.detail


@pytest.mark.parametrize(
    ("fields", "columns", "missing"),
    [
        ({"question": "a", "answer": "b"}, Columns(), "chosen"),
        ({"question": "a", "chosen": "b", "rejected": "c"}, Columns(), "prompt"),
        ({"chosen": [bot("b")], "rejected": [bot("c")]}, Columns(), "prompt"),
        (SAME["text"], Columns(prompt="question"), "question"),
        (SAME["text"], Columns(margin="gap"), "gap"),
    ],
)
def test_a_missing_column_error_lists_found_and_expected_columns(
    fields: dict[str, Any], columns: Columns, missing: str
) -> None:
    with pytest.raises(BadLineError) as error:
        row(fields, columns)
    assert error.value.fault is Fault.MISSING_FIELD
    expected = f"no column '{missing}': expected {columns.prompt}, chosen, rejected, found {', '.join(sorted(fields))}"
    assert error.value.detail.startswith(expected)


def test_columns_can_have_other_names() -> None:
    columns = Columns("question", "good", "bad", weight="confidence", margin="")
    found = row({"question": USER, "good": ANSWER, "bad": "No idea.", "confidence": 0.5, "margin": "?"}, columns)
    assert found == PairRow(PAIR, weight=0.5)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level(CHATML).save_pretrained(folder)
    return str(folder)


def many(n: int, first: int = 0, **more: object) -> list[dict[str, Any]]:
    rows = range(first, first + n)
    return [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No idea.", **more} for i in rows]


def write(file: Path, rows: list[Any]) -> Path:
    """Write rows in the format of the file's suffix."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), file, row_group_size=2)
    elif file.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        whole = file.name.endswith((".json", ".json.gz"))
        text = (json.dumps(rows) if whole else "".join(json.dumps(row) + "\n" for row in rows)).encode()
        file.write_bytes(gzip.compress(text) if file.suffix == ".gz" else text)
    return file


def ready(tokenizer: str, path: Any, **options: Any) -> PreferencePairs:
    data = PreferencePairs(str(path) if isinstance(path, Path) else path, tokenizer=tokenizer, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def examples(data: HHRLHF | PreferencePairs, name: str = "train") -> list[Example]:
    return [data.pairs_by_split[name][i] for i in range(len(data.pairs_by_split[name]))]


def prompts(data: PreferencePairs, name: str = "train") -> list[str]:
    return [text["prompt"].split("?")[0].split(" ")[-1] for text in data.example_texts(name, 1000)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.parquet", "a.arrow"])
def test_every_file_format_gives_the_same_examples(tokenizer: str, tmp_path: Path, name: str) -> None:
    rows = many(5, weight=0.5)
    expected = ready(tokenizer, write(tmp_path / "expected.jsonl", rows), val_fraction=0.0)
    found = ready(tokenizer, write(tmp_path / name, rows), val_fraction=0.0)
    assert examples(found) == examples(expected)
    assert [example.id for example in examples(found)] == [f"pairs/train:{i}" for i in range(1, 6)]


def test_messages_in_parquet_and_a_folder_of_datasets(tokenizer: str, tmp_path: Path) -> None:
    rows = [{"chosen": [user(f"{i}?"), bot("a")], "rejected": [user(f"{i}?"), bot("b")]} for i in range(3)]
    write(tmp_path / "one" / "a.parquet", rows)
    Dataset.from_list(rows).save_to_disk(tmp_path / "two")  # an Arrow stream, with JSON files that describe it
    one, two = (ready(tokenizer, tmp_path / name, val_fraction=0.0) for name in ("one", "two"))
    assert examples(one) == examples(two)
    assert len(examples(one)) == 3


def test_a_json_file_may_have_one_row_per_line(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("\n".join(map(json.dumps, many(3))) + "\n")
    assert len(examples(ready(tokenizer, tmp_path / "a.json", val_fraction=0.0))) == 3


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.json", "a.jsonl"])
def test_a_broken_file_leaves_no_tokens(tokenizer: str, tmp_path: Path, cache: Path, name: str) -> None:
    file = write(tmp_path / name, many(50))
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        ready(tokenizer, file)
    assert not list(cache.glob("tokens-*"))


def test_hh_rlhf_files_give_the_same_tokens_in_both_classes(tokenizer: str, tmp_path: Path) -> None:
    """Only the ids of the rows differ."""
    rows = [
        {"chosen": f"\n\nHuman: {i}?\n\nAssistant: a", "rejected": f"\n\nHuman: {i}?\n\nAssistant: b"}
        for i in range(20)
    ]
    write(tmp_path / "data" / "part" / "train.jsonl.gz", rows)
    write(tmp_path / "data" / "part" / "test.jsonl.gz", rows[:3])
    ours = ready(tokenizer, tmp_path / "data")
    theirs = HHRLHF(str(tmp_path / "data"), tokenizer=tokenizer)
    theirs.prepare_data()
    theirs.setup("fit")
    for name in ("train", "val", "test"):
        assert [(e.prompt, e.answers) for e in examples(ours, name)] == [
            (e.prompt, e.answers) for e in examples(theirs, name)
        ]


def test_the_split_follows_from_the_file_name(tokenizer: str, tmp_path: Path) -> None:
    folder = tmp_path / "test" / "data"  # folder names above the given path do not count
    for number, name in enumerate(
        ["train-00000-of-00002", "train-00001-of-00002", "test_prefs-0", "dev/a", "validation", "contest", "latest"]
    ):
        write(folder / f"{name}.jsonl", many(2, 10 * number))
    data = ready(tokenizer, folder, val_fraction=0.0)
    assert prompts(data, "train") == ["50", "51", "60", "61", "0", "1", "10", "11"]  # by name
    assert prompts(data, "test") == ["20", "21"]
    assert prompts(data, "val") == ["30", "31", "40", "41"]
    only = ready(tokenizer, str(folder / "t*-0*.jsonl"), val_fraction=0.0)
    assert (prompts(only, "train"), prompts(only, "test")) == (["0", "1", "10", "11"], ["20", "21"])
    assert [example.id for example in examples(only)] == [f"pairs/train:{i}" for i in (1, 2, 3, 4)]
    assert prompts(ready(tokenizer, folder / "validation.jsonl"), "val") == ["40", "41"]


def test_no_opening_is_in_both_train_and_val(tokenizer: str, tmp_path: Path) -> None:
    rows = [row | {"rejected": f"no {k}"} for k in range(2) for row in many(20)]
    data = ready(tokenizer, write(tmp_path / "a.jsonl", rows), val_fraction=0.3)
    assert not set(prompts(data, "train")) & set(prompts(data, "val"))
    assert len(prompts(data, "train")) + len(prompts(data, "val")) == 40


def test_columns_are_part_of_the_store_hash_and_the_message(tokenizer: str, tmp_path: Path, cache: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"question": row.pop("prompt"), **row} for row in many(3)])
    with pytest.raises(
        ValueError, match="no column 'prompt': expected prompt, chosen, rejected, found chosen, question"
    ):
        ready(tokenizer, file)
    assert len(examples(ready(tokenizer, file, columns=Columns("question"), val_fraction=0.0))) == 3
    ready(tokenizer, file, columns=Columns("question", weight=""))
    assert len(list(cache.glob("tokens-*"))) == 2


def test_refused_rows_are_in_the_audit(tokenizer: str, tmp_path: Path) -> None:
    rows = [SAME["text"] | change for change, _ in REFUSED.values()] + many(2)
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = ready(tokenizer, file, val_fraction=0.0).audits_by_split["train"].counts_by_subset["pairs"]
    expected = Counter(reason.value for _, reason in REFUSED.values())
    assert {name: n for name, n in counts.refused.items() if n} == dict(expected)
    assert (counts.read, counts.kept) == (len(rows), 2)


def test_missing_files_raise(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no data")
    with pytest.raises(ValueError, match=r"expected files that end in .jsonl, .*found README.md"):
        ready(tokenizer, tmp_path)
    for path in ("nowhere.jsonl", "some/data", "some/data/x-*.parquet"):
        with pytest.raises(ValueError, match=r"no local file, folder or pattern .*, and it cannot"):
            ready(tokenizer, path)
    with pytest.raises(ValueError, match=r"--data.path: expected a file"):
        PreferencePairs(tokenizer=tokenizer)


# --- remote files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def elsewhere() -> Iterable[str]:
    """The address of two remote shards."""
    files = fsspec.filesystem("memory")
    for number in range(2):
        with files.open(f"/shards/train-{number}.jsonl", "wb") as file:
            file.write("".join(json.dumps(row) + "\n" for row in many(300, 1000 * number)).encode())
    yield "memory://shards"
    files.rm("/shards", recursive=True)


def test_remote_shards_are_read_without_copying(
    tokenizer: str, elsewhere: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are read in turn, some hundred rows at a time; only tokens and the listing are stored."""
    sizes, encode = [], store.PairEncoder.encode_batch
    monkeypatch.setattr(
        store.PairEncoder, "encode_batch", lambda self, pairs: sizes.append(len(pairs)) or encode(self, pairs)
    )
    data = ready(tokenizer, elsewhere, val_fraction=0.0)
    assert [example.id for example in examples(data)] == [f"pairs/train:{i}" for i in range(1, 601)]
    assert prompts(data)[299:302] == ["299", "1000", "1001"]
    assert sizes[1:] == [256, 44, 256, 44]  # the first is the encoder's probe
    kinds = Counter(file.parent.name.split("-")[0] for file in cache.rglob("*") if file.is_file())
    assert set(kinds) == {"tokens", "listings"}


def test_tokens_are_found_again_without_a_network(
    tokenizer: str, elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ready(tokenizer, elsewhere)

    def cut(_: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr("dpo.data.sources._list_files", cut)
    assert examples(ready(tokenizer, elsewhere)) == examples(first)


def test_a_changed_shard_is_read_again(tokenizer: str, elsewhere: str) -> None:
    ready(tokenizer, elsewhere)
    with fsspec.open("memory://shards/train-2.jsonl", "wb") as file:
        file.write((json.dumps(many(1, 5000)[0]) + "\n").encode())
    assert len(examples(ready(tokenizer, elsewhere, val_fraction=0.0))) == 601


def test_a_hub_data_set_is_pinned_to_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Api:
        def dataset_info(self, name: str) -> Any:
            asked.append(name)
            return type("Info", (), {"sha": "abc"})

    monkeypatch.setattr("dpo.data.sources.HfApi", Api)
    monkeypatch.setattr("dpo.data.sources._list_files", lambda address: [("train", address, "1")])
    assert list_data_files("org/set", tmp_path, True) == [("train", "hf://datasets/org/set@abc", "1")]
    wanted = [("train", "hf://datasets/org/set@abc/data/train_prefs-*.parquet", "1")]
    assert list_data_files("org/set/data/train_prefs-*.parquet", tmp_path, True) == wanted
    assert list_data_files("org/set/data/train_prefs-*.parquet", tmp_path, False) == wanted  # from the saved listing
    assert asked == ["org/set", "org/set"]


# --- several sources -------------------------------------------------------------------------------------------------


def test_several_sources_have_names_and_columns_of_their_own(tokenizer: str, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", many(4))
    write(tmp_path / "b.jsonl", [{"question": row.pop("prompt"), **row} for row in many(2, 100)])
    parts = {"a": Part(str(tmp_path / "a.jsonl")), "b": Part(str(tmp_path / "b.jsonl"), columns=Columns("question"))}
    data = ready(tokenizer, parts, val_fraction=0.0)
    assert [example.id for example in examples(data)] == [f"a/train:{i}" for i in (1, 2, 3, 4)] + [
        "b/train:1",
        "b/train:2",
    ]
    assert list(data.audits_by_split["train"].counts_by_subset) == ["a", "b", "total"]


def test_shares_decide_how_often_a_source_is_seen(tokenizer: str, tmp_path: Path) -> None:
    files = {name: str(write(tmp_path / f"{name}.jsonl", many(n))) for name, n in (("a", 6), ("b", 2))}
    data = ready(tokenizer, {"a": Part(files["a"], 3.0), "b": Part(files["b"], 2.0)}, val_fraction=0.0)
    seen = Counter(example.id for example in examples(data))
    assert {name: seen[f"a/train:{name}"] for name in range(1, 7)} == dict.fromkeys(range(1, 7), 1)
    assert [seen[f"b/train:{name}"] for name in (1, 2)] == [2, 2]  # 4 of 10
    with pytest.raises(ValueError, match="a share above 0 for every part, or for none"):
        PreferencePairs({"a": Part(files["a"], 3.0), "b": Part(files["b"])}, tokenizer=tokenizer)
    empty = str(write(tmp_path / "c.jsonl", many(1, chosen="No idea.")))
    with pytest.raises(ValueError, match=r"--data.path.c: expected files with usable pairs"):
        ready(tokenizer, {"a": Part(files["a"], 1.0), "c": Part(empty, 1.0)}, val_fraction=0.0)


@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0.05, 20)), min_size=1, max_size=4))
def test_mixing_keeps_every_row_and_the_shares(drawn: list[tuple[int, float]]) -> None:
    starts = np.cumsum([0, *(n for n, _ in drawn)])
    parts, shares = [np.arange(a, b) for a, b in zip(starts, starts[1:])], [share for _, share in drawn]  # noqa: B905 RUF007
    rows = interleave_by_share(parts, shares)
    assert set(rows.tolist()) == set(range(starts[-1]))
    total = max(len(part) / share for part, share in zip(parts, shares, strict=True))
    for part, share in zip(parts, shares, strict=True):
        counts = [(rows == row).sum() for row in part]
        assert sum(counts) == round(total * share)
        assert max(counts) - min(counts) <= 1


def test_mixed_rows_are_interleaved() -> None:
    assert interleave_by_share([np.arange(4), np.array([9])], [4, 2]).tolist() == [0, 9, 1, 2, 9, 3]


# --- weights and margins ---------------------------------------------------------------------------------------------


def test_weights_and_margins_reach_the_batch(tokenizer: str, tmp_path: Path) -> None:
    rows = [row | {"weight": w, "margin": m} for row, w, m in zip(many(3), (1, 0.5, 0), (2, -1.5, 0), strict=True)]
    data = ready(tokenizer, write(tmp_path / "a.jsonl", rows), val_fraction=0.0)
    batch = collate(examples(data))
    assert batch.weights.tolist() == [1.0, 0.5, 0.0]
    assert batch.margins.tolist() == [2.0, -1.5, 0.0]
    plain = collate(examples(ready(tokenizer, write(tmp_path / "b.jsonl", many(3)), val_fraction=0.0)))
    assert plain.weights.tolist() == [1.0] * 3
    assert plain.margins.isnan().all()


def test_a_margin_is_given_for_all_pairs_or_for_none(tokenizer: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", many(2) + many(1, 5, margin=1.0))
    with pytest.raises(ValueError, match="only 1 of 3 train pairs have a margin"):
        ready(tokenizer, file)
    assert len(examples(ready(tokenizer, file, columns=Columns(margin=""), val_fraction=0.0))) == 3


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("runs"))


FIT = [
    "--data=PreferencePairs",
    "--data.val_fraction=0",
    "--trainer.max_steps=1",
    "--optimizer=SGD",
    "--optimizer.lr=1e-30",  # so small that no weight changes
]


def first_step(lab: Lab, name: str, file: Path, *more: str) -> dict[str, float]:
    return metrics(lab.fit(name, *FIT, f"--data.path={file}", *more))[0]


def test_a_weight_multiplies_loss_and_gradient(lab: Lab, tmp_path: Path) -> None:
    """Loss at step 0: log 2 times the mean weight. A pair of weight 0 leaves the gradient to the others."""
    rows = many(4)
    plain = first_step(lab, "plain", write(tmp_path / "a.jsonl", rows))
    double = first_step(lab, "double", write(tmp_path / "b.jsonl", [row | {"weight": 2.0} for row in rows]))
    half = first_step(
        lab, "half", write(tmp_path / "c.jsonl", [row | {"weight": 1 - i // 2} for i, row in enumerate(rows)])
    )
    alone = first_step(lab, "alone", write(tmp_path / "d.jsonl", rows[:2]), "--data.batch_size=2")
    assert [step["train/loss"] for step in (plain, double, half)] == pytest.approx(
        [math.log(2) * w for w in (1, 2, 0.5)]
    )
    assert double["train/grad_norm"] == pytest.approx(2 * plain["train/grad_norm"], rel=1e-4)
    assert half["train/grad_norm"] == pytest.approx(alone["train/grad_norm"] / 2, rel=1e-4)  # divided by 4 pairs, not 2


def test_margins_are_used_or_refused(lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, margins = write(tmp_path / "a.jsonl", many(4)), write(tmp_path / "b.jsonl", many(4, margin=1.0))
    step = first_step(lab, "margins", margins, "--model.loss=ODPO")
    assert step["train/loss"] == pytest.approx(math.log1p(math.e))  # -log sigmoid(0 - 1)
    assert lab.main("fit", "--name=a", *FIT, f"--data.path={margins}") == 1
    assert "the data give margins, and DPO(" in capsys.readouterr().err
    assert lab.main("fit", "--name=b", *FIT, f"--data.path={plain}", "--model.loss=ODPO") == 1
    assert "takes margins, and the data give none" in capsys.readouterr().err
    words = ["--data.columns.margin=", "--data.columns.weight="]
    assert first_step(lab, "off", margins, *words)["train/loss"] == pytest.approx(math.log(2))


def test_a_loss_of_the_whole_batch_takes_no_weights(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", many(4, weight=2.0))
    words = ["--model.loss=AOT", "--data.max_tokens=null"]
    assert lab.main("fit", "--name=c", *FIT, f"--data.path={file}", *words) == 1
    assert "takes no weights of single pairs" in capsys.readouterr().err


def test_weights_count_in_the_supervised_stage(lab: Lab, tmp_path: Path) -> None:
    rows = many(4)
    plain = first_step(lab, "sft-plain", write(tmp_path / "a.jsonl", rows), "--model=SFT")
    double = first_step(
        lab, "sft-double", write(tmp_path / "b.jsonl", [r | {"weight": 2} for r in rows]), "--model=SFT"
    )
    assert double["train/loss"] == plain["train/loss"]  # unweighted, so that the perplexity follows from it
    assert double["train/grad_norm"] == pytest.approx(2 * plain["train/grad_norm"], rel=1e-4)


def test_parts_can_be_set_in_a_configuration_file(lab: Lab, tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", many(6))
    write(tmp_path / "b.jsonl", [{"question": row.pop("prompt"), **row} for row in many(2)])
    config = tmp_path / "mixed.yaml"
    config.write_text(
        f"""
data:
  class_path: PreferencePairs
  init_args:
    path:
      a: {{path: {tmp_path}/a.jsonl, share: 0.6}}
      b: {{path: {tmp_path}/b.jsonl, share: 0.4, columns: {{prompt: question}}}}
"""
    )
    base = [word for word in lab.words("fit") if not word.startswith("--data.path")]
    words = ["--name=mixed", "--trainer.max_epochs=1", "--data.batch_size=5", "--data.val_fraction=0"]
    assert lab.only(*base, f"--config={config}", *words) == 0


def test_bad_rows_of_a_json_array_yield_their_faults(tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", [SAME["text"], 3, {"chosen": "a"}])
    with file.open("rb") as raw:
        first, *others = read_rows(raw, str(file), Columns().parse_row, skip_bad=True)
    assert first == PairRow(PAIR)
    assert others == [Fault.WRONG_TYPE, Fault.MISSING_FIELD]


def test_a_missing_column_names_the_option_that_gives_it() -> None:
    with pytest.raises(BadLineError) as named:
        Columns(prompt="question").require({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen")
    assert "no column 'question'" in named.value.detail and "(--data.columns.prompt names it)" in named.value.detail
    with pytest.raises(BadLineError) as missing:
        Columns().require({"prompt": "a", "better": "b", "rejected": "c"}, "chosen")
    assert "(if it has another name: --data.columns.chosen <name>)" in missing.value.detail


def test_rows_without_a_template_for_their_system_message_are_told_what_to_do(tmp_path: Path) -> None:
    row = {"system": "Be brief.", "prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "my.jsonl").write_text(json.dumps(row) + "\n")
    data = PreferencePairs(str(tmp_path / "my.jsonl"), tokenizer="quickstart")
    data.prepare_data()
    data.setup("fit")
    with pytest.raises(ValueError, match=r"1 system without template.*choose a policy that has one"):
        data.require_pairs("train")
