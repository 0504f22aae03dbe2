"""What a run has learned, in sentences: each with a number, its interval, a picture, and one option that helps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dpo.reports.estimates import Estimate, mean_estimate, share_estimate
from dpo.reports.findings import Findings, SampledAnswers
from dpo.reports.pair_values import match_pairs

State = Literal["good", "warning", "bad", "unknown"]
LEDGER_OPTION = "--ledger.enabled true"
FEW_ANSWERS = 10  # so few say little of those that were not sampled, whatever their interval


@dataclass(frozen=True)
class Threshold:
    """A number from which a verdict is decided, and why it is this one."""

    value: float
    reason: str


THRESHOLDS = {
    "chance": Threshold(0.5, "accuracy of a coin; a policy has learned if its interval lies above it"),
    "chance_width": Threshold(
        0.2, "widest interval of the accuracy that still says that nothing was learned: about a hundred pairs"
    ),
    "loss_rise": Threshold(
        0.01,
        "nats that the validation loss may rise above its lowest value: the step between two good settings of a sweep "
        "is about that large, so less is not worth another run",
    ),
    "length_gap": Threshold(
        0.2,
        "difference of accuracy between pairs whose longer and whose shorter answer was chosen: above it, length moves "
        "more verdicts than most policies gain over chance",
    ),
    "displaced": Threshold(
        0.5, "share of chosen answers that became less likely: above it, the typical chosen answer did (2410.08847)"
    ),
    "calibration": Threshold(
        0.05, "expected calibration error: what networks with calibrated outputs stay below (1706.04599, table 1)"
    ),
    "flipped": Threshold(
        0.1, "share of flipped labels from which label smoothing pays: 0.1 is the usual choice (2403.00409)"
    ),
    "flipped_unknown": Threshold(
        0.3, "share of flips above which flipped labels and a weak policy that is sure of its errors look the same"
    ),
    "flipped_width": Threshold(0.2, "widest interval of the share of flips that still says something"),
    "repetition": Threshold(
        0.1, "how much larger the share of repeated sequences of four words may be than the reference's: one in ten"
    ),
    "cut": Threshold(0.2, "how much larger the share of answers without an end may be than the reference's"),
}


@dataclass(frozen=True)
class Verdict:
    """A verdict on one question.

    Attributes:
        subject: What it is about.
        state: ``good``, ``warning``, ``bad``, or ``unknown`` where the data do not support any of these.
        sentence: The verdict with its number.
        picture: Key of the picture that shows it.
        remedy: One option, or a command, to copy; empty if nothing is to be done.
    """

    subject: str
    state: State
    sentence: str
    picture: str
    remedy: str = ""


def _limit(name: str) -> float:
    return THRESHOLDS[name].value


def _cannot_tell(subject: str, why: str, picture: str, remedy: str = "") -> Verdict:
    return Verdict(subject, "unknown", f"Cannot tell: {why}.", picture, remedy)


def _hold_out_more(findings: Findings) -> str:
    """Return the option with which about twice as many pairs are held out."""
    share = findings.contents.option("data.init_args.val_fraction") or 0.05
    return f"--data.val_fraction {min(2 * share, 0.5):.2g}"


def _train_longer(findings: Findings) -> str:
    """Return the option with which training takes twice as many steps."""
    steps = findings.contents.option("trainer.max_steps") or -1
    if steps > 0:
        return f"--trainer.max_steps {2 * steps}"
    return f"--trainer.max_epochs {2 * max(findings.contents.option('trainer.max_epochs') or 1, 1)}"


def _smooth_labels(findings: Findings, share: float) -> str:
    """Return the option with which labels count as flipped with this probability, or such a loss."""
    has_smoothing = findings.contents.option("model.init_args.loss.init_args.label_smoothing") is not None
    return f"--model.loss.label_smoothing {share:.2f}" if has_smoothing else "--config configs/losses/cdpo.yaml"


def final_accuracy(findings: Findings) -> Estimate:
    """Return the accuracy at the last validation, by pairs or by the metric."""
    if findings.last is not None:
        return mean_estimate(findings.last.margins > 0)
    contents = findings.contents
    return share_estimate(contents.final_value("val/rewards/accuracies"), contents.pairs_by_validation())


def judge_learning(findings: Findings) -> Verdict:
    """Say whether the policy prefers the chosen answers of held-out pairs."""
    accuracy, subject = final_accuracy(findings), "Learning"
    if not np.isfinite(accuracy.value):
        return _cannot_tell(
            subject,
            "no validation measured an accuracy",
            "course",
            "--data.val_fraction 0.1 --trainer.val_check_interval 0.25",
        )
    said = f"accuracy on held-out pairs {accuracy}, chance {_limit('chance')}"
    rate = findings.contents.option("optimizer.init_args.lr")
    more = f"--optimizer.lr {3 * rate:.2g}" if isinstance(rate, float) else _train_longer(findings)
    if not accuracy.has_interval:
        return _cannot_tell(subject, said, "course", LEDGER_OPTION)
    if accuracy.low > _limit("chance"):
        return Verdict(subject, "good", f"It is learning: {said}.", "course")
    if accuracy.high < _limit("chance"):
        return Verdict(
            subject,
            "bad",
            f"It prefers the rejected answers: {said}. Look at the columns of the data.",
            "course",
            f"python -m dpo show --config {findings.contents.run.config_path}",
        )
    if accuracy.high - accuracy.low > _limit("chance_width"):
        return _cannot_tell(subject, said, "course", _hold_out_more(findings))
    return Verdict(subject, "bad", f"It is not learning, as far as these pairs show: {said}.", "course", more)


def judge_optimisation(findings: Findings) -> Verdict:
    """Say since when training has made the validation loss worse."""
    subject = "Over-optimising"
    steps, losses = findings.contents.curve_of("val/loss")
    if len(steps) < 2:
        return _cannot_tell(
            subject, "it takes two validations or more to see a minimum", "course", "--trainer.val_check_interval 0.25"
        )
    best_step, rise = findings.best_step, Estimate(float(losses[-1] - losses.min()))
    lowest = f"{losses.min():.3f} at step {best_step}"
    if steps[-1] == best_step:
        return Verdict(subject, "good", f"No: the last validation loss is the lowest, {lowest}.", "course")
    if findings.last is not None and findings.best is not None and findings.best.step == best_step:
        now, then = match_pairs(findings.last, findings.best)
        rise = mean_estimate(findings.last.losses[now] - findings.best.losses[then])
    said = f"the validation loss, {lowest}, has since risen by {rise}"
    if rise.value <= _limit("loss_rise"):
        return Verdict(subject, "good", f"No: {said}, which is little.", "course")
    if rise.has_interval and rise.low <= 0:
        return _cannot_tell(subject, f"{said}", "course", _hold_out_more(findings))
    return Verdict(
        subject,
        "bad",
        f"Since step {best_step}: {said}. best.ckpt holds the policy of that step.",
        "course",
        f"--trainer.max_steps {best_step}",
    )


def judge_length(findings: Findings) -> Verdict:
    """Say whether the policy prefers answers or only their length."""
    subject, effect = "Length", findings.length
    if findings.last is None:
        return _cannot_tell(subject, "this needs the margins of single pairs", "length", LEDGER_OPTION)
    if effect is None:
        return _cannot_tell(subject, "the validation pairs differ in length in one direction only", "length")
    longer = "longer" if effect.gap.value > 0 else "shorter"
    wins = f'"longer wins" {effect.longer_wins}, accuracy {mean_estimate(findings.last.margins > 0)}'
    gap = Estimate(abs(effect.gap.value), *sorted((abs(effect.gap.low), abs(effect.gap.high))))
    said = (
        f"accuracy is {effect.accuracy_if_longer.value:.3f} where the longer answer was chosen and "
        f"{effect.accuracy_if_shorter.value:.3f} where the shorter was"
    )
    if gap.high < _limit("length_gap"):
        return Verdict(
            subject, "good", f"It is preference more than length: {said}, difference {effect.gap}.", "length"
        )
    if effect.gap.low <= 0 <= effect.gap.high or gap.low <= _limit("length_gap"):
        return _cannot_tell(subject, f"{said}, difference {effect.gap}; {wins}", "length", _hold_out_more(findings))
    if effect.balanced.low <= _limit("chance"):
        sentence = (
            f"It has learned length alone ({longer} wins): {said}; beyond length, accuracy {effect.balanced}; {wins}."
        )
        return Verdict(subject, "bad", sentence, "length", "--config configs/losses/length_normalized.yaml")
    sentence = (
        f"Partly length ({longer} wins): {said}, difference {effect.gap}; beyond length, {effect.balanced}; {wins}."
    )
    return Verdict(subject, "warning", sentence, "length", "--config configs/losses/length_normalized.yaml")


def judge_displacement(findings: Findings) -> Verdict:
    """Say whether training has made the chosen answers less likely."""
    subject, contents, last = "Displacement", findings.contents, findings.last
    change = ""
    if last is not None and np.isfinite(last.chosen_logratios).any():
        share = mean_estimate(last.chosen_logratios < 0)
        change = f"; their mean log-ratio is {mean_estimate(last.chosen_logratios)} nats"
    else:
        share = share_estimate(contents.final_value("val/displaced"), contents.pairs_by_validation())
    if not np.isfinite(share.value):
        return _cannot_tell(subject, "no validation compared the policy with a reference", "displacement")
    said = f"the share of chosen answers that are less likely than under the reference is {share}{change}"
    low, high = (share.low, share.high) if share.has_interval else (share.value, share.value)
    if high <= _limit("displaced"):
        return Verdict(subject, "good", f"No: {said}.", "displacement")
    if low > _limit("displaced"):
        return Verdict(subject, "bad", f"Yes: {said}.", "displacement", "--config configs/losses/rpo.yaml")
    return _cannot_tell(subject, said, "displacement", _hold_out_more(findings))


LOGISTIC_LOSSES = ("DPO", "RobustDPO", "ODPO", "LD", "WPO")  # whose S(margin) is a probability


def judge_calibration(findings: Findings) -> Verdict:
    """Say whether 80 % means 80 %."""
    subject, calibration, loss = "Calibration", findings.calibration, findings.contents.loss_name
    if calibration is None:
        return _cannot_tell(subject, "this needs the margins of single pairs", "reliability", LEDGER_OPTION)
    if loss not in LOGISTIC_LOSSES:
        why = f"S(margin) is no probability under the loss {loss or '(not recorded)'}"
        return _cannot_tell(subject, why, "reliability")
    said = f"expected calibration error {calibration.error}; chance alone gives up to {calibration.chance:.3f}"
    if calibration.error.value <= max(_limit("calibration"), calibration.chance):
        if calibration.chance > 2 * _limit("calibration"):
            return _cannot_tell(subject, f"{said}, with {calibration.counts.sum()} pairs", "reliability")
        return Verdict(subject, "good", f"80 % means about 80 %: {said}.", "reliability")
    if calibration.overconfidence > 0:
        mean = f"it is right {calibration.overconfidence:.1%} less often than it is sure"
        return Verdict(subject, "bad", f"Overconfident: {mean}; {said}.", "reliability", _smooth_labels(findings, 0.1))
    mean = f"it is right {-calibration.overconfidence:.1%} more often than it is sure"
    return Verdict(subject, "warning", f"Underconfident: {mean}; {said}.", "reliability", _train_longer(findings))


def judge_labels(findings: Findings) -> Verdict:
    """Say how many labels seem to be flipped."""
    subject, flips = "Label noise", findings.flips
    if findings.best is None:
        return _cannot_tell(subject, "this needs the margins of single pairs", "flips", LEDGER_OPTION)
    if flips is None:
        return _cannot_tell(
            subject, f"{len(findings.best)} validation pairs are too few", "flips", _hold_out_more(findings)
        )
    said = f"estimated share of flipped labels {flips.share}, by the policy of step {findings.best.step}"
    is_wide = flips.share.high - flips.share.low > _limit("flipped_width")
    if is_wide or flips.share.value > _limit("flipped_unknown"):
        why = f"{said}; flipped labels and a policy that is sure of its errors look the same"
        return _cannot_tell(subject, why, "flips")
    if flips.share.low > _limit("flipped"):
        remedy = _smooth_labels(findings, flips.share.value)
        return Verdict(subject, "bad", f"Many labels are flipped: {said}.", "flips", remedy)
    if flips.share.high <= _limit("flipped"):
        return Verdict(subject, "good", f"Few labels are flipped: {said}.", "flips")
    return Verdict(
        subject,
        "warning",
        f"Some labels may be flipped: {said}.",
        "flips",
        _smooth_labels(findings, max(flips.share.value, 0.05)),
    )


def judge_leak(findings: Findings) -> Verdict:
    """Say whether pairs are in both the training and the validation split."""
    subject, course = "Leak", findings.course
    if course is None:
        return _cannot_tell(subject, "the names of the pairs are not recorded", "map", LEDGER_OPTION)
    splits = np.asarray(course.splits)
    held_out = int((splits == "val").sum())
    if held_out in (0, len(splits)):
        return _cannot_tell(subject, "the ledger has pairs of one split only", "map")
    shared = course.shared_pairs()
    checked = (
        f"checked by name: {len(splits) - held_out} training and {held_out} validation pairs; texts are not compared"
    )
    if shared:
        sentence = f"{shared} validation pairs are training pairs, {shared / held_out:.1%} ({checked})."
        return Verdict(subject, "bad", sentence, "map", "--data.val_fraction 0.1")
    return Verdict(subject, "good", f"No pair is in both splits ({checked}).", "map")


def judge_samples(findings: Findings) -> Verdict:
    """Say whether the sampled answers repeat themselves, are empty or do not end."""
    subject = "Samples"
    if not findings.answers:
        return _cannot_tell(subject, "no answers were sampled", "samples", "--trainer.val_check_interval 0.25")
    step = max(findings.answers)
    policy, reference = (findings.answers[step].get(role) for role in ("policy", "reference"))
    if policy is None:
        return _cannot_tell(subject, "no answers of the policy were sampled", "samples")
    empty = int((policy.words == 0).sum())
    before = int((reference.words == 0).sum()) if reference else 0
    beta = findings.contents.option("model.init_args.loss.init_args.beta")
    remedy = f"--model.loss.beta {3 * beta:.2g}" if isinstance(beta, float) else "--optimizer.lr 1e-6"
    repetition = _excess(policy.repetition, reference.repetition if reference else None)
    cut = _excess(policy.is_cut, reference.is_cut if reference else None)
    beside = " more than the reference's" if reference else ""
    said = f"repeated sequences of four words {repetition}{beside}; {_endings(policy, cut, beside)}; empty {empty}"
    count = len(policy.words)
    said = f"{said} of {count} answers at step {step}{', few enough to read them' if count < FEW_ANSWERS else ''}"
    found = (
        ("repeats itself", repetition.low > _limit("repetition")),
        ("does not come to an end", cut.low > _limit("cut")),
        ("says nothing", empty > before),
    )
    faults = [fault for fault, is_found in found if is_found]
    if faults:
        return Verdict(subject, "bad", f"The policy {' and '.join(faults)}: {said}.", "samples", remedy)
    if repetition.high > _limit("repetition") or cut.high > _limit("cut"):
        return _cannot_tell(subject, said, "samples")
    return Verdict(subject, "good", f"Nothing degenerate: {said}.", "samples")


def _excess(policy: np.ndarray, reference: np.ndarray | None) -> Estimate:
    return mean_estimate(policy if reference is None else policy - reference)


def _endings(policy: SampledAnswers, cut: Estimate, beside: str) -> str:
    if not len(policy.is_cut):
        return "whether answers end is not known without an export"
    return f"answers without an end {cut}{beside}"


JUDGES: tuple[Callable[[Findings], Verdict], ...] = (
    judge_learning,
    judge_optimisation,
    judge_length,
    judge_displacement,
    judge_calibration,
    judge_labels,
    judge_leak,
    judge_samples,
)


def judge_run(findings: Findings) -> list[Verdict]:
    """Return all verdicts, in the order in which a person asks."""
    return [judge(findings) for judge in JUDGES]
