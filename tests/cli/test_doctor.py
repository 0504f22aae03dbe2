"""`python -m dpo doctor`: what of the machine would stop or slow a long run."""

import os
import resource
import shutil
from collections import namedtuple
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo.__main__ import main as dpo
from dpo.cli import doctor
from dpo.cli.doctor import ERROR, GIB, OK, WARNING, Finding, RunNeeds
from tests.support.data import cache as cache  # every test has an empty cache of its own
from tests.support.runs import Lab, policy

Usage = namedtuple("Usage", "total used free")


def found(findings: object, words: str) -> Finding:
    """The one finding whose text holds these words."""
    (one,) = [finding for finding in findings if words in finding[1]]  # type: ignore[attr-defined]
    return one


def test_a_line_for_everything_and_no_error_on_a_machine_that_trains(capsys: pytest.CaptureFixture[str]) -> None:
    assert dpo(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} <= {OK, WARNING}
    for word in ("runs:", "open files:", "shared memory:", "versions:", "OMP_NUM_THREADS", "memory:", "CUDA:", "hub:"):
        assert [line for line in lines if word in line], word
    assert dpo(["doctor", "--help"]) == 0


def test_with_the_options_of_a_fit_the_run_must_have_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["dpo"])
    words = Lab(tmp_path).words("doctor")
    assert dpo(words) == 0
    capsys.readouterr()
    weights = 4 * sum(tensor.numel() for tensor in load_file(policy() / "model.safetensors").values())
    needs = doctor.find_needs(words[1:])
    assert needs == RunNeeds(tmp_path, str(policy()), 3 * weights, weights)
    assert doctor.find_needs([*words[1:], "--model.adapter=LoRA"]).checkpoint == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 4 * needs.checkpoint))
    with pytest.raises(SystemExit) as end:
        dpo(words)
    assert end.value.code == 1
    error = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(ERROR))
    assert str(tmp_path) in error
    assert "Free some space" in error
    with pytest.raises(SystemExit):
        dpo([*words, "--data.batch_size=0"])


def test_disks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needs = RunNeeds(tmp_path / "new" / "runs", "a", checkpoint=2 * GIB, weights=GIB)
    for free, level in ((10 * GIB, OK), (8 * GIB, ERROR), (GIB, ERROR)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(0, 0, free))
        assert found(doctor.check_disks(needs), str(needs.root))[0] == level
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, GIB))
    assert found(doctor.check_disks(RunNeeds(needs.root)), str(needs.root))[0] == WARNING

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(doctor, "TemporaryFile", refuse)
    assert {level for level, _, _ in doctor.check_disks(needs)} == {ERROR}


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: 256, resource.RLIMIT_FSIZE: 2 * GIB}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], -1))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, GIB // 16))  # what docker gives
    assert [level for level, _, _ in doctor.check_limits(RunNeeds())] == [WARNING] * 3
    assert [level for level, _, _ in doctor.check_limits(RunNeeds(checkpoint=3 * GIB))] == [WARNING, ERROR, WARNING]
    limits.update({resource.RLIMIT_NOFILE: resource.RLIM_INFINITY, resource.RLIMIT_FSIZE: resource.RLIM_INFINITY})
    assert [level for level, _, _ in doctor.check_limits(RunNeeds(checkpoint=GIB))] == [OK, OK, WARNING]


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"torch": "2.13.0+cpu", "rich": "13.9", "peft": "0.10"}

    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    declared = ["torch>=2.11", "rich>=14", "wandb>=0.28", 'peft>=0.20; extra == "lora"', 'pytest; extra == "test"']
    monkeypatch.setattr(doctor, "requires", lambda _: declared)
    monkeypatch.setattr(doctor, "version", version)
    levels = [(level, text.split()[0]) for level, text, _ in doctor.check_versions(RunNeeds())]
    assert levels == [(OK, "versions:"), (WARNING, "rich"), (ERROR, "wandb"), (WARNING, "peft")]


@pytest.mark.parametrize(("threads", "level"), [(None, OK), ("4", OK), ("5", WARNING), ("1", WARNING), ("2", OK)])
def test_threads(monkeypatch: pytest.MonkeyPatch, threads: str | None, level: str) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(os, "getloadavg", lambda: (5.0, 0.0, 0.0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if threads:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert [each for each, _, _ in doctor.check_processor(RunNeeds())] == [level, WARNING]


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for has_gpu, level in ((False, WARNING), (True, OK)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        assert [each for each, _, _ in doctor.check_memory(RunNeeds(weights=10**15))] == [level]


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    assert [level for level, _, _ in doctor.check_cuda(RunNeeds())] == [WARNING]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "old")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (4 * GIB, 8 * GIB))
    assert [level for level, _, _ in doctor.check_cuda(RunNeeds())] == [OK, ERROR, WARNING]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8 * GIB, 8 * GIB))
    assert [level for level, _, _ in doctor.check_cuda(RunNeeds())] == [OK, OK, OK]


def test_a_policy_that_cannot_be_fetched_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = RunNeeds(policy="nobody/has-this")
    for offline, level in (("1", ERROR), ("0", WARNING)):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        assert found(doctor.check_network(needs), "hub:")[0] == level
    assert found(doctor.check_network(RunNeeds(policy="quickstart")), "hub:")[0] == OK


def test_a_clock_that_stands_in_the_past(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(doctor.check_network(RunNeeds()), "clock:")[0] == OK
    monkeypatch.setattr(doctor.time, "time", lambda: 0.0)
    assert found(doctor.check_network(RunNeeds()), "clock:")[0] == WARNING
