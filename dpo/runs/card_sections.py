"""Sections of a model card: what was measured on a run's own pairs, its data, its limits and its licences."""

from collections.abc import Iterator, Mapping, Sequence

from huggingface_hub import EvalResult

from dpo.runs.evaluations import interval_in_percent, percent, plain_markdown_table
from dpo.runs.folder import Run
from dpo.runs.intervals import mean_interval
from dpo.runs.inventory import read_audit

ACCURACY = "rewards/accuracies"
OWN_SPLITS = {"val": "validation", "test": "test"}
OWN_TASK = "preference pairs"
OWN_COLUMNS = ("metric", "policy", "95 % interval", "reference", "longer wins", "n", "data")


def own_results(values: Mapping[str, float], data_names: Sequence[str]) -> list[EvalResult]:
    """Return the accuracies on the run's own pairs for the metadata of the card (``model-index``).

    Args:
        values: The values in results.json.
        data_names: Names of the data.
    """
    return [
        EvalResult(
            task_type="text-generation",
            task_name=OWN_TASK,
            dataset_type=", ".join(data_names),
            dataset_name=", ".join(data_names),
            dataset_split=split,
            metric_type="accuracy",
            metric_name="reward accuracy",
            metric_value=round(values[f"{stage}/{ACCURACY}"], 6),
        )
        for stage, split in OWN_SPLITS.items()
        if f"{stage}/{ACCURACY}" in values
    ]


def own_results_table(run: Run, values: Mapping[str, float], validation_pairs: int | None, data_sha256: str) -> str:
    """Return the accuracies on the run's own pairs beside simpler judges, in Markdown; "" if none was measured.

    Args:
        run: The run, whose audit has the number of test pairs.
        values: The values in results.json.
        validation_pairs: Number of validation pairs; None if unknown.
        data_sha256: Hash that identifies the data; "" if unknown.
    """
    test = read_audit(run).get("test", {}).get("total", {})
    known = {"val": (validation_pairs, None), "test": (test.get("kept"), test.get("longer_wins"))}
    rows = []
    for stage, split in OWN_SPLITS.items():
        value, (pairs, longer) = values.get(f"{stage}/{ACCURACY}"), known[stage]
        if value is not None:
            row = percent(value), _interval(value, pairs), "-", percent(longer), str(pairs or "-")
            rows.append((f"reward accuracy, {split}", *row, data_sha256[:16] or "-"))
    if not rows:
        return ""
    return f"""{plain_markdown_table([OWN_COLUMNS, *rows])}
In percent of pairs, chance is 50; the interval is a 95 % bootstrap interval; data: SHA-256 of the files and of how they
were tokenized. What "-" stands for is not measured in training: `python -m dpo evaluate --run runs/{run.folder.name}
--suite FILE` measures reference and length on any file of pairs.
"""


def _interval(value: float, pairs: int | None) -> str:
    if not pairs:
        return "-"
    right = round(value * pairs)
    return interval_in_percent(*mean_interval([1.0] * right + [0.0] * (pairs - right)))


def data_section(run: Run) -> str:
    """Return what was read, kept, refused and cut, in Markdown."""
    header = ("split", "read", "kept", "refused", "unreadable", "longer wins, in percent")
    rows, reasons = [], []
    for split, subsets in read_audit(run).items():
        total = subsets["total"]
        lost = {name: count for part in ("refused", "bad") for name, count in total[part].items() if count}
        reasons += [f"{count} of {split} {name.replace('_', ' ')}" for name, count in lost.items()]
        counts = (total["read"], total["kept"], sum(total["refused"].values()), sum(total["bad"].values()))
        rows.append((split, *map(str, counts), percent(total["longer_wins"])))
    if not rows:
        return "The run has no audit of its rows.\n"
    why = f"\nNot used: {'; '.join(reasons)}.\n" if reasons else ""
    return f"{plain_markdown_table([header, *rows])}{why}"


def limits_section(run: Run) -> str:
    """Return what the figures of the card do not say, in Markdown."""
    return "".join(f"- {limit}\n" for limit in _limits(run))


def _limits(run: Run) -> Iterator[str]:
    yield "The accuracies are of the policy as a judge of given answers and say nothing of the answers that it writes."
    yield "Validation pairs may have decided which checkpoint or setting was kept; test pairs did not."
    for split, subsets in read_audit(run).items():
        cut = {name: share for name, share in subsets["total"]["cut"].items() if share}
        if cut:
            shares = ", ".join(f"{name.replace('_', ' ')} in {percent(share)} %" for name, share in cut.items())
            yield f"Pairs of {split} were cut to the maximum length: {shares}."
    yield "What the base model gets wrong, and what is wrong in the data, this policy may get wrong too."


def licence_section(base: str | None, by_data: Mapping[str, str | None]) -> str:
    """Return the licences of base and data as far as known, in Markdown.

    Args:
        base: Licence of the base model; None if unknown.
        by_data: Licence of every part of the data by name; None if unknown.
    """
    parts = {"Base model": base, **{f"Data {name}": given for name, given in by_data.items()}}
    return "".join(f"- {what}: {given or 'unknown, ask its source'}\n" for what, given in parts.items())
