"""The verb ``doctor``: what of this machine would stop or slow a long run, each with its cure."""

import os
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fcntl import LOCK_EX, flock
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from tempfile import TemporaryFile, gettempdir

import torch
from huggingface_hub import parse_local_safetensors_file_metadata
from packaging.requirements import Requirement

from dpo.cli.verify_resume import parse_fit_options
from dpo.data.datamodule import cache_folder
from dpo.files import describe_os_error
from dpo.runs.inventory import find_model_folder

HELP = (
    "usage: dpo doctor [options of fit]: what would stop (then the exit code is 1) or slow a long run on this machine"
)
GIB = 2**30
LEAST_FREE = 2 * GIB  # of disk and of shared memory
LEAST_FILES = 1024
CHECKPOINTS = 4  # last.ckpt, the generation before, best.ckpt, and the one that is being written
OK, WARNING, ERROR = "ok", "warning", "error"
Finding = tuple[str, str, str]  # how bad it is (OK, WARNING or ERROR), what was found, and what to do


@dataclass(frozen=True)
class RunNeeds:
    """What a run needs, as far as its options say: where it is, its policy, and sizes in bytes (0: unknown)."""

    root: Path = Path("runs")
    policy: str = ""
    checkpoint: int = 0  # weights that train, and the moments of Adam, in float32
    weights: int = 0  # all weights in float32


def find_needs(fit_options: Sequence[str]) -> RunNeeds:
    """Return what a fit with these options needs."""
    options = parse_fit_options(fit_options)
    model = options.model.init_args
    folder = find_model_folder(model.policy)
    files = map(parse_local_safetensors_file_metadata, folder.glob("*.safetensors") if folder else ())
    weights = 4 * sum(sum(file.parameter_count.values()) for file in files)
    trains_all = "LoRA" not in str(getattr(model.adapter, "class_path", ""))  # an adapter's checkpoints are small
    return RunNeeds(Path(options.trainer.default_root_dir), str(model.policy), 3 * weights * trains_all, weights)


def judge(is_bad: bool, text: str, cure: str, level: str = WARNING) -> Finding:
    """Return what was found: all right, or bad at this level, with its cure."""
    return (level, text, cure) if is_bad else (OK, text, "")


def check_disks(needs: RunNeeds) -> Iterator[Finding]:
    """Yield whether the folders can be written to, lock files, and have room."""
    needed = CHECKPOINTS * needs.checkpoint + needs.weights
    folders = {"--trainer.default_root_dir": needs.root, "DPO_CACHE": cache_folder(), "TMPDIR": Path(gettempdir())}
    for option, folder in folders.items():
        existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.is_dir())
        try:
            with TemporaryFile(dir=existing) as file:
                flock(file, LOCK_EX)
        except OSError as error:
            yield ERROR, f"{folder}: {describe_os_error(error)}", f"Choose another folder with {option}."
            continue
        free, least = shutil.disk_usage(existing).free, needed if folder == needs.root else 0
        text = f"{folder}: {free / GIB:,.1f} GiB free" + f", about {least / GIB:,.1f} needed" * bool(least)
        cure = f"Free some space, or choose another folder with {option}."
        yield judge(free < max(least, LEAST_FREE), text, cure, ERROR if free < least else WARNING)


def check_limits(needs: RunNeeds) -> Iterator[Finding]:
    """Yield what the system allows a process: open files, size of a file, shared memory."""
    files, size = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE))
    yield judge(0 <= files < LEAST_FILES, f"open files: {_limit(files)}", "Raise it with `ulimit -n 65536`.")
    level = ERROR if size < needs.checkpoint else WARNING
    yield judge(size >= 0, f"bytes of a file: {_limit(size)}", "Raise it with `ulimit -f unlimited`.", level)
    shared = Path("/dev/shm")
    free = shutil.disk_usage(shared).free if shared.is_dir() else LEAST_FREE
    cure = "Start the container with --shm-size=8g; NCCL and --data.num_workers use it."
    yield judge(free < LEAST_FREE, f"shared memory: {free / GIB:,.1f} GiB free", cure)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,} at most"


def check_versions(_: RunNeeds) -> Iterator[Finding]:
    """Yield the packages that are missing or outside the versions that are declared."""
    try:
        declared = list(map(Requirement, requires("dpo-lightning") or []))
    except PackageNotFoundError:
        yield WARNING, "versions: dpo-lightning is not installed", "Install it with `pip install -e .`."
        return
    yield OK, f"versions: torch {torch.__version__}, and {len(declared) - 1} more packages", ""
    for each in declared:
        cure = f"Install it with `pip install '{each.name}{each.specifier}'`."
        try:
            found = version(each.name)
        except PackageNotFoundError:
            if each.marker is None or each.marker.evaluate({"extra": ""}):
                yield ERROR, f"{each.name} is not installed", cure
            continue
        if not each.specifier.contains(found, prereleases=True):
            yield WARNING, f"{each.name} {found}: {each.specifier} is declared, others are untested", cure


def check_processor(_: RunNeeds) -> Iterator[Finding]:
    """Yield whether threads fit the cores, and what else computes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("OMP_NUM_THREADS", "unset")
    idle = given == "1" and cores > 1 and not torch.cuda.is_available()
    cure = f"Set it to {cores} divided by the processes that train: more threads wait for each other, fewer idle."
    yield judge(idle or (given.isdigit() and int(given) > cores), f"OMP_NUM_THREADS {given}, {cores} cores", cure)
    load = os.getloadavg()[0]
    yield judge(load > cores, f"load {load:.1f}", "End what else computes, or accept a slower run.")


def check_memory(needs: RunNeeds) -> Iterator[Finding]:
    """Yield whether memory is enough where the CPU trains; only Linux says how much there is."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.is_file() else []
    needed = 0 if torch.cuda.is_available() else needs.checkpoint + 2 * needs.weights  # gradients, and the reference
    cure = "Train an adapter (--model.adapter LoRA) or a smaller policy if the run ends by lack of memory."
    for free in (1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")):
        yield judge(free < needed, f"memory: {free / GIB:,.1f} GiB free, about {needed / GIB:,.1f} for weights", cure)


def check_cuda(_: RunNeeds) -> Iterator[Finding]:
    """Yield whether torch can use the GPUs that there are, and whether they are free."""
    is_unused = not torch.cuda.is_available() and shutil.which("nvidia-smi") is not None
    cure = "There is an NVIDIA driver: install a build of torch for its version of CUDA, or a newer driver."
    yield judge(is_unused, f"CUDA: {torch.cuda.device_count()} devices", cure)
    for index in range(torch.cuda.device_count()):
        (major, minor), name = torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index)
        built = [arch for arch in torch.cuda.get_arch_list() if arch.startswith(f"sm_{major}")]
        yield judge(not built, f"{name}: sm_{major}{minor}", "Install a build of torch for this GPU.", ERROR)
        free, total = torch.cuda.mem_get_info(index)
        cure = "End what else uses it (nvidia-smi lists it), or choose another with CUDA_VISIBLE_DEVICES."
        yield judge(free < 0.9 * total, f"{name}: {free / GIB:,.1f} of {total / GIB:,.1f} GiB free", cure)


def check_network(needs: RunNeeds) -> Iterator[Finding]:
    """Yield what is fetched from or sent to other machines, and whether the clock can be right."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}
    is_missing = bool(needs.policy) and find_model_folder(needs.policy) is None
    text = f"hub: {'offline (HF_HUB_OFFLINE)' if offline else 'online'}{f', {needs.policy} is not here' * is_missing}"
    cure = "Fetch it with `hf download` where there is a network, with HF_HUB_DOWNLOAD_TIMEOUT=60 if that is slow."
    yield judge(is_missing, text, cure, ERROR if offline else WARNING)
    yield OK, f"W&B: {os.environ.get('WANDB_MODE') or 'online if you are logged in, otherwise offline'}", ""
    cure = "Set it: secure connections fail, and files seem to be of the future."
    yield judge(time.time() < Path(__file__).stat().st_mtime, f"clock: {time.ctime(time.time())}", cure)


def main(arguments: Sequence[str]) -> None:
    """Print a line for everything that was looked at.

    Raises:
        SystemExit: Something would stop a run, or the options cannot be used.
    """
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return
    needs = find_needs(arguments) if arguments else RunNeeds()
    checks = (check_disks, check_limits, check_versions, check_processor, check_memory, check_cuda, check_network)
    findings = [finding for check in checks for finding in check(needs)]
    for level, text, cure in findings:
        print(f"{level:<8} {text}{f'. {cure}' if cure else ''}")
    if ERROR in {level for level, _, _ in findings}:
        raise SystemExit(1)
