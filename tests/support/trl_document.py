"""The tables of docs/from_trl.md, as they follow from the mapping that the converter uses."""

from dpo.cli.trl_options import OPTION_SECTIONS, TRL_LOSSES


def code(words: str) -> str:
    return ", ".join(f"`{word}`" for word in words.split())


def option_tables() -> str:
    """Return every section: options with a counterpart beside it, options without one beside the reason."""
    text = []
    for title, rows in OPTION_SECTIONS.items():
        has_options = any(row.options for row in rows)
        text += [f"### {title}\n", "| TRL | here | |\n|---|---|---|" if has_options else "| TRL | |\n|---|---|"]
        for row in rows:
            cells = [code(row.names), *([code(row.options)] if has_options else []), row.remark]
            text.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
        text.append("")
    return "\n".join(text).strip() + "\n"


def loss_table() -> str:
    lines = []
    for name, loss in TRL_LOSSES.items():
        options = [f"`{ours}`" + (f" ({theirs})" if ours != theirs else "") for ours, theirs in loss.fields.items()]
        options += ["`divergence` (f_divergence_type)"] if loss.takes_divergence else []
        lines.append(f"| {name} | `{loss.class_name}` | {', '.join(options) or '-'} |")
    return "\n".join(lines) + "\n"
