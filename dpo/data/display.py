"""One row of the data as the model sees it: its tokens as text, which of them are scored, and what was cut."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.text import Text

from dpo.data.tokenization import PairEncoder

SCORED_MARK = "▶"
"""Stands before the first token that is scored."""
PART_LINES = 4  # lines of a terminal that the prompt, and each answer, takes at most
LABEL_WIDTH = 10


class ExampleView:
    """The parts of an example, each shortened in the middle to a few lines of whatever terminal it is printed on.

    Args:
        title: The first line.
        parts: Label and text of each part.
        notes: The last lines, one each.
    """

    def __init__(self, title: str, parts: Sequence[tuple[str, str]], notes: Sequence[str]) -> None:
        self.title = title
        self.parts = parts
        self.notes = notes

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        width = max(options.max_width, 2 * LABEL_WIDTH) - LABEL_WIDTH
        yield Text(_shorten(self.title, width + LABEL_WIDTH), style="bold", overflow="crop", no_wrap=True)
        for label, text in self.parts:
            short = _shorten(text, PART_LINES * width)
            lines = [short[at : at + width] for at in range(0, len(short), width)] or [""]
            for number, line in enumerate(lines):
                yield Text(f"{'' if number else label:<{LABEL_WIDTH}}{line}", overflow="crop", no_wrap=True)
        yield from (Text(note, overflow="fold") for note in self.notes)


def show_example(encoder: PairEncoder, row: Mapping[str, Any], name: str, sides: Sequence[str]) -> ExampleView:
    """Show a row of the store.

    Args:
        encoder: What has tokenized it.
        row: The row, one that is kept.
        name: Where it comes from.
        sides: The sides of the pair that are trained on.
    """
    prompt = _decode(encoder, row["prompt"])
    whole = {side: _decode(encoder, [*row["prompt"], *row[side]]) for side in sides}
    lengths = ", ".join(f"{len(row[side])} {side}" for side in sides)
    prompt_length = f"{len(row['prompt'])} prompt"
    title = f"{name} as {encoder.format}, tokens: {prompt_length}, {lengths}; scored from {SCORED_MARK}"
    answers = [
        (side, f"{SCORED_MARK}{_visible(text.removeprefix(prompt) if text.startswith(prompt) else text)}")
        for side, text in whole.items()
    ]
    return ExampleView(title, [("prompt", _visible(prompt)), *answers], [_cuts(row, sides, encoder.max_length)])


def _decode(encoder: PairEncoder, tokens: Sequence[int]) -> str:
    return str(encoder.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _visible(text: str) -> str:
    """Return text on one line, with line ends and other characters that move the cursor written out."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _shorten(text: str, length: int) -> str:
    """Return text with its middle replaced by its length if it is too long."""
    if len(text) <= length:
        return text
    gap = f" [... {len(text) - length:,} characters ...] "
    half = max((length - len(gap)) // 2, 1)
    return text[:half] + gap + text[-half:]


def _cuts(row: Mapping[str, Any], sides: Sequence[str], max_length: int) -> str:
    cuts = [f"{row['turns_dropped']} oldest turns of the prompt left out"] if row["turns_dropped"] else []
    cuts += ["start of the prompt cut"] if row["prompt_cut"] else []
    cuts += [f"end of {side} cut" for side in sides if row[f"{side}_cut"]]
    return f"Cut to {max_length} tokens: {', '.join(cuts) or 'nothing'}."
