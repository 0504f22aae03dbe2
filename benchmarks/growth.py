"""How the cost of training grows: with the batch, with the length of its pairs, and with the number of pairs.

`python benchmarks/growth.py [--pairs 10000 100000 1000000]` writes benchmarks/results/growth.json and growth.md. A step
is that of the quickstart's model; starts are measured twice, on files that were never read and on the tokens that the
first start has stored. Every run is a process of its own; memory is the process's peak, resident, and without the pages
of mapped files, which the system takes back when it needs them.
"""

import argparse
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from training import QUICK, RESULTS, ROOT, Case, machine, measure, median_step, prepare

SMALL = Case(rows="quickstart", max_tokens=16_384, **QUICK)  # as configs/quickstart.yaml
GROWN = {
    "batch": lambda by: replace(SMALL, batch=8 * by),
    "length": lambda by: replace(SMALL, rows=f"made:{32 * by}", batch=8, max_length=2_048),
}
START = """
import sys, threading, time
from pathlib import Path
from training import most_resident
from dpo.cli.main import main

def sample():
    while True:
        status = Path("/proc/self/status").read_text()
        anonymous.append(int(status.split("RssAnon:")[1].split()[0]) * 1024)
        time.sleep(0.02)

anonymous = []
threading.Thread(target=sample, daemon=True).start()
code = main(sys.argv[1:])
print(most_resident("self"), max(anonymous))
sys.exit(code)
"""


def steps(by: int, case: Case) -> dict[str, float]:
    """Tokens per second and memory of one case."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, case, 6)
        found = measure("ours", folder, case, 6)
    tokens, seconds = found["tokens"], median_step(found)
    assert isinstance(tokens, list)
    return {
        "times": by,
        "tokens a step": statistics.mean(tokens),
        "tokens/s": statistics.mean(tokens) / seconds,
        "GB above the bare model": float(str(found["above_bare"])) / 1e9,
    }


def starts(count: int) -> dict[str, float]:
    """Seconds and memory of a run of one step on so many pairs, new and stored."""
    found: dict[str, float] = {"pairs": count}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, SMALL, 1)
        with gzip.open(folder / "data" / "rows" / "train.jsonl.gz", "wt", compresslevel=1) as file:
            for i in range(count):
                head = f"\n\nHuman: What is {i} and {i * 7 % 1_009}?\n\nAssistant:"
                row = {"chosen": f"{head} It is {i + i * 7 % 1_009}.", "rejected": f"{head} No idea."}
                file.write(json.dumps(row) + "\n")
        for name in ("new", "stored"):
            words = [
                "fit", "--name", name, "--trainer.default_root_dir", str(folder / "runs"), "--data.batch_size", "8",
                "--model.policy", str(folder / "model"), "--data.path", str(folder / "data"),
                "--trainer.max_steps", "1", "--data.val_fraction", "0",
                "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
            ]  # fmt: skip
            environment = os.environ | {"WANDB_MODE": "disabled", "DPO_CACHE": str(folder / "cache")}
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", START, *words],
                env=environment,
                cwd=ROOT / "benchmarks",
                stdout=subprocess.PIPE,
                text=True,
            )
            if done.returncode:
                sys.exit(f"the run on {count} pairs failed")
            found[f"{name}: s"] = time.perf_counter() - began
            peak, own = map(int, done.stdout.splitlines()[-1].split())
            found |= {f"{name}: GB": peak / 1e9, f"{name}: GB but of mapped files": own / 1e9}
    return found


def table(rows: list[dict[str, float]]) -> list[str]:
    """Markdown."""
    head = list(rows[0])
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return [*lines, *(f"| {' | '.join(f'{row[name]:,.4g}' for name in head)} |" for row in rows), ""]


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", type=int, default=[10**4, 10**5, 10**6])
    options = parser.parse_args()
    results = {name: [steps(by, case(by)) for by in (1, 2, 4, 8)] for name, case in GROWN.items()}
    results["pairs"] = [starts(count) for count in options.pairs]
    about = {"command": f"python benchmarks/growth.py {' '.join(sys.argv[1:])}".strip(), "machine": machine("cpu")}
    (RESULTS / "growth.json").write_text(json.dumps({**about, "results": results}, indent=2) + "\n")
    lines = ["# Growth", "", f"`{about['command']}`; {about['machine']}", ""]
    for name, rows in results.items():
        lines += [f"## {name}", "", *table(rows)]
    (RESULTS / "growth.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
