"""Where the time of a training step goes: `python benchmarks/where.py [--cases real-float32 real-bf16]`.

Runs the steps of `benchmarks/training.py` under torch's profiler, layers not compiled so that every operation has its
name, and adds up what each kind of operation took itself. Writes benchmarks/results/where.md.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

import lightning as L
from torch.profiler import ProfilerActivity, profile
from training import CASES, RESULTS, machine, prepare, run_ours

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product", "aten::cat", "aten::split"),
    "softmax and log-probabilities": (
        "aten::_softmax",
        "aten::max",
        "aten::gather",
        "aten::scatter_add_",
        "_TokenLogps",
    ),
    "optimizer and gradient norm": ("aten::_fused_adamw_", "Optimizer", "aten::linalg_vector_norm"),
    "copies and changes of type": ("aten::copy_", "aten::fill_", "aten::_to_copy"),
    "element by element": ("aten::",),
    "everything else": ("",),
}
FIRST, LAST = 3, 5  # the steps that are counted
TABLE: list[str] = []


class Count(L.Callback):
    """Profiles some steps."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        """Begin."""
        if trainer.global_step == FIRST - 1:
            self.profile = profile(activities=[ProfilerActivity.CPU])
            self.profile.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        """End, and add up."""
        if trainer.global_step != LAST:
            return
        self.profile.__exit__(None, None, None)
        took = Counter[str]()
        for event in self.profile.key_averages():
            kind = next(kind for kind, names in KINDS.items() if event.key.startswith(names))
            took[kind] += event.self_cpu_time_total
        for kind, time in took.most_common():
            TABLE.append(f"| {kind} | {time / (LAST - FIRST + 1) / 1e3:,.0f} | {time / took.total():.0%} |")


def main() -> None:
    """Profile and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["real-float32", "real-bf16"])
    lines = ["# Where the time of a step goes", "", f"`python benchmarks/where.py`; {machine('cpu')}", ""]
    for name in parser.parse_args().cases:
        with tempfile.TemporaryDirectory() as scratch:
            prepare(Path(scratch), CASES[name], LAST)
            words = ("--model.compile", "false", "--trainer.callbacks", "where.Count")
            run_ours(Path(scratch), CASES[name], LAST, *words)
        lines += [f"## {name}", "", "| | ms a step | |", "|---|---|---|", *TABLE, ""]
        TABLE.clear()
    (RESULTS / "where.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    sys.modules["where"] = sys.modules["__main__"]  # the command line imports the callback by this name
    main()
