"""`python -m dpo losses`: every loss with its formula, parameters, source and its values on three known pairs.

Takes nothing; what it prints is read off the classes, and the values are computed.
"""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from inspect import cleandoc

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo.losses.base import PairLogps, PreferenceLoss, UnknownInitialLoss
from dpo.losses.divergences import Alpha, Divergence, ForwardKL, JensenShannon, ReverseKL
from dpo.losses.pairwise import DPO, EXO, IPO, ODPO, DiscoPOP, Hinge, LengthNormalizedDPO, RobustDPO
from dpo.losses.pointwise import AOT, BCO, NCA, SPPO, AOTUnpaired, APODown, APOZero
from dpo.losses.reference_free import CPO, NLL, ORPO, SimPO
from dpo.losses.wrappers import LD, WPO, Sum

EXAMPLE_LOSSES: tuple[PreferenceLoss, ...] = (
    *(DPO(), DPO(label_smoothing=0.1), ODPO(), RobustDPO(), IPO(), Hinge(), EXO(), DiscoPOP(), LengthNormalizedDPO()),
    *(NCA(), BCO(), SPPO(), APOZero(), APODown(), AOT(), AOTUnpaired()),
    *(SimPO(), CPO(), ORPO(), NLL()),
    *(Sum((DPO(), BCO(), NLL()), (0.8, 0.2, 1.0)), LD(DPO()), WPO(DPO())),
)
EXAMPLE_DIVERGENCES: tuple[Divergence, ...] = (ReverseKL(), ForwardKL(), JensenShannon(), Alpha())
# Summed log-probabilities, chosen then rejected, of three pairs whose log-ratios differ by h = 0, 10, 20 nats.
POLICY_LOGPS = (-0.5, -0.1, -10.0, -30.0, -1.0, -21.0)
REFERENCE_LOGPS = (-0.5, -0.1, -10.1, -20.1, -0.1, -0.1)
MIN_TABLE_WIDTH = 140


def example_pairs() -> PairLogps:
    """The pairs, without margins, with answers of one token that are as likely as what the policy draws."""
    policy, reference = torch.tensor(POLICY_LOGPS), torch.tensor(REFERENCE_LOGPS)
    return PairLogps(policy, reference, torch.zeros_like(policy), (1,) * len(policy))


def main(arguments: Sequence[str]) -> None:
    """Print the table of all losses: formula, parameters, source, values on three pairs."""
    argparse.ArgumentParser("python -m dpo losses", description=main.__doc__).parse_args(arguments)
    console = Console(width=max(Console().width, MIN_TABLE_WIDTH))
    console.print(loss_table("Losses (--model.loss)", [(loss, loss) for loss in EXAMPLE_LOSSES]))
    scores = [(DPO(divergence=divergence), divergence) for divergence in EXAMPLE_DIVERGENCES]
    console.print(loss_table("Divergences (--model.loss.divergence) of losses that take one; values with DPO", scores))
    console.print(
        "S: logistic sigmoid; lp: summed log-probability of an answer under the policy; D = lp - lp of the reference; "
        "|y|: tokens; w: chosen; l: rejected; h = D_w - D_l; b = beta; e = label_smoothing. "
        "Step 0: the loss of any pair while the policy equals the reference."
    )


def loss_table(title: str, rows: Sequence[tuple[PreferenceLoss, PreferenceLoss | Divergence]]) -> Table:
    """One row for each loss, described by what stands beside it."""
    lines = Table(title=title, show_lines=True)
    lines.add_column("name and parameters", max_width=36)
    lines.add_column("what, formula, source")
    for name in ("step 0", "h = 0", "h = 10", "h = 20"):
        lines.add_column(name, justify="right", no_wrap=True)
    for loss, shown in rows:
        values = [f"{value:.6f}" for value in loss(example_pairs()).tolist()]
        words = [_call(shown), "\n".join(docstring_paragraphs(type(shown)))]
        lines.add_row(*map(Text, words), _start(loss), *values)
    return lines


def docstring_paragraphs(loss: type) -> list[str]:
    """What a docstring says before its attributes: what it is, its formula and, for a loss, its source."""
    parts = cleandoc(loss.__doc__ or "").split("\n\n")
    return [" ".join(part.split()) for part in parts if not part.startswith("Attributes:")]


def _call(shown: PreferenceLoss | Divergence) -> str:
    values = [f"{each.name} = {shown.__dict__[each.name]}" for each in fields(shown)]  # type: ignore[arg-type]
    return "\n".join([type(shown).__name__, *(f"  {value}" for value in values)])


def _start(loss: PreferenceLoss) -> str:
    start = loss.initial_loss
    return "-" if isinstance(start, UnknownInitialLoss) else f"{start:.6f}"
