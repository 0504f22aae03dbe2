"""Evaluations of a run's policy: their files, their tables, and what the export says of them.

`python -m dpo evaluate` writes a record per suite, ``evaluations/<suite>.json``, and the scores of its rows beside it.
The model card of the export shows the records of the very weights that are in it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml
from huggingface_hub.constants import EVAL_RESULTS_FOLDER

from dpo.files import write_atomically
from dpo.runs.folder import Run
from dpo.runs.results import TableRows

SCORE_COLUMNS = ("policy", "95 % interval", "reference log-prob", "policy log-prob", "longer", "shorter", "chance", "n")
STRICT_RULE = "the chosen answer's score is strictly larger"
SHARED_RULE = "a chosen answer has the largest score, and n such answers count 1/n each"
EVALUATION_TASK = "reward benchmark"
SECTION_START, SECTION_END = "<!-- evaluations -->", "<!-- end of evaluations -->"
NAMED_ROWS = 5  # rows that are named in a sentence; the record names all
COLUMNS_EXPLAINED = (
    "Columns, in percent of rows: policy with its 95 % bootstrap interval, and simpler "
    "judges: the plain log-probability under reference and policy, the longer answer, the shorter answer, chance."
)


def percent(share: float | None) -> str:
    """Return a share in percent with one decimal place; "-" for None."""
    return "-" if share is None else f"{100 * share:.1f}"


def interval_in_percent(low: float, high: float) -> str:
    """Return an interval of shares in percent."""
    return f"{percent(low)}-{percent(high)}"


def score_rows(record: Mapping[str, Any]) -> TableRows:
    """Return the scores of a record as a table: the name, and `SCORE_COLUMNS`."""
    table: TableRows = [("", *SCORE_COLUMNS)]
    for each in record["scores"]:
        judges = (percent(each["baselines"].get(name)) for name in SCORE_COLUMNS[2:-1])
        policy = percent(each["policy"]), interval_in_percent(*each["interval"])
        table.append((each["name"], *policy, *judges, str(each["rows"])))
    return table


def plain_markdown_table(rows: TableRows) -> str:
    """Return a table in Markdown, with its cells as they are."""
    header, *values = rows
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *values]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def record_remarks(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield in sentences what the table of a record does not say."""
    scored = record["rows_scored"]
    yield f"Score of an answer: {record['score']}. Right: {record['rule']}. {COLUMNS_EXPLAINED}"
    yield from _ties(record)
    yield from _verdict(record)
    if record["limit"] is not None:
        yield f"Only the first {record['limit']} rows were read: no result of the whole suite."
    if record["unscored"]:
        lost = record["rows_read"] - scored
        yield f"Not scored, and in no figure: {lost} of {record['rows_read']} rows: {_named(record['unscored'])}."
    if record["cut"]:
        yield f"Cut to the maximum length: {_named(record['cut'])}."
    for role in ("policy", "reference"):
        if record[role]:
            yield f"{role.capitalize()}: {record[role]['name']}, SHA-256 of its weights {record[role]['sha256'][:16]}."
    yield f"Rows: {record['file']}, SHA-256 {record['sha256'][:16]}."


def _ties(record: Mapping[str, Any]) -> Iterator[str]:
    equal, scored = record["rows_all_equal"], record["rows_scored"]
    if equal == scored:
        why = "all answers of every row have the same score"
        if record["score"] == "log-ratio":
            why = "policy and reference gave every answer the same probability, as before any training"
        grade = "counts as wrong" if record["rule"] == STRICT_RULE else "is shared among the answers"
        yield f"Nothing was measured: {why}. A tie {grade}."
    elif equal:
        yield f"Ties: {equal} of {scored} rows, all of whose answers have the same score."


def overall_score(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the score of the whole suite: the last one, as `scores` goes from the parts to the whole."""
    score: Mapping[str, Any] = record["scores"][-1]
    return score


def _verdict(record: Mapping[str, Any]) -> Iterator[str]:
    """Say whether the policy is better than the best of the simpler judges, as far as the interval tells."""
    score = overall_score(record)
    known = {name: value for name, value in score["baselines"].items() if value is not None}
    if record["rows_all_equal"] == record["rows_scored"] or not known:
        return
    best = max(known, key=lambda name: known[name])
    low, high = score["interval"]
    what = "above" if low > known[best] else "below" if high < known[best] else "not told apart from"
    yield (
        f"{score['name']}: {percent(score['policy'])} % ({interval_in_percent(low, high)}) is {what} the best of the "
        f"simpler judges, {best} with {percent(known[best])} %."
    )


def _named(ids_by_reason: Mapping[str, Sequence[str]]) -> str:
    parts = []
    for reason, ids in ids_by_reason.items():
        rest = f" and {len(ids) - NAMED_ROWS} more" if len(ids) > NAMED_ROWS else ""
        parts.append(f"{reason.replace('_', ' ')} {len(ids)} ({', '.join(ids[:NAMED_ROWS])}{rest})")
    return "; ".join(parts)


def write_record(folder: Path, record: Mapping[str, Any], row_scores: Sequence[Mapping[str, Any]]) -> Path:
    """Write the files of an evaluation.

    Args:
        folder: Where to; it is created.
        record: The record.
        row_scores: The scores of every row.

    Returns:
        The file with the table; ``.json`` and ``.rows.jsonl`` have the same name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        ".rows.jsonl": "".join(json.dumps(row) + "\n" for row in row_scores),
        ".json": json.dumps(record, indent=2) + "\n",
        ".md": f"# {record['suite']}\n\n{_record_markdown(record)}",
    }
    for suffix, text in texts.items():
        with write_atomically(folder / f"{record['suite']}{suffix}") as temporary:
            temporary.write_text(text, encoding="utf-8")
    return folder / f"{record['suite']}.md"


def _record_markdown(record: Mapping[str, Any]) -> str:
    remarks = "".join(f"- {remark}\n" for remark in record_remarks(record))
    return (
        f"{plain_markdown_table(score_rows(record))}\n{remarks}\nMade on {record['date']} by `{record['command']}`.\n"
    )


def read_records(run: Run, policy_sha256: str) -> list[dict[str, Any]]:
    """Return the records of a run whose policy has these weights, by name."""
    files = sorted(run.evaluations_folder.glob("*.json"))
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return [record for record in records if record["policy"]["sha256"] == policy_sha256]


def refresh_card(run: Run, policy_sha256: str) -> Path:
    """Put the records of the exported policy into its model card, in place of older ones or else at its end.

    Args:
        run: The run, which has an export.
        policy_sha256: Hash of the weights of the export.

    Returns:
        The card.
    """
    path = run.export_folder / "README.md"
    card = ModelCard(path.read_text(encoding="utf-8"))
    before, _, rest = card.text.partition(SECTION_START)
    after = rest.partition(SECTION_END)[2]
    records = read_records(run, policy_sha256)
    parts = [f"### {record['suite']}\n\n{_record_markdown(record)}" for record in records]
    card.text = f"{before}{SECTION_START}\n" + "\n".join([*parts, SECTION_END]) + after
    data = card.data
    assert isinstance(data, ModelCardData)
    own = [result for result in data.eval_results or [] if result.task_name != EVALUATION_TASK]
    data.eval_results = own + list(map(_model_index_result, records)) or None
    data.model_name = run.folder.name if data.eval_results else None
    with write_atomically(path) as temporary:
        temporary.write_text(str(card), encoding="utf-8")
        temporary.chmod(0o644)
    return path


def _model_index_result(record: Mapping[str, Any]) -> EvalResult:
    score = overall_score(record)
    return EvalResult(
        task_type="text-classification",
        task_name=EVALUATION_TASK,
        dataset_type=record["suite"],
        dataset_name=record["file"],
        dataset_args={"sha256": record["sha256"], "rows": record["rows_scored"], "limit": record["limit"]},
        metric_type="accuracy",
        metric_name=f"{score['name']}, by {record['score']}",
        metric_value=round(score["policy"], 6),
    )


def write_hub_result(run: Run, record: Mapping[str, Any], benchmark: tuple[str, str], source_url: str | None) -> Path:
    """Write the score of a whole benchmark as the hub reads it from the repository of a model.

    The form is that of https://huggingface.co/docs/hub/eval-results; the score is in percent.

    Args:
        run: The run, which has an export.
        record: The record of the evaluation.
        benchmark: Hub id of the data set, which the hub must know as a benchmark, and the name of the task in its
            eval.yaml.
        source_url: Where the evaluation can be read about; None: nowhere.

    Raises:
        ValueError: Rows of the benchmark are missing from the score.
    """
    dataset_id, task_id = benchmark
    score = overall_score(record)
    if record["limit"] is not None or record["unscored"] or score["kind"] != "benchmark":
        raise ValueError(
            f"--benchmark {dataset_id}: expected the score of all rows of a benchmark, got {score['name']} with "
            f"{record['rows_scored']} rows scored and {record['rows_read'] - record['rows_scored']} not: nothing was "
            f"written to {EVAL_RESULTS_FOLDER}."
        )
    entry = EvalResultEntry(
        dataset_id=dataset_id,
        task_id=task_id,
        value=round(100 * score["policy"], 2),
        date=record["date"],
        source_url=source_url,
        notes=f"implicit reward: {record['score']}; SHA-256 of the file {record['sha256'][:16]}",
    )
    path = run.export_folder / EVAL_RESULTS_FOLDER / f"{record['suite']}.yaml"
    path.parent.mkdir(exist_ok=True)
    with write_atomically(path) as temporary:
        temporary.write_text(yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False), encoding="utf-8")
    return path
