"""`python -m dpo evaluate`: a policy as judge of given answers, beside its reference and simpler judges."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table

from dpo.data.tokenization import PairEncoder
from dpo.evaluation.measure import SCORE_KINDS, JudgeModels, measure_suite, policy_name
from dpo.evaluation.suite import read_suite, suite_name
from dpo.models.loading import ModelLoader, read_end_ids, resolve_model_path
from dpo.models.origin import ServedPolicy, find_policy, load_policy_and_reference, trained_format
from dpo.runs import evaluations
from dpo.runs.folder import Run

DESCRIPTION = (
    "Measure how often the implicit reward of a policy prefers the better answer, on files in the layout of "
    "RewardBench (prompt, chosen, rejected, subset, id) or RewardBench 2 (lists of chosen and rejected answers)."
)
UNLIMITED = 2**40  # tokens


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    kinds = "; ".join(f"{name}: {text}" for name, text in SCORE_KINDS.items())
    parser = argparse.ArgumentParser("dpo evaluate", description=DESCRIPTION, allow_abbrev=False, epilog=kinds)
    policy = parser.add_mutually_exclusive_group(required=True)
    policy.add_argument("--run", type=Path, help="folder of a finished run, runs/<name>")
    policy.add_argument("--policy", help="folder or hub id of a policy without a run")
    add = parser.add_argument
    add("--reference", help="folder or hub id of the reference (the one the policy was trained against)")
    add("--suite", type=Path, nargs="+", required=True, help="files: .jsonl, .jsonl.gz, .parquet and others")
    add("--score", choices=list(SCORE_KINDS), help="log-ratio, or mean-logp for a policy trained without a reference")
    add("--to", type=Path, help="folder for the results (runs/<name>/evaluations, which the model card shows)")
    add("--limit", type=int, help="read only so many rows of every file, from its start")
    add("--max-length", type=int, help="most tokens of prompt and answer (what the models were made for)")
    add("--format", choices=["auto", "hh", "chat", "plain"], help="how dialogues become text (as in training)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (%(default)s)")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="%(default)s")
    add("--benchmark", nargs=2, metavar=("ID", "TASK"), help="data set and task on the hub: export/.eval_results")
    add("--source-url", help="page about this evaluation, for --benchmark")
    return parser.parse_args(arguments)


def _check(options: argparse.Namespace) -> None:
    names = list(map(suite_name, options.suite))
    missing = next((file for file in options.suite if not file.is_file()), None)
    problems = {
        f"--suite {missing}: expected a file, found none.": missing is not None,
        f"--suite: expected suites with different names, got {', '.join(names)}: rename a file.": len(set(names))
        < len(names),
        f"--limit: expected 1 or more rows, got {options.limit}.": options.limit is not None and options.limit < 1,
        "--benchmark needs --run, whose export it is written to, and one --suite.": options.benchmark is not None
        and (options.run is None or len(names) > 1),
        "--source-url goes with --benchmark, and there is none.": options.source_url is not None
        and options.benchmark is None,
        "--reference goes with --score log-ratio only.": options.reference is not None
        and options.score not in (None, "log-ratio"),
        f"--run {options.run}: expected a run with an export, found none.": options.run is not None
        and not Run(options.run).export_folder.is_dir(),
    }
    for problem, holds in problems.items():
        if holds:
            raise ValueError(problem)


def main(arguments: Sequence[str]) -> None:
    """Measure a policy on reward benchmarks, print a table of each, and write the results.

    Raises:
        ValueError: An option, a model or a file cannot be used; the message says what to do.
    """
    options = _parse(arguments)
    _check(options)
    transformers.logging.disable_progress_bar()
    served, kind = _find_models(options)
    judge, encoders = _load(options, served, kind)
    run = Run(options.run.resolve()) if options.run else None
    folder = options.to or (run.evaluations_folder if run else None)
    console = Console()
    if served.reference_path and served.reference_note:
        console.print(served.reference_note)
    for file in options.suite:
        suite = read_suite(file, *encoders, options.limit)
        record, rows = measure_suite(judge, suite, _command(options, file))
        _print(console, record)
        if folder:
            console.print(f"Written: {evaluations.write_record(folder, record, rows)}", soft_wrap=True)
        if run and options.benchmark:
            path = evaluations.write_hub_result(run, record, tuple(options.benchmark), options.source_url)
            console.print(f"For the hub: {path}", soft_wrap=True)
    if run and folder == run.evaluations_folder:
        console.print(f"Model card: {evaluations.refresh_card(run, judge.sha256['policy'])}", soft_wrap=True)


def _find_models(options: argparse.Namespace) -> tuple[ServedPolicy, str]:
    """Return policy and reference as paths, and what the score of an answer is."""
    path = resolve_model_path(options.policy or str(Run(options.run).export_folder))
    if options.score in (None, "log-ratio"):
        served = find_policy(path, options.reference)
        return served, options.score or ("log-ratio" if served.has_reference else "mean-logp")
    return ServedPolicy(path, "", has_reference=False, format=trained_format(path)), options.score


def _load(
    options: argparse.Namespace, served: ServedPolicy, kind: str
) -> tuple[JudgeModels, tuple[PairEncoder, PairEncoder]]:
    """Load the models, and make the encoders without and with the maximum length."""
    path = served.policy_path
    with_reference = kind == "log-ratio" or (served.reference_path and not options.score)
    models: dict[str, Any] = (
        load_policy_and_reference(served)
        if with_reference
        else {"policy": ModelLoader().load_model(path, attn_implementation="sdpa")}
    )
    names = {"policy": policy_name(path), "reference": policy_name(served.reference_path)}
    judge = JudgeModels.prepare(models, names, kind, options.device, options.dtype)
    most = judge.context_length or UNLIMITED
    length = options.max_length or most
    if length > most:
        raise ValueError(f"--max-length: expected at most {most} tokens, which the models were made for, got {length}.")
    tokenizer, ends = ModelLoader().load_tokenizer(path), read_end_ids(path)
    text_format = options.format or served.format
    whole, limited = (PairEncoder(tokenizer, tokens, text_format, ends) for tokens in (UNLIMITED, length))
    return judge, (whole, limited)


def _command(options: argparse.Namespace, file: Path) -> list[str]:
    """Return the command line of one suite, with folders by their names alone."""
    given = {"--reference": options.reference and policy_name(options.reference), "--score": options.score}
    given |= {"--limit": options.limit, "--max-length": options.max_length, "--format": options.format}
    given |= {"--dtype": None if options.dtype == "float32" else options.dtype}
    policy = (
        ["--run", f"runs/{options.run.resolve().name}"] if options.run else ["--policy", policy_name(options.policy)]
    )
    more = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    return ["python", "-m", "dpo", "evaluate", *policy, "--suite", file.name, *more]


def _print(console: Console, record: dict[str, Any]) -> None:
    """Print the table of a record in 80 columns, and its remarks."""
    header, *rows = evaluations.score_rows(record)
    longer, shorter = header.index("longer"), header.index("shorter")
    short = {"95 % interval": "95 %", "reference log-prob": "ref.\nlogp", "policy log-prob": "policy\nlogp"}
    names = [short.get(name, name) for name in header[1:longer]]
    columns = [Column("", overflow="fold")]
    columns += [Column(name, justify="right", no_wrap=True) for name in (*names, "length", *header[shorter + 1 :])]
    title = f"{record['suite']}: rows judged right, in percent"
    table = Table(*columns, title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for row in rows:
        better = longer if float(row[longer]) >= float(row[shorter]) else shorter
        sign = "+" if better == longer else "-"
        table.add_row(*row[:longer], f"{row[better]} {sign}", *row[shorter + 1 :])
    console.print(table)
    console.print("length: + the longer answer wins, - the shorter one, whichever is right more often", highlight=False)
    for remark in evaluations.record_remarks(record):
        console.print(f"- {remark}", highlight=False, markup=False)
