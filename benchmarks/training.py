"""A DPO step of this project against TRL 1.16, in alternation, and against the floor of its arithmetic.

`python benchmarks/training.py [--device cuda] [--cases real-float32 ...] [--rounds 3] [--steps 8]` (extra `peers`; real
rows where DPO_HH_RLHF names a folder) adds to benchmarks/results/training.json and training.md. Every side is a process
of its own: the same model, pairs, order, optimizer, batch and maximum length. Ratios of one round are comparable,
absolute figures are the machine's.

- `ours`: compiled layers and fused AdamW, as in configs/cpu.yaml; `ours-cached`: with `Cached`; `ours-plain`: without
  sharing of prompts, every answer a sequence of its own.
- `ours-512` and `ours-whole`: micro-batches of at most 512 tokens, and whole steps, not of the case's `max_tokens`.
- `ours-eager`: not compiled; `ours-recomputed`: with gradient checkpointing; `ours-unfused`: AdamW not fused.
- `trl`: TRL as it comes; `trl-best`: no gradient checkpointing, reference precomputed, on CUDA also FlashAttention and
  Liger where they are installed. (Grouping by length would change the order, and so the loss that is compared.)

The floor is the time of the matrix products that cannot be avoided: distinct tokens through the backbone forward,
backward (twice) and forward in the reference, answer positions through the head as often; at the rate of plain products
of these shapes, measured in the same run. Memory is the peak beyond the interpreter, one set of weights, its gradients
and two moments.
"""

import argparse
import gzip
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.benchmark import Timer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))
WARM = 2  # steps that are not counted
OURS: dict[str, tuple[str, ...]] = {
    "ours": (),
    "ours-cached": ("--model.reference", "Cached"),
    "ours-plain": ("--model.sharing", "false"),
    "ours-eager": ("--model.compile", "false"),
    "ours-512": ("--data.max_tokens", "512"),
    "ours-whole": ("--data.max_tokens", "16384"),
    "ours-recomputed": ("--model.gradient_checkpointing", "true"),
    "ours-unfused": ("--optimizer.fused", "false"),
}
SIDES = ("ours", "ours-cached", "ours-plain", "trl", "trl-best")  # unless others are asked for
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16 products a second, dense, as their makers say
AGAIN = ("settings-bf16", "batch64-cached-bf16")  # cases that are others with other sides: only where asked for
Row = tuple[str, str]


@dataclass(frozen=True)
class Case:
    """What is measured: a Llama of this size, these rows, this batch."""

    rows: str = "real"
    precision: str = "float32"
    vocabulary: int = 16_384
    width: int = 512
    inner: int = 1_408
    layers: int = 8
    batch: int = 8
    max_length: int = 512
    max_tokens: int = 1_024  # of a micro-batch of ours, as in configs/cpu.yaml
    device: str = "cpu"

    @property
    def weights(self) -> tuple[int, int]:
        """Parameters of all layers and of the head."""
        return self.layers * (4 * self.width**2 + 3 * self.width * self.inner), self.width * self.vocabulary


QUICK = {"vocabulary": 1_280, "width": 128, "inner": 384, "layers": 4, "batch": 32, "max_length": 256}
GPU = {"precision": "bf16", "vocabulary": 151_936, "max_tokens": 16_384, "device": "cuda"}
HALF, LARGE = {"width": 896, "inner": 4_864, "layers": 24}, {"width": 1_536, "inner": 8_960, "layers": 28}
CASES = {
    "real-float32": Case(),
    "real-bf16": Case(precision="bf16"),
    "real-128k-float32": Case(vocabulary=131_072),
    "settings-bf16": Case(precision="bf16"),
    "long-prompts-bf16": Case(rows="long", max_length=1_152, precision="bf16"),
    "long-answers-bf16": Case(rows="short", max_length=512, precision="bf16"),
    "batch64-bf16": Case(batch=64, precision="bf16"),
    "batch64-cached-bf16": Case(batch=64, precision="bf16"),
    "quickstart-float32": Case(rows="quickstart", max_tokens=16_384, **QUICK),
    "0.5B-512": Case(batch=32, **HALF, **GPU),
    "0.5B-2048": Case(batch=32, max_length=2_048, **HALF, **GPU),
    "1.5B-512": Case(batch=32, **LARGE, **GPU),
    "1.5B-2048": Case(batch=32, max_length=2_048, **LARGE, **GPU),
}


def real_rows() -> Iterator[Row]:
    """Rows of hh-rlhf from all its subsets in turn, whole pairs only."""
    from dpo.data.dialogue import DialoguePair, parse_pair

    folder = os.environ.get("DPO_HH_RLHF")
    if not folder:
        sys.exit("DPO_HH_RLHF names no folder with hh-rlhf's layout; choose --cases without real rows.")
    subsets = [
        gzip.decompress(file.read_bytes()).splitlines() for file in sorted(Path(folder).glob("*/train.jsonl.gz"))
    ]
    for line in chain.from_iterable(zip(*subsets, strict=False)):
        row = json.loads(line)
        if isinstance(parse_pair(row["chosen"], row["rejected"]), DialoguePair):
            yield row["chosen"], row["rejected"]


def made_rows(prompt: int, answer: int) -> Iterator[Row]:
    """Rows of about so many tokens: words that are one token each."""
    for number in range(10_000):
        words = [" alpha", " beta", " gamma", " delta"]
        head = "\n\nHuman:" + "".join(words[(number + i * i) % 4] for i in range(prompt)) + "\n\nAssistant:"
        yield (
            head + "".join(words[(number + i) % 4] for i in range(answer)),
            head + "".join(words[(number + 3 * i + 1) % 4] for i in range(answer)),
        )


def rows_of(kind: str, count: int) -> list[Row]:
    """Rows of a kind; `made:40` are prompts of about 40 tokens with answers of 20."""
    from dpo import quickstart

    if kind.startswith("made:"):
        tokens = int(kind.removeprefix("made:"))
        return list(islice(made_rows(tokens, tokens // 2), count))
    sources: dict[str, Callable[[], Iterator[Row]]] = {
        "real": real_rows,
        "long": lambda: made_rows(1_016, 63),
        "short": lambda: made_rows(9, 255),
        "quickstart": lambda: quickstart.draw_rows(1, count),
    }
    return list(islice(sources[kind](), count))


def prepare(folder: Path, case: Case, steps: int) -> None:
    """Write tokenizer, random weights, and rows that need no cut: each side would cut them in its own way."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = min(case.vocabulary, 16_384)
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator((text for row in rows_of(case.rows, 1_500) for text in row), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "model")
    rows = (row for row in rows_of(case.rows, 4 * case.batch * steps) if longest(tokenizer, row) < case.max_length)
    data = folder / "data" / "rows"
    data.mkdir(parents=True)
    with gzip.open(data / "train.jsonl.gz", "wt", encoding="utf-8") as file:
        for chosen, rejected in islice(rows, case.batch * steps):
            file.write(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=case.vocabulary, hidden_size=case.width, intermediate_size=case.inner, num_hidden_layers=case.layers,
        num_attention_heads=case.width // 64 or 2, max_position_embeddings=2_048, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")


def longest(tokenizer: PreTrainedTokenizerFast, row: Row) -> int:
    """Tokens of the longer side."""
    return max(map(len, tokenizer(list(row)).input_ids)) + 1  # the end of sequence


def run_ours(folder: Path, case: Case, steps: int, *more: str) -> dict[str, object]:
    """Train through the command line; times as it logs them."""
    from dpo.cli.main import main
    from dpo.runs.loggers import read_metrics
    from dpo.training import precomputed

    name = f"run-{time.time_ns()}"
    words = [
        "fit", "--name", name, "--trainer.default_root_dir", str(folder / "runs"),
        "--model.policy", str(folder / "model"), "--data.path", str(folder / "data"),
        "--data.shuffle", "false", "--data.val_fraction", "0",
        "--data.batch_size", str(case.batch), "--data.max_length", str(case.max_length),
        "--data.max_tokens", str(case.max_tokens), "--optimizer.lr", "1e-5",
        "--optimizer.fused", "true", "--trainer.max_steps", str(steps), "--trainer.log_every_n_steps", "1",
        "--trainer.accelerator", case.device, "--trainer.enable_progress_bar", "false", "--model.compile", "true",
        "--trainer.precision", "bf16-mixed" if case.precision == "bf16" else "32-true",
        *more,
    ]  # fmt: skip
    passes: list[float] = []
    compute = precomputed.score_rows_into_file

    def timed(*arguments: Any) -> None:
        compute(*arguments)  # compiles
        began = time.perf_counter()
        compute(*arguments)
        passes.append(time.perf_counter() - began)

    precomputed.score_rows_into_file = timed
    if code := main(words):
        sys.exit(code)
    rows = read_metrics(folder / "runs" / name / "metrics.csv")[WARM:]
    times = [float(row["train/time/step"]) for row in rows]
    rates = [float(row["train/tokens_per_second"]) for row in rows]
    lengths = [float(row["train/length/chosen"]) + float(row["train/length/rejected"]) for row in rows]
    return {
        "seconds": times,
        "tokens": [rate * seconds for rate, seconds in zip(rates, times, strict=True)],
        "scored": [length * case.batch for length in lengths],
        "loss": float(rows[-1]["train/loss"]),
        "waited": statistics.median(float(row["train/time/data"]) for row in rows),
        "cache_pass": passes,
    }


def wait_for(device: str) -> None:
    """Wait until a device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def run_trl(folder: Path, case: Case, steps: int, best: bool) -> dict[str, object]:
    """Train with TRL's defaults, or with its best settings here: no checkpointing, precomputed reference."""
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Clock(TrainerCallback):
        """When every step began and ended."""

        seconds: list[float] = []  # noqa: RUF012

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            wait_for(case.device)  # otherwise the clock stops before the optimizer has finished
            self.seconds.append(time.perf_counter() - self.began)

    mark = "\n\nAssistant:"
    with gzip.open(folder / "data" / "rows" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file]
    ends = [pair["chosen"].rindex(mark) + len(mark) for pair in pairs]
    data = [
        {"prompt": pair["chosen"][:end], "chosen": pair["chosen"][end:], "rejected": pair["rejected"][end:]}
        for pair, end in zip(pairs, ends, strict=True)
    ]
    settings: dict[str, object] = {}
    if best:
        settings = {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
        if case.device == "cuda" and importlib.util.find_spec("liger_kernel"):
            settings["use_liger_kernel"] = True
        if case.device == "cuda" and importlib.util.find_spec("flash_attn"):
            settings["model_init_kwargs"] = {"attn_implementation": "flash_attention_2"}
    config = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=case.batch,
        max_length=case.max_length,
        max_steps=steps,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        use_cpu=case.device == "cpu",
        bf16=case.precision == "bf16",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    clock = Clock()
    trainer = DPOTrainer(
        model=str(folder / "model"), args=config, train_dataset=Dataset.from_list(data), callbacks=[clock],
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )  # fmt: skip
    collate, tokens = trainer.data_collator, []

    def counted(rows: list[Any]) -> Any:
        batch = collate(rows)
        tokens.append(batch["input_ids"].numel())
        return batch

    trainer.data_collator = counted
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": clock.seconds[WARM:], "loss": losses[-1], "tokens": tokens[-steps:][WARM:]}


def side(name: str, folder: Path, case: Case, steps: int) -> None:
    """One side in this process; its figures on the last line."""
    import trl  # noqa: F401  # every side has imported everything that any side needs

    import dpo.cli.main  # noqa: F401

    before = resident()
    found = (
        run_ours(folder, case, steps, *OURS[name])
        if name in OURS
        else run_trl(folder, case, steps, best=name == "trl-best")
    )
    peak = most_resident("self") - before
    if case.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
    bare = 16 * (sum(case.weights) + case.width * case.vocabulary)  # weights, gradients, two moments, in float32
    print("\n" + json.dumps({**found, "above_bare": peak - bare}))


def most_resident(process: object) -> int:
    """Most bytes of a process in memory so far; `ru_maxrss` would begin with those of its parent."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(name: str, folder: Path, case: Case, steps: int) -> dict[str, object] | None:
    """Run one side as a process; return None if the device has too little memory for it."""
    command = [sys.executable, __file__, "--side", name, "--folder", str(folder)]
    command += ["--case", json.dumps(asdict(case)), "--steps", str(steps)]
    environment = os.environ | {"WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1", "DPO_CACHE": str(folder / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode and "out of memory" in done.stderr:
        return None
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def floor_seconds(case: Case, tokens: float, scored: float, reference: bool) -> float:
    """Time of the unavoidable matrix products of one step, on this machine now."""
    kind = torch.bfloat16 if case.precision == "bf16" else torch.float32

    def product(n: int, k: int, m: int) -> float:
        a, b = (torch.randn(shape, dtype=kind, device=case.device) for shape in ((n, k), (k, m)))
        names = {"torch": torch, "a": a, "b": b, "c": torch.empty(n, m, dtype=kind, device=case.device)}
        return Timer("torch.mm(a, b, out=c)", globals=names, num_threads=torch.get_num_threads()).timeit(3).mean

    def passes(n: int, k: int, m: int) -> float:  # forward, gradient of the input, gradient of the weight, reference
        return product(n, k, m) * (1 + reference) + product(n, m, k) + product(k, n, m)

    t, s, d, i = round(tokens), round(scored), case.width, case.inner
    layer = 4 * passes(t, d, d) + 2 * passes(t, d, i) + passes(t, i, d)
    return case.layers * layer + passes(s, d, case.vocabulary)


def run_case(name: str, rounds: int, steps: int, sides: list[str]) -> dict[str, object]:
    """All sides of a case, in alternation; the floor measured in every round."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder, case, steps)
        found: dict[str, list[dict[str, object]]] = {each: [] for each in sides}
        floors = []
        for number in range(rounds):
            for each in list(found):
                result = measure(each, folder, case, steps)
                if result is None:
                    print(f"{name} round {number + 1}: {each} is out of memory", flush=True)
                    del found[each]
                    continue
                found[each].append(result)
                print(f"{name} round {number + 1}: {each} {median_step(found[each][-1]):.3f} s/step", flush=True)
            if "ours" not in found:
                sys.exit(f"{name}: ours is out of memory, and all others are compared with it")
            ours = found["ours"][-1]
            floors.append(floor_seconds(case, mean(ours["tokens"]), mean(ours["scored"]), reference=True))
            print(f"{name} round {number + 1}: floor {floors[-1]:.3f} s/step", flush=True)
    return summary(case, found, floors) | {each: "out of memory" for each in sides if each not in found}


def mean(values: object) -> float:
    """Of a list of numbers out of JSON."""
    assert isinstance(values, list)
    return statistics.mean(values)


def median_step(result: dict[str, object]) -> float:
    """Seconds of a side's median step."""
    seconds = result["seconds"]
    assert isinstance(seconds, list)
    return statistics.median(seconds)


def spread(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def summary(case: Case, found: dict[str, list[dict[str, object]]], floors: list[float]) -> dict[str, object]:
    """Ratios round by round."""
    ours = found["ours"]
    steps = [median_step(result) for result in ours]
    table: dict[str, object] = {
        "pairs/s": spread([case.batch / step for step in steps]),
        "tokens/s": spread([mean(result["tokens"]) / step for result, step in zip(ours, steps, strict=True)]),
        "floor / measured": spread([floor / step for floor, step in zip(floors, steps, strict=True)]),
        "share of time waiting for data": spread([float(str(result["waited"])) for result in ours]),
    }
    if passes := [mean(result["cache_pass"]) for result in found.get("ours-cached", ()) if result["cache_pass"]]:
        rate = len(ours[0]["seconds"]) + WARM  # type: ignore[arg-type]  # steps whose pairs one pass goes through
        table["pairs/s of the cache pass / of training"] = spread([rate * steps[0] / seconds for seconds in passes])
    peak = next((value for name, value in PEAKS.items() if name in device_name(case.device)), None)
    if peak:
        layers, head = case.weights
        work = 8 * (layers * mean(ours[-1]["tokens"]) + head * mean(ours[-1]["scored"]))  # 2 forward, 4 backward, 2 ref
        table["MFU on distinct tokens"] = spread([work / step / peak for step in steps])
    for each, results in found.items():
        above = max(float(str(result["above_bare"])) for result in results)
        table[f"memory of {each}, GB above the bare model"] = above / 1e9
        if each != "ours":
            table[f"{each} / ours, time"] = spread([median_step(r) / s for r, s in zip(results, steps, strict=True)])
            table[f"{each} / ours, loss - 1"] = float(str(results[-1]["loss"])) / float(str(ours[-1]["loss"])) - 1
        if each not in OURS:  # ours count the distinct tokens, whatever they compute
            table[f"{each} / ours, tokens computed"] = mean(results[-1]["tokens"]) / mean(ours[-1]["tokens"])
    if {"ours-cached", "trl-best"} <= found.keys():
        both = zip(found["trl-best"], found["ours-cached"], strict=True)
        table["trl-best / ours-cached, time"] = spread([median_step(a) / median_step(b) for a, b in both])
    return table


def device_name(device: str) -> str:
    """The processor's own name."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def machine(device: str) -> str:
    """Where and when this was measured."""
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("torch", "transformers", "lightning", "trl"))
    threads = f"{torch.get_num_threads()} threads, Python {platform.python_version()}"
    return f"{device_name(device)}, {threads}, {versions}, {date.today()}"


def markdown(results: dict[str, dict[str, object]]) -> str:
    """One table per case."""

    def cell(value: object) -> str:
        if isinstance(value, str):
            return value
        if isinstance(value, dict):
            return f"{value['median']:.3g} ({value['least']:.3g} to {value['most']:.3g})"
        return f"{value:.2g}"

    lines = [
        "# Training, against TRL",
        "",
        "Median (range over rounds); what each line means: `benchmarks/training.py`.",
    ]
    for case, table in results.items():
        lines += ["", f"## {case}", "", f"`{table['command']}`; {table['machine']}", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {cell(value)} |" for name, value in table.items() if name not in ("command", "machine")]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure what was asked for and store it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", nargs="+", choices=CASES)
    parser.add_argument("--sides", nargs="+", choices=[*OURS, "trl", "trl-best"], default=list(SIDES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps <= WARM:
        parser.error(f"--steps: expected more than the {WARM} that are not counted, got {options.steps}")
    if "ours" not in options.sides:
        parser.error("--sides: expected ours among them, as all others are compared with it")
    if options.side:
        side(options.side, options.folder, Case(**json.loads(options.case)), options.steps)
        return
    RESULTS.mkdir(exist_ok=True)
    stored = RESULTS / "training.json"
    results = json.loads(stored.read_text()) if stored.exists() else {}
    every = [name for name, case in CASES.items() if case.device == options.device and name not in AGAIN]
    for name in options.cases or every:
        command = f"python benchmarks/training.py {' '.join(sys.argv[1:])}"
        about = {"command": command, "machine": machine(CASES[name].device)}
        results[name] = {**about, **run_case(name, options.rounds, options.steps, options.sides)}
        stored.write_text(json.dumps(results, indent=2) + "\n")
        (RESULTS / "training.md").write_text(markdown(results))
    print((RESULTS / "training.md").read_text())


if __name__ == "__main__":
    main()
