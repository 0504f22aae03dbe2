"""What an option of TRL's DPO trainer is called here, for whoever types it."""

from dpo.cli.trl_options import ROWS_BY_NAME, OptionRow

# Options of earlier versions of TRL, of its Python API, and names that its users also type.
_OTHER_NAMES = {
    "max_prompt_length": OptionRow("", "data.max_length", "of prompt and answer together"),
    "max_completion_length": OptionRow("", "data.max_length", "of prompt and answer together"),
    "model_ref_name_or_path": OptionRow("", "model.reference"),
    "ref_model": OptionRow("", "model.reference"),
    "reference_free": OptionRow("", "model.reference", "`Nothing`, with a loss that takes none, such as `SimPO`"),
    "torch_dtype": OptionRow("", "trainer.precision"),
    "warmup_ratio": OptionRow("", "lr_scheduler.warmup_ratio", "with `--lr_scheduler Warmup`"),
}


def counterpart_sentence(name: str) -> str:
    """Return a sentence about what stands for an option of TRL here; empty if TRL has no such option."""
    row = _OTHER_NAMES.get(name) or ROWS_BY_NAME.get(name)
    if row is None:
        return ""
    options = " and ".join(f"--{option}" for option in row.options.split())
    remark = row.remark.replace("`", "")
    if not options:
        return f"It is an option of TRL; here: {remark}."
    return f"Here it is {options} ({remark})." if remark else f"Here it is {options}."
