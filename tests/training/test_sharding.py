"""Training with weights that are spread over processes (gloo, CPU) equals training in one process."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml

from dpo import losses
from dpo.cli.main import main
from dpo.data.prompts import Prompts
from dpo.losses import PairLogps, PreferenceLoss
from dpo.models.batch import Example, collate
from dpo.models.scoring import score
from dpo.training.dpo import DPO
from dpo.training.sharding import FSDP2, check_sharding_options
from dpo.training.trainer_checks import check_trainer_support
from tests.support.launch import run_in_processes
from tests.support.models import make_tiny_model
from tests.support.runs import pairs, policy

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = sorted((ROOT / "configs" / "strategies").glob("*.yaml"))
LAYERS = 2
UNITS = LAYERS + 1  # layers, and what is left of the model
TOLERANCE = 1e-6  # relative to the largest gradient, weight or log-probability
# Norms and means: sums of float32 values in another order.
METRIC_TOLERANCE = 3e-6
TIME = ("time/", "_per_second")


def case(name: str, family: str = "llama", tied: bool = False, **options: Any) -> dict[str, Any]:
    """Return a case of 20 training pairs in steps of 8, 8 and 4, cut into micro-batches of at most 60 tokens."""
    folder = policy(family, num_hidden_layers=LAYERS, tie_word_embeddings=tied)
    model = {"policy": str(folder), **options.pop("model", {})}
    data = {"path": str(pairs()), "batch_size": 8, "max_length": 128, "max_tokens": 60}
    return {"name": name, "model": model, "data": data, **options}


def in_processes(count: int, cases: list[dict[str, Any]], folder: Path, strategy: Any) -> dict[str, dict[str, Any]]:
    """Train the cases with a strategy; the names of their files say in how many processes."""
    spread = {"devices": count, "strategy": strategy} if count > 1 else {}
    named = [{**each, "name": f"{each['name']}-{count}", **spread} for each in cases]
    found = run_in_processes(count, named, folder)
    return {name.rpartition("-")[0]: result for name, result in found.items()}


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Return the largest difference between tensors of the same names, relative to the largest number."""
    assert first.keys() == second.keys()
    largest = max(value.abs().max() for value in first.values())
    return max(((first[name] - second[name]).abs().max() / largest).item() for name in first)


def require_equal(one: dict[str, Any], many: dict[str, Any]) -> None:
    """Compare metrics, gradients, weights and predictions of two runs."""
    assert len(one["logged"]) == len(many["logged"]) >= 3
    for row, other in zip(one["logged"], many["logged"], strict=True):
        for name in [name for name in row if not any(word in name for word in TIME)]:
            assert abs(row[name] - other[name]) <= METRIC_TOLERANCE * max(1, abs(row[name])), name
    assert len(one["gradients"]) == len(many["gradients"]) == 3
    for gradient, other in zip(one["gradients"], many["gradients"], strict=True):
        assert largest_difference(gradient, other) <= TOLERANCE
    assert largest_difference(one["weights"], many["weights"]) <= TOLERANCE
    assert one["predictions"].keys() == many["predictions"].keys()
    for name, row in one["predictions"].items():
        torch.testing.assert_close(
            torch.tensor(many["predictions"][name]["logps"]), torch.tensor(row["logps"]), rtol=TOLERANCE, atol=0
        )


FIRST = [
    case("plain", predict=True, fused=True),
    case("separate", "bloom", tied=True, model={"gradient_checkpointing": True}),
    case("lora", model={"adapter": "lora"}),
]
OTHERS = [
    case("tied", tied=True, trainer={"accumulate_grad_batches": 2}),
    case("sft", stage="sft", predict=True),
    case("cached", model={"reference": "cached"}),
    case("moving", model={"reference": "moving"}),
    case("simpo", model={"loss": "simpo", "gradient_checkpointing": True}),
    case("gemma2", "gemma2", predict=True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharding")


def continued(folder: Path, other: int) -> list[dict[str, Any]]:
    """Return runs that go on from checkpoints: of another number of processes, and without taking a step."""
    return [
        case("on", resume=str(folder / f"plain-{other}.ckpt"), fused=True, trainer={"max_steps": 5}),
        case("still", resume=str(folder / "plain-2.ckpt"), fused=True),
        case("still_lora", resume=str(folder / "lora-1.ckpt"), model={"adapter": "lora"}),
    ]


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, dict[str, Any]]:
    return in_processes(1, FIRST, folder, "auto")


@pytest.fixture(scope="module")
def two(folder: Path, one: Any) -> dict[str, dict[str, Any]]:
    return in_processes(2, [*FIRST, *continued(folder, 1)], folder, {})


@pytest.fixture(scope="module")
def one_continued(folder: Path, two: Any) -> dict[str, dict[str, Any]]:
    return in_processes(1, continued(folder, 2), folder, "auto")


@pytest.mark.parametrize("name", [each["name"] for each in FIRST])
def test_two_processes_with_spread_weights_train_as_one_does(one: Any, two: Any, name: str) -> None:
    require_equal(one[name], two[name])


def test_weights_are_gathered_and_gradients_reduced_once_a_micro_batch(two: Any) -> None:
    # Prompts are shared: one forward pass of policy and reference each, and one backward pass.
    steps = list(zip(two["plain"]["collectives"], two["plain"]["micro_batches"], strict=True))
    assert max(count for _, count in steps) > 1
    for collectives, micro_batches in steps:
        assert collectives["gather"] == 3 * UNITS * micro_batches
        assert collectives["reduce_scatter"] == UNITS * micro_batches


def test_a_run_goes_on_in_another_number_of_processes(two: Any, one_continued: Any) -> None:
    """From one process to two and from two to one: the same pairs, and steps that differ by rounding only."""
    first, second = one_continued["on"], two["on"]
    assert len(first["gradients"]) == len(second["gradients"]) == 2
    for gradient, other in zip(first["gradients"], second["gradients"], strict=True):
        assert largest_difference(gradient, other) <= TOLERANCE
    assert largest_difference(first["weights"], second["weights"]) <= TOLERANCE


@pytest.mark.parametrize("name", ["still", "still_lora"])
def test_the_export_is_byte_for_byte_that_of_one_process(one_continued: Any, folder: Path, name: str) -> None:
    """No step is taken after loading, so that the weights are the same."""
    files = [sorted((folder / f"{name}-{count}").iterdir()) for count in (1, 2)]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    for ours, theirs in zip(*files, strict=True):
        assert ours.read_bytes() == theirs.read_bytes(), ours.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "strategy"),
    [(2, {"reduce_once": True, "cpu_offload": True}), (2, {}), (2, "ddp")],
    ids=["reduce-once-offload", "fsdp2", "ddp"],
)
def test_every_choice_trains_as_one_process_does(tmp_path: Path, count: int, strategy: Any) -> None:
    alone = in_processes(1, OTHERS, tmp_path, "auto")
    together = in_processes(count, OTHERS, tmp_path, strategy)
    for name, result in alone.items():
        require_equal(result, together[name])
        if isinstance(strategy, dict) and strategy.get("reduce_once"):
            assert {each["reduce_scatter"] for each in together[name]["collectives"]} == {UNITS}


@pytest.mark.slow
def test_replicas_of_spread_models_reduce_over_each_other_once_a_step(tmp_path: Path, one: Any) -> None:
    four = in_processes(4, FIRST, tmp_path, {"replicas": 2})
    for name, result in one.items():
        require_equal(result, four[name])
    for collectives, micro_batches in zip(four["plain"]["collectives"], four["plain"]["micro_batches"], strict=True):
        assert collectives["reduce_scatter"] == UNITS * micro_batches
        assert collectives["all_reduce"] == UNITS


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_fillers_change_no_score(family: str) -> None:
    """Behind the examples of a batch they change nothing; alone they have no score, but a gradient of zero."""
    model = make_tiny_model(family)
    examples = [Example(str(i), [3, 4, 5 + i], ([6, 7, 8 + i], [9, 10])) for i in range(2)]
    filler = Example("filler", [3], ([4], [5]))
    logps, padded = (score(model, collate(examples, fillers)).logps for fillers in ([], [filler] * 3))
    torch.testing.assert_close(padded, logps, rtol=1e-5, atol=1e-6)
    batch = collate([], [filler])
    assert len(batch) == 0
    score(model, batch).logps.sum().backward()
    gradients = [p.grad for p in model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("loss", [losses.DPO(), losses.IPO(), losses.SimPO(), losses.ORPO(), losses.BCO()])
def test_a_loss_of_no_pairs_is_empty(loss: PreferenceLoss) -> None:
    values = torch.randn(3, requires_grad=True)
    nothing = torch.zeros(0)
    result = loss(PairLogps(values[:0], nothing, nothing, (), nothing))
    assert result.shape == (0,)
    result.sum().backward()
    assert values.grad is not None and not values.grad.any()


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"replicas: expected 1 or more, got 0"):
        FSDP2(replicas=0)
    trainer = L.Trainer(accelerator="cpu", logger=False, strategy="fsdp2", devices=2)
    assert isinstance(trainer.strategy, FSDP2)
    check_trainer_support(trainer)
    uneven = L.Trainer(accelerator="cpu", logger=False, strategy=FSDP2(replicas=3), devices=2)
    with pytest.raises(ValueError, match="a divisor of the number of devices 2, got 3"):
        uneven.strategy.setup_environment()


@pytest.mark.parametrize(
    ("module", "precision", "named"),
    [
        (DPO(compile=True), "32-true", "--model.compile true"),
        (DPO(), "16-mixed", "--trainer.precision 16-mixed"),
    ],
)
def test_what_is_not_exact_is_refused_by_name(module: DPO, precision: Any, named: str) -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, strategy="fsdp2", devices=2)
    trainer.strategy.precision_plugin.precision = precision  # type: ignore[misc]
    with pytest.raises(ValueError, match=f"strategy fsdp2: expected a run without {named}"):
        check_sharding_options(trainer, module, None)
    alone = L.Trainer(accelerator="cpu", logger=False)
    check_sharding_options(alone, module, None)


def test_answers_to_prompts_are_refused() -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, strategy="fsdp2", devices=2)
    with pytest.raises(ValueError, match="expected a run without --data Prompts"):
        check_sharding_options(trainer, DPO(), Prompts("quickstart"))


@pytest.mark.parametrize(
    "overlay", sorted((ROOT / "configs" / "strategies").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_overlay_of_a_strategy_is_understood(overlay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart = str(ROOT / "configs" / "quickstart.yaml")
    with pytest.raises(SystemExit) as end:
        main(["fit", "--config", quickstart, "--config", str(overlay), "--print_config"])
    assert end.value.code in (0, None)
    found = yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]
    given = yaml.safe_load(overlay.read_text())["trainer"]["strategy"]
    if isinstance(given, str):
        assert found == given
    else:
        assert found["class_path"] == "dpo.training.sharding.FSDP2"
        assert found["init_args"].items() >= given["init_args"].items()
