"""Why a split has no pairs, and what would help: the message for whoever asked for them."""

from collections.abc import Sequence
from itertools import islice

import fsspec

from dpo.data.audit import Audit
from dpo.data.columns import PairRow
from dpo.data.dialogue import DialoguePair, Refusal
from dpo.data.formats import read_rows
from dpo.data.plain import row_parser
from dpo.data.sources import SourceFile
from dpo.data.tokenization import EncodedPair, PairEncoder
from dpo.secrets import reveal_address

LOOKED_AT = 100  # rows of a file that are read again
SHOWN = 3  # reasons that are named
_HELP = {
    "train": "Give more or other rows, or raise --data.limit.",
    "val": "Raise --data.val_fraction, or put pairs into a file with `val` in its name beside the training file, and "
    "give their folder as --data.path.",
    "test": "Put test pairs into a file with `test` in its name beside the training file (train.jsonl, test.jsonl) and "
    "give their folder as --data.path; or measure the pairs that training held out: `validate` in place of `test`.",
}
# Instead of the above, by the reason for which most rows are refused.
_REMEDIES: dict[str, str] = {
    Refusal.SYSTEM_WITHOUT_TEMPLATE: "A system message needs a chat template, and the tokenizer of --model.policy has "
    "none: choose a policy that has one, or leave the system messages out.",
}


def missing_pairs_message(split: str, path: str, audit: Audit | None) -> str:
    """Say why a split has no pairs: the largest reasons with the number of rows that have each.

    Args:
        split: train, val or test.
        path: Where the data come from.
        audit: Counts of the file or files that the pairs would come from; None if there is no such file.
    """
    name = f"No pairs are left for {split!r} of {path}"
    if audit is None:
        return f"{name}: no file is of this split, by its name. {_HELP[split]}"
    total = audit.counts_by_subset["total"]
    unused = total.refused | total.bad | {"left out by --data.exclude": total.excluded}
    reasons = sorted(((n, reason) for reason, n in unused.items() if n), reverse=True)
    if total.kept:
        advice = "Lower --data.val_fraction, or give more rows." if split == "train" else _HELP[split]
        return f"{name}: none of the {total.kept:,} pairs of {audit.split!r} went there. {advice}"
    named = ", ".join(f"{n:,} {reason.replace('_', ' ')}" for n, reason in reasons[:SHOWN])
    others = sum(n for n, _ in reasons[SHOWN:])
    more = f", {others:,} for other reasons" if others else ""
    remedy = _REMEDIES.get(reasons[0][1], _HELP["train"])
    return f"{name}: all {total.read:,} rows of {audit.split!r} were refused: {named}{more}. {remedy}"


def plain_hint(audit: Audit | None, sources: Sequence[SourceFile], encoder: PairEncoder) -> str:
    """Return a hint at the format ``plain`` if rows were refused for control tokens and it would take one of them.

    Args:
        audit: Counts of a split.
        sources: Files of the data set.
        encoder: The encoder that refused the rows.
    """
    refused = audit.counts_by_subset["total"].refused if audit else {}
    if not refused.get(Refusal.CONTROL_TOKEN_IN_TEXT) or encoder.format == "plain":
        return ""
    plain = PairEncoder(encoder.tokenizer, encoder.max_length, "plain", encoder.end_ids)
    taken = any(_would_take(source, encoder, plain) for source in sources if audit and source.split == audit.split)
    hint = " If prompts are rendered with a chat template already, --data.format plain takes them as they stand."
    return hint if taken else ""


def _would_take(source: SourceFile, encoder: PairEncoder, plain: PairEncoder) -> bool:
    """Return whether a row among the first is refused for control tokens as it is, and taken as plain text."""

    def results(of: PairEncoder) -> list[object]:
        with fsspec.open(reveal_address(source.file), "rb") as raw:
            rows = islice(read_rows(raw, source.file, row_parser(source.columns, of.format), skip_bad=True), LOOKED_AT)
            pairs = [row.pair if isinstance(row, PairRow) else row for row in rows]
        return [of.encode(pair) if isinstance(pair, DialoguePair) else pair for pair in pairs]

    both = zip(results(encoder), results(plain), strict=True)
    return any(now is Refusal.CONTROL_TOKEN_IN_TEXT and isinstance(other, EncodedPair) for now, other in both)
