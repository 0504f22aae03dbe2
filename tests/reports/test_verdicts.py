"""Verdicts on made-up runs whose truth is known."""

from pathlib import Path

import numpy as np
import pytest

from dpo.reports.contents import read_contents
from dpo.reports.findings import SAMPLED_TOKENS, Findings, find_out
from dpo.reports.verdicts import Verdict, judge_run
from tests.support.reports import STEPS, calibrated_margins, flip_labels, healthy_ledger, ledger_rows, write_run

CALM = "It is a good day and the sun is out over the hills."
LOOP = "no no no no no no no no no no no no no no"


def judge(folder: Path, **options) -> dict[str, Verdict]:
    run = write_run(folder / "run", **options)
    return {verdict.subject: verdict for verdict in judge_run(find_out(read_contents(run)))}


def measured(margins, lengths=None, step=STEPS[-1], **options):
    lengths = np.random.default_rng(5).integers(-30, 31, len(margins)) if lengths is None else lengths
    return ledger_rows(np.random.default_rng(6), step, "val", margins, lengths, **options)


def test_a_healthy_run_has_nothing_to_remark(tmp_path: Path) -> None:
    verdicts = judge(tmp_path, ledger=healthy_ledger(), samples=[(CALM, CALM)] * 3)
    assert {name: verdict.state for name, verdict in verdicts.items()} == dict.fromkeys(verdicts, "good")
    assert not any(verdict.remedy for verdict in verdicts.values())
    assert all(
        "95 % interval" in verdicts[name].sentence for name in ("Learning", "Length", "Calibration", "Label noise")
    )


def test_over_optimising_is_dated(tmp_path: Path) -> None:
    margins = calibrated_margins(np.random.default_rng(0), 2000)
    ledger = [measured(margins, step=100), measured(4 * margins, step=150)]
    verdict = judge(tmp_path, ledger=ledger, losses=(0.65, 0.5, 0.9))["Over-optimising"]
    assert (verdict.state, verdict.remedy) == ("bad", "--trainer.max_steps 100")
    rise = np.mean(np.logaddexp(0, -4 * margins) - np.logaddexp(0, -margins))
    assert "Since step 100" in verdict.sentence
    assert f"risen by {rise:.3f} (95 %" in verdict.sentence


def test_over_optimising_needs_two_validations(tmp_path: Path) -> None:
    assert judge(tmp_path, losses=(0.6,))["Over-optimising"].state == "unknown"


@pytest.mark.parametrize(("direction", "word"), [(1, "longer"), (-1, "shorter")])
def test_length_alone_is_told_from_preference(tmp_path: Path, direction: int, word: str) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(-30, 31, 2000)
    verdict = judge(tmp_path, ledger=[measured(direction * lengths / 10 + rng.normal(0, 0.5, 2000), lengths)])["Length"]
    assert verdict.state == "bad"
    assert f"length alone ({word} wins)" in verdict.sentence


def test_length_beside_preference_is_a_warning(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(-30, 31, 3000)
    margins = calibrated_margins(rng, 3000) + 0.8 * np.sign(lengths)
    assert judge(tmp_path, ledger=[measured(margins, lengths)])["Length"].state == "warning"


def test_displacement(tmp_path: Path) -> None:
    verdict = judge(tmp_path, ledger=healthy_ledger(displaced=0.8))["Displacement"]
    assert (verdict.state, verdict.remedy) == ("bad", "--config configs/losses/rpo.yaml")


def test_displacement_without_a_ledger_is_that_of_the_metric(tmp_path: Path) -> None:
    verdict = judge(tmp_path, displaced=0.9)["Displacement"]
    assert verdict.state == "bad"
    assert "0.900 (95 % interval 0.8" in verdict.sentence


@pytest.mark.parametrize(("factor", "state", "word"), [(3, "bad", "Overconfident"), (0.2, "warning", "Underconfident")])
def test_a_miscalibrated_policy(tmp_path: Path, factor: float, state: str, word: str) -> None:
    margins = factor * calibrated_margins(np.random.default_rng(0), 3000)
    verdict = judge(tmp_path, ledger=[measured(margins)])["Calibration"]
    assert verdict.state == state
    assert word in verdict.sentence


def test_flipped_labels_are_found(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    margins, _ = flip_labels(rng, calibrated_margins(rng, 4000, spread=4), 0.2)
    verdict = judge(tmp_path, ledger=[measured(margins)])["Label noise"]
    assert verdict.state == "bad"
    assert float(verdict.remedy.rpartition(" ")[2]) == pytest.approx(0.2, abs=0.05)


def test_remedies_start_from_the_options_of_the_run(tmp_path: Path) -> None:
    margins = 0.2 * calibrated_margins(np.random.default_rng(0), 3000)
    run = write_run(tmp_path / "run", ledger=[measured(margins)], accuracy=0.5)
    text = run.config_path.read_text()
    run.config_path.write_text(text.replace("  limit_val_batches: null", "  max_steps: 40"))
    verdicts = {each.subject: each for each in judge_run(find_out(read_contents(run)))}
    assert verdicts["Calibration"].remedy == "--trainer.max_steps 80"


def test_a_loss_without_smoothing_is_replaced(tmp_path: Path) -> None:
    margins = 3 * calibrated_margins(np.random.default_rng(0), 3000)
    run = write_run(tmp_path / "run", ledger=[measured(margins)])
    run.config_path.write_text(run.config_path.read_text().replace("        label_smoothing: 0.0\n", ""))
    verdicts = {each.subject: each for each in judge_run(find_out(read_contents(run)))}
    assert verdicts["Calibration"].remedy == "--config configs/losses/cdpo.yaml"


def test_a_policy_that_knows_nothing_says_nothing_of_labels(tmp_path: Path) -> None:
    verdicts = judge(tmp_path, ledger=[measured(np.random.default_rng(0).normal(0, 1, 2000))])
    assert verdicts["Label noise"].state == "unknown"
    assert verdicts["Learning"].state == "bad"


def test_a_policy_that_prefers_the_rejected(tmp_path: Path) -> None:
    verdict = judge(tmp_path, accuracy=0.3)["Learning"]
    assert verdict.state == "bad"
    assert "prefers the rejected" in verdict.sentence


def test_a_leak_is_counted(tmp_path: Path) -> None:
    margins = calibrated_margins(np.random.default_rng(0), 200)
    training = measured(margins, trained=True)
    training = training.set_column(1, "split", [["train"] * 200])
    held_out = measured(margins[:50])
    verdict = judge(tmp_path, ledger=[training, held_out])["Leak"]
    assert verdict.state == "bad"
    assert verdict.sentence.startswith("50 validation pairs are training pairs, 100.0%")


@pytest.mark.parametrize(
    ("samples", "state", "words"),
    [
        ([(LOOP, CALM)] * 3, "bad", "repeats itself"),
        ([("", CALM)] + [(CALM, CALM)] * 2, "bad", "says nothing"),
        ([(LOOP, LOOP)] * 3, "good", "Nothing degenerate"),
        ([(LOOP, CALM)] + [(CALM, CALM)] * 2, "unknown", "Cannot tell"),
    ],
)
def test_samples(tmp_path: Path, samples: list[tuple[str, str]], state: str, words: str) -> None:
    verdict = judge(tmp_path, samples=samples)["Samples"]
    assert verdict.state == state
    assert words in verdict.sentence


@pytest.mark.parametrize(
    ("ended", "state", "words"),
    [
        ((False, True), "bad", "does not come to an end"),
        ((True, True), "good", "answers without an end 0.0"),
        ((False, False), "good", "answers without an end 0.0"),
    ],
)
def test_answers_end_as_was_recorded(tmp_path: Path, ended: tuple[bool, bool], state: str, words: str) -> None:
    """Whatever their length, and without an export that could count it."""
    verdict = judge(tmp_path, samples=[(CALM, CALM)] * 3, ended=ended)["Samples"]
    assert verdict.state == state
    assert words in verdict.sentence


def test_endless_answers_are_as_long_as_an_answer_may_be(tmp_path: Path) -> None:
    import inspect

    from dpo import quickstart
    from dpo.callbacks.samples import AnswerSampler

    assert inspect.signature(AnswerSampler).parameters["max_new_tokens"].default == SAMPLED_TOKENS
    run = write_run(tmp_path / "run", samples=[(" ".join(map(str, range(64))), "Yes.")] * 3)
    run.export_folder.mkdir()
    tokenizer = quickstart.POLICY_FOLDER / "tokenizer.json"
    (run.export_folder / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    (verdict,) = (each for each in judge_run(find_out(read_contents(run))) if each.subject == "Samples")
    assert verdict.state == "bad"
    assert "does not come to an end" in verdict.sentence


def test_without_a_ledger_it_says_what_to_switch_on(tmp_path: Path) -> None:
    verdicts = judge(tmp_path)
    for name in ("Length", "Calibration", "Label noise", "Leak"):
        assert verdicts[name].state == "unknown"
        assert verdicts[name].remedy == "--ledger.enabled true"


def test_the_margin_course_is_over_all_measurements(tmp_path: Path) -> None:
    margins = np.array([1.0, -2.0, 0.5])
    lengths = np.array([1, 2, 3])
    ledger = [measured(margins * factor, lengths, step=step) for factor, step in ((1, 50), (3, 100))]
    findings: Findings = find_out(read_contents(write_run(tmp_path / "run", ledger=ledger)))
    assert findings.course is not None
    assert findings.course.lowest_means(1)[0][0] == "made/val:2"
    assert sorted(findings.course.means) == pytest.approx(sorted(margins * 2))
    assert sorted(findings.course.spreads) == pytest.approx(sorted(np.abs(margins)))
    assert set(findings.course.counts) == {2}


def test_the_hundred_most_suspect_are_mostly_flipped(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    margins, flipped = flip_labels(rng, calibrated_margins(rng, 5000, spread=3), 0.2)
    ledger = [measured(margins + rng.normal(0, 0.5, 5000), step=step) for step in STEPS]
    findings = find_out(read_contents(write_run(tmp_path / "run", ledger=ledger)))
    assert findings.course is not None
    suspects = [int(name.rpartition(":")[2]) - 1 for name, *_ in findings.course.lowest_means(100)]
    assert flipped[suspects].mean() > 0.95  # an unflipped pair so far below 0 has a probability of S(-7)
