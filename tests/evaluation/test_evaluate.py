"""Reward benchmarks from file to table: scores equal to plain forward passes, the published rules, and odd rows."""

import gzip
import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from pyarrow import parquet
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.__main__ import main as dpo
from dpo.cli.evaluate import UNLIMITED
from dpo.data.tokenization import PairEncoder
from dpo.evaluation import grades
from dpo.evaluation.measure import sum_logps
from dpo.evaluation.suite import Suite, read_suite, suite_name
from dpo.models.loading import ModelLoader
from dpo.models.origin import PolicyOrigin
from dpo.models.prompt_sharing import share_if_exact
from dpo.runs import evaluations
from dpo.runs.folder import Run
from dpo.runs.hub import export_files
from tests.support.data import CHATML
from tests.support.runs import Lab, policy

Row = dict[str, Any]
PAIR: Row = {"prompt": "What is two and two?", "chosen": "It is four.", "rejected": "Five.", "subset": "sums", "id": 7}


def write(file: Path, rows: Sequence[Row]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def encoders(path: Path, max_length: int = UNLIMITED, text_format: Any = "auto") -> tuple[PairEncoder, PairEncoder]:
    tokenizer = ModelLoader().load_tokenizer(str(path))
    return PairEncoder(tokenizer, UNLIMITED, text_format), PairEncoder(tokenizer, max_length, text_format)


def read(file: Path, **options: Any) -> Suite:
    return read_suite(file, *encoders(policy(), **options))


def plain_logp(model: Any, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """Log-probability of an answer from the model's own forward pass over one sequence."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0].double().log_softmax(-1)
    first = len(prompt) - 1
    return float(sum(logps[first + i, token] for i, token in enumerate(answer)))


def evaluate(*words: str | Path) -> int:
    return dpo(["evaluate", *map(str, words)])


@pytest.fixture(scope="module")
def models() -> list[str | Path]:
    """Options that name two models that differ in all weights."""
    return ["--policy", policy(seed=1), "--reference", policy(seed=0)]


def result(folder: Path, name: str) -> tuple[Row, list[Row]]:
    """Record and row scores of an evaluation."""
    rows = [json.loads(line) for line in (folder / f"{name}.rows.jsonl").read_text().splitlines()]
    return json.loads((folder / f"{name}.json").read_text()), rows


def check_against_transformers(file: Path, rows: Sequence[Row], folder: Path, models: Sequence[Any], limit: int) -> Row:
    """Compare every log-probability, log-ratio and accuracy with plain forward passes over text made here."""
    assert evaluate(*models, "--suite", file, "--to", folder, "--limit", limit) == 0
    record, scored = result(folder, suite_name(file))
    assert len(scored) == min(limit, len(rows)) == record["rows_scored"]
    tokenizer = AutoTokenizer.from_pretrained(models[1])
    ours, theirs = (AutoModelForCausalLM.from_pretrained(models[at]).eval() for at in (1, 3))
    right = 0
    for row, found in zip(rows[:limit], scored, strict=True):
        prompt = f"\n\nHuman: {row['prompt'].strip()}\n\nAssistant:"
        start = tokenizer(prompt)["input_ids"]
        ratios = []
        for number, side in enumerate(("chosen", "rejected")):
            ids = tokenizer(f"{prompt} {row[side].strip()}")["input_ids"]
            answer = [*ids[len(start) :], tokenizer.eos_token_id]
            logps = [plain_logp(model, start, answer) for model in (ours, theirs)]
            assert found["policy_logp"][number] == pytest.approx(logps[0], abs=1e-4)
            assert found["reference_logp"][number] == pytest.approx(logps[1], abs=1e-4)
            ratios.append(logps[0] - logps[1])
        right += ratios[0] > ratios[1]
    assert evaluations.overall_score(record)["policy"] == pytest.approx(right / len(scored))
    return record


def test_scores_of_llmbar_equal_plain_forward_passes(tmp_path: Path, rewardbench: Path) -> None:
    with gzip.open(rewardbench, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    chosen = [row for row in rows if len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) < 500]
    short = [row for subset in grades.SECTIONS["Chat Hard"] for row in chosen if row["subset"] == subset][::12]
    file = write(tmp_path / "llmbar.jsonl", short)
    models = ["--policy", policy(seed=1, max_position_embeddings=2048), "--reference"]
    models.append(policy(seed=0, max_position_embeddings=2048))
    record = check_against_transformers(file, short, tmp_path, models, len(short))
    found = {score["name"]: score["rows"] for score in record["scores"]}
    assert found == {
        **{row["subset"]: sum(other["subset"] == row["subset"] for other in short) for row in short},
        f"Chat Hard ({len({row['subset'] for row in short})} of 6 subsets)": len(short),
        "all rows": len(short),
    }


def test_scores_of_several_answers_equal_plain_forward_passes(tmp_path: Path, models: Sequence[Any]) -> None:
    """The prompt is shared among all answers of a row, and the rows of several lengths are scored together."""
    rows = [
        {"prompt": f"Count to {n}.", "chosen": ["One " * n, "Yes."], "rejected": ["No", "Never " * 5, "Two."], "id": n}
        for n in (3, 1, 9)
    ]
    suite = read(write(tmp_path / "best.jsonl", rows))
    model = ModelLoader().load_model(str(policy(seed=1)))
    assert share_if_exact(model) == ""
    plain = AutoModelForCausalLM.from_pretrained(policy(seed=1)).eval()
    for row, logps in zip(suite.rows, sum_logps(model, [row.example for row in suite.rows]), strict=True):
        assert len(logps) == 5
        expected = [plain_logp(plain, row.example.prompt, answer) for answer in row.example.answers]
        assert logps == pytest.approx(expected, abs=1e-4)
    texts = [policy_text(row.example.prompt + list(row.example.answers[1])) for row in suite.rows]
    assert texts == [f"<s>\n\nHuman: Count to {n}.\n\nAssistant: Yes.</s>" for n in (3, 1, 9)]


def policy_text(tokens: Sequence[int]) -> str:
    return str(AutoTokenizer.from_pretrained(policy()).decode(tokens))


def test_the_layout_of_pairs_is_measured_as_by_hand(tmp_path: Path, models: Sequence[Any]) -> None:
    rows = [{**PAIR, "id": n, "prompt": f"What is {n} and two?", "chosen": f"It is {n + 2}."} for n in range(6)]
    check_against_transformers(write(tmp_path / "sums.jsonl", rows), rows, tmp_path, models, 4)


def test_parquet_and_json_lines_give_the_same_record(tmp_path: Path, models: Sequence[Any]) -> None:
    rows = [{**PAIR, "chosen": ["It is four.", "4"], "rejected": ["Five.", "Six."], "id": n} for n in range(3)]
    lines, table = write(tmp_path / "lines.jsonl", rows), tmp_path / "table-00000-of-00001.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), table)
    assert evaluate(*models, "--suite", lines, table, "--to", tmp_path) == 0
    (first, first_rows), (second, second_rows) = result(tmp_path, "lines"), result(tmp_path, "table")
    assert first_rows == second_rows
    assert first["scores"] == second["scores"]
    for record, file in ((first, lines), (second, table)):
        assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_pair_is_right_only_where_the_chosen_score_is_strictly_larger() -> None:
    assert grades.grade_answers([2.0, 1.0], 1, is_pair=True) == 1
    assert grades.grade_answers([1.0, 1.0], 1, is_pair=True) == 0
    assert grades.grade_answers([0.0, 1.0], 1, is_pair=True) == 0


def test_the_best_of_four_shares_ties() -> None:
    assert grades.grade_answers([4.0, 1.0, 2.0, 3.0], 1, is_pair=False) == 1
    assert grades.grade_answers([3.0, 1.0, 2.0, 3.0], 1, is_pair=False) == 1 / 2
    assert grades.grade_answers([0.0] * 4, 1, is_pair=False) == 1 / 4
    assert grades.grade_answers([1.0, 1.0, 2.0, 0.0], 1, is_pair=False) == 0
    assert grades.grade_answers([1.0, 3.0, 3.0, 0.0], 2, is_pair=False) == 1 / 2, "one of the two best is chosen"


def test_a_prompt_of_ties_is_graded_as_published() -> None:
    """0.3 for either row, 0.2 for a gap above the spread in one and in both, 0.01 tanh(gap / spread - 1)."""
    perfect = grades.grade_ties_prompt([9.0, 1.0], [5.0, 4.0, 1.0, 0.0], 2)
    assert perfect == pytest.approx(0.3 + 0.3 + 0.2 + 0.2 + 0.01 * math.tanh(3 / 1 - 1))
    spread = grades.grade_ties_prompt([9.0, 1.0], [9.0, 4.0, 1.0, 0.0], 2)
    assert spread == pytest.approx(0.6 + 0.01 * math.tanh(3 / 5 - 1)), "right answers differ more than right and wrong"
    one = grades.grade_ties_prompt([1.5, 1.0], [5.0, 4.0, 1.0], 2)
    assert one == pytest.approx(0.6 + 0.2 + 0.01 * math.tanh(0.5 / 1 - 1)), "not above the spread in both rows"
    wrong = grades.grade_ties_prompt([0.0, 1.0], [4.0, 4.0, 5.0], 2)
    assert wrong == pytest.approx(-0.01), "right answers are equal, and the wrong one is above: tanh(-inf)"
    assert grades.grade_ties_prompt([1.0, 1.0], [1.0, 1.0, 1.0], 2) == 0, "0 / 0 adds nothing"


def test_sections_are_weighted_by_the_published_numbers_of_rows() -> None:
    subsets = {subset: [1.0, 0.0] for counts in grades.SECTIONS.values() for subset in counts}
    subsets["mt-bench-hard"] = subsets["math-prm"] = [1.0, 1.0]
    by_subset = {name: grades.np.array(values) for name, values in subsets.items()}
    scores = {score.name: score for score in grades.add_up(by_subset, {"other": by_subset})}
    hard = (37 * 1 + (100 + 134 + 92 + 47 + 46) * 0.5) / (37 + 100 + 134 + 92 + 47 + 46)
    reasoning = (984 * 1 + 6 * 164 * 0.5) / (984 + 6 * 164)
    assert scores["Chat"].policy == scores["Safety"].policy == 0.5
    assert scores["Chat Hard"].policy == pytest.approx(hard)
    assert scores["Reasoning"].policy == pytest.approx(reasoning) == 0.75
    assert scores["RewardBench"].policy == pytest.approx((0.5 + hard + 0.5 + reasoning) / 4)
    assert scores["RewardBench"].baselines == {"other": pytest.approx(scores["RewardBench"].policy)}
    low, high = scores["RewardBench"].interval
    assert low < scores["RewardBench"].policy < high
    assert scores["mt-bench-hard"].interval == (1, 1)


def test_the_second_benchmark_is_the_plain_mean_of_its_subsets() -> None:
    names = ("Factuality", "Precise IF", "Math", "Safety", "Focus", "Ties")
    by_subset = {name: grades.np.array([1.0] if name == "Math" else [0.5, 0.25]) for name in names}
    last = grades.add_up(by_subset, {"chance": {"Math": by_subset["Math"]}})[-1]
    assert (last.name, last.kind) == ("RewardBench 2", "benchmark")
    assert last.policy == pytest.approx((1 + 5 * 0.375) / 6)
    assert last.baselines == {"chance": None}, "unknown where it is unknown for a subset"


def test_odd_rows_are_named_and_in_no_figure(tmp_path: Path) -> None:
    file = write(
        tmp_path / "odd.jsonl",
        [
            PAIR,
            {**PAIR, "id": "empty", "chosen": " "},
            {**PAIR, "id": "same", "rejected": PAIR["chosen"]},
            {**PAIR, "id": "none", "rejected": []},
            {**PAIR, "id": "number", "chosen": 4},
            {"prompt": "x", "chosen": "y", "id": "missing"},
            {**PAIR, "id": "control", "chosen": "It</s> is"},
            {**PAIR, "id": "tied:1", "subset": "Ties", "chosen": ["a", "b"], "rejected": ["c"]},
        ],
    )
    file.write_text(file.read_text() + "{broken\n")
    suite = read(file)
    assert [row.id for row in suite.rows] == ["7"]
    assert suite.rows_read == 9
    assert suite.unscored == {
        "empty_answer": ["empty"],
        "identical_answers": ["same"],
        "wrong_type": ["none", "number"],
        "missing_field": ["missing"],
        "control_token_in_text": ["control"],
        "ties_without_partner": ["tied:1"],
        "broken_json": ["line 9"],
    }


def test_several_chosen_answers_and_ties_are_read(tmp_path: Path, models: Sequence[Any]) -> None:
    ties = {"prompt": "A colour?", "rejected": ["Dog.", "Cat."], "subset": "Ties"}
    rows = [
        {**ties, "id": "ref:5", "chosen": ["Red."]},
        {**ties, "id": "tied:5", "chosen": ["Red.", "Blue.", "Green."]},
    ]
    rows += [{**PAIR, "chosen": ["It is four."], "rejected": ["Five.", "Six.", "Two."], "subset": "Math"}]
    assert evaluate(*models, "--suite", write(tmp_path / "second.jsonl", rows), "--to", tmp_path) == 0
    record, scored = result(tmp_path, "second")
    assert [row["chosen"] for row in scored] == [1, 3, 1]
    assert [row["right"] is None for row in scored] == [True, True, False]
    by_name = {score["name"]: score for score in record["scores"]}
    reference, tied = scored[0]["score"], scored[1]["score"]
    assert by_name["Ties"]["policy"] == pytest.approx(grades.grade_ties_prompt(reference, tied, 3))
    assert (by_name["Ties"]["rows"], by_name["Ties"]["baselines"]["chance"]) == (1, None)
    assert by_name["Math"]["baselines"]["chance"] == 1 / 4


def test_length_and_plain_log_probabilities_are_judged_by_the_same_rule(tmp_path: Path, models: Sequence[Any]) -> None:
    rows = [{**PAIR, "id": n, "chosen": "abc "[:n], "rejected": "xy"} for n in (1, 2, 3)]
    assert evaluate(*models, "--suite", write(tmp_path / "length.jsonl", rows), "--to", tmp_path) == 0
    record, scored = result(tmp_path, "length")
    baselines = evaluations.overall_score(record)["baselines"]
    assert (baselines["longer"], baselines["shorter"], baselines["chance"]) == (1 / 3, 1 / 3, 1 / 2), "one is a tie"
    for role in ("policy", "reference"):
        right = [first > second for first, second in (row[f"{role}_logp"] for row in scored)]
        assert baselines[f"{role} log-prob"] == pytest.approx(sum(right) / 3)


def test_equal_models_are_said_to_be_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "same.jsonl", [PAIR, {**PAIR, "id": 8, "chosen": "Four, of course."}])
    assert evaluate("--policy", policy(), "--reference", policy(), "--suite", file, "--to", tmp_path) == 0
    record, _ = result(tmp_path, "same")
    assert evaluations.overall_score(record)["policy"] == 0
    assert "Nothing was measured: policy and reference gave every answer the same probability" in " ".join(
        capsys.readouterr().out.split()
    )


def test_long_rows_are_cut_as_in_training_and_counted(tmp_path: Path) -> None:
    long = {**PAIR, "id": "long", "prompt": "word " * 40}
    turns = "".join(f"\n\nHuman: Say {n}.\n\nAssistant: {n}." for n in range(8)) + "\n\nHuman: And?\n\nAssistant:"
    answers = {"chosen": ["Yes.", "Yes, of course, and so on and so on."], "rejected": ["No."]}
    file = write(tmp_path / "long.jsonl", [PAIR, long, {**PAIR, "id": "turns", "prompt": turns, **answers}])
    whole, limited = encoders(policy(), max_length=48)
    suite = read_suite(file, whole, limited)
    assert suite.cut_ids == {"start of the prompt cut": ["long"], "oldest turns of the prompt left out": ["turns"]}
    for row in suite.rows:
        longest = max(map(len, row.example.answers))
        assert len(row.example.prompt) + longest <= 48
    assert len(suite.rows[1].example.prompt) + max(map(len, suite.rows[1].example.answers)) == 48
    uncut = read_suite(file, whole, whole)
    assert not uncut.cut_ids
    assert [row.example.answers for row in suite.rows] == [row.example.answers for row in uncut.rows]


def test_chat_templates_render_the_rows(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy())
    tokenizer.chat_template = CHATML
    encoder = PairEncoder(tokenizer, UNLIMITED)
    suite = read_suite(write(tmp_path / "chat.jsonl", [PAIR]), encoder, encoder)
    (example,) = [row.example for row in suite.rows]
    expected = "<|im_start|>user\nWhat is two and two?<|im_end|>\n<|im_start|>assistant\nFive.<|im_end|>\n</s>"
    assert policy_text([*example.prompt, *example.answers[1]]).removeprefix("<s>") == expected


def test_a_score_without_a_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "free.jsonl", [PAIR, {**PAIR, "id": 8, "chosen": "Four and four and four."}])
    words = ["--policy", policy(seed=1), "--suite", file, "--to", tmp_path, "--score"]
    assert evaluate(*words, "mean-logp") == 0
    record, rows = result(tmp_path, "free")
    assert record["reference"] is None
    for row in rows:
        assert row["score"] == pytest.approx([p / n for p, n in zip(row["policy_logp"], row["tokens"], strict=True)])
    assert evaluate(*words, "logp") == 0
    assert all(row["score"] == row["policy_logp"] for row in result(tmp_path, "free")[1])
    assert "trained without" not in capsys.readouterr().out, "nobody knows"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "gone.jsonl"], "--suite gone.jsonl: expected a file, found none."),
        (["--limit", "0"], "--limit: expected 1 or more rows, got 0."),
        (["--benchmark", "a/b", "c"], "--benchmark needs --run"),
        (["--source-url", "https://x"], "--source-url goes with --benchmark"),
        (["--score", "logp"], "--reference goes with --score log-ratio only."),
        (["--max-length", "4096"], "--max-length: expected at most"),
        (["--device", "mps"], "--device mps: "),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(
    words: list[str], message: str, models: Sequence[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "x.jsonl", [PAIR])
    assert evaluate(*models, "--suite", file, *words) == 1
    assert message in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(tmp_path: Path, models: Sequence[Any], capsys: Any) -> None:
    assert evaluate(*models, "--suite", write(tmp_path / "x.jsonl", [{"text": "a"}])) == 1
    assert "got none that can be scored; row 1: no column 'chosen'" in capsys.readouterr().err
    (tmp_path / "x.txt").touch()
    assert evaluate(*models, "--suite", tmp_path / "x.txt") == 1
    assert "x.txt: expected a file that ends in .jsonl" in capsys.readouterr().err


def test_a_policy_that_had_no_reference_is_judged_without_one(tmp_path: Path, capsys: Any) -> None:
    free = tmp_path / "free"
    shutil.copytree(policy(seed=1), free)
    origin = PolicyOrigin(str(policy()), str(policy()), has_reference=False)
    (free / "origin.json").write_text(json.dumps(asdict(origin)))
    file = write(tmp_path / "free.jsonl", [PAIR])
    assert evaluate("--policy", free, "--suite", file, "--to", tmp_path) == 0
    record, (row,) = result(tmp_path, "free")
    assert record["score"] == "mean-logp"
    assert record["reference"]["name"] == "llama-0", "a baseline all the same"
    assert row["score"] == pytest.approx([p / n for p, n in zip(row["policy_logp"], row["tokens"], strict=True)])
    assert "trained without a reference" in " ".join(capsys.readouterr().out.split())
    assert evaluate("--policy", free, "--suite", file, "--to", tmp_path, "--score", "log-ratio") == 0
    record, (row,) = result(tmp_path, "free")
    ratios = [ours - theirs for ours, theirs in zip(row["policy_logp"], row["reference_logp"], strict=True)]
    assert row["score"] == ratios


def test_suites_are_named_by_their_file_or_folder() -> None:
    names = {
        "a/llmbar.jsonl.gz": "llmbar",
        "a/test.jsonl.gz": "a-test",
        "b/filtered-00000-of-00001.parquet": "b-filtered",
    }
    assert {file: suite_name(Path(file)) for file in names} == names


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    options = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--optimizer.lr=1e-2"]
    return Lab(tmp_path_factory.mktemp("runs")).fit("judged", *options)


def test_an_evaluation_of_a_run_is_in_its_model_card(run: Run, tmp_path: Path, capsys: Any) -> None:
    before = ModelCard.load(run.export_folder / "README.md")
    own = before.data.eval_results
    file = write(tmp_path / "sums.jsonl", [{**PAIR, "id": n, "prompt": f"What is {n}?"} for n in range(4)])
    assert evaluate("--run", run.folder, "--suite", file) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"Written: {run.evaluations_folder / 'sums.md'}" in printed
    record, _ = result(run.evaluations_folder, "sums")
    card = ModelCard.load(run.export_folder / "README.md")
    score = evaluations.overall_score(record)
    assert f"| sums | {100 * score['policy']:.1f} | " in card.text
    assert record["command"] in card.text and "--run runs/judged --suite sums.jsonl" in record["command"]
    assert str(tmp_path) not in str(card) and str(run.folder.parent) not in str(card)
    assert [each.task_name for each in card.data.eval_results][-1] == evaluations.EVALUATION_TASK
    assert card.data.eval_results[-1].metric_value == round(score["policy"], 6)
    assert card.data.eval_results[:-1] == (own or [])
    once = (run.export_folder / "README.md").read_text()
    evaluations.refresh_card(run, record["policy"]["sha256"])
    assert (run.export_folder / "README.md").read_text() == once
    evaluations.refresh_card(run, "of other weights")
    emptied = ModelCard.load(run.export_folder / "README.md")
    assert (emptied.text, emptied.data.to_dict()) == (before.text, before.data.to_dict())


def test_a_whole_benchmark_is_written_as_the_hub_reads_it(run: Run, tmp_path: Path, capsys: Any) -> None:
    best = {**PAIR, "chosen": ["It is four."], "rejected": ["Five.", "Six.", "Two."]}
    ties = [{**best, "subset": "Ties", "id": "ref:1"}]
    ties += [{**best, "subset": "Ties", "id": "tied:1", "chosen": ["It is four.", "Four."]}]
    subsets = [{**best, "subset": name} for name in ("Factuality", "Precise IF", "Math", "Safety", "Focus")]
    file = write(tmp_path / "second.jsonl", [*subsets, *ties])
    words = ["--run", run.folder, "--suite", file, "--benchmark", "org/bench", "test", "--source-url", "https://a.b/c"]
    assert evaluate(*words) == 0
    record, _ = result(run.evaluations_folder, "second")
    path = run.export_folder / ".eval_results" / "second.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(path.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.source_url) == ("org/bench", "test", "https://a.b/c")
    assert entry.value == round(100 * evaluations.overall_score(record)["policy"], 2)
    assert entry.date == record["date"] and record["sha256"][:16] in entry.notes
    assert path in export_files(run.folder)
    assert evaluate(*words, "--limit", 5) == 1
    assert "expected the score of all rows of a benchmark, got all rows with 5 rows scored" in capsys.readouterr().err
