"""The table of `python -m dpo losses`: every loss with its formula, parameters, source and values on three pairs.

Formulas and sources come from the docstrings and parameters from the fields, so the table cannot disagree with the
code; the values are computed.
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
    """Return the three pairs, without margins: answers of one token, as likely as what the policy itself samples."""
    policy = torch.tensor(POLICY_LOGPS)
    return PairLogps(policy, torch.tensor(REFERENCE_LOGPS), torch.zeros_like(policy), (1,) * len(policy))


def main(arguments: Sequence[str]) -> None:
    """Print the table of all losses: formula, parameters, source, values on three pairs."""
    argparse.ArgumentParser("python -m dpo losses", description=main.__doc__).parse_args(arguments)
    console = Console(width=max(Console().width, MIN_TABLE_WIDTH))
    console.print(loss_table("Losses (--model.loss)", [(loss, loss) for loss in EXAMPLE_LOSSES]))
    rows = [(DPO(divergence=divergence), divergence) for divergence in EXAMPLE_DIVERGENCES]
    console.print(loss_table("Divergences (--model.loss.divergence) of losses that take one; values with DPO", rows))
    console.print(
        "S: logistic sigmoid; lp: summed log-probability of an answer under the policy; D = lp - lp of the reference; "
        "|y|: tokens; w: chosen; l: rejected; h = D_w - D_l; b = beta; e = label_smoothing. "
        "Step 0: the loss of any pair while the policy equals the reference."
    )


def loss_table(title: str, rows: Sequence[tuple[PreferenceLoss, PreferenceLoss | Divergence]]) -> Table:
    """Return a table with one row for each loss.

    Args:
        title: Title of the table.
        rows: The loss whose values are shown, and the object that is described beside them.
    """
    table = Table(title=title, show_lines=True)
    table.add_column("name and parameters", max_width=36)
    table.add_column("what, formula, source")
    for name in ("step 0", "h = 0", "h = 10", "h = 20"):
        table.add_column(name, justify="right", no_wrap=True)
    for loss, described in rows:
        values = [f"{value:.6f}" for value in loss(example_pairs()).tolist()]
        description = "\n".join(docstring_paragraphs(type(described)))
        table.add_row(Text(_name_and_parameters(described)), Text(description), _initial_loss(loss), *values)
    return table


def docstring_paragraphs(loss: type) -> list[str]:
    """Return the paragraphs of a docstring before its sections: what it is, its formula and, for a loss, its source."""
    paragraphs = cleandoc(loss.__doc__ or "").split("\n\n")
    return [" ".join(text.split()) for text in paragraphs if not text.startswith(("Attributes:", "Example:"))]


def _name_and_parameters(described: PreferenceLoss | Divergence) -> str:
    names = [option.name for option in fields(described)]  # type: ignore[arg-type]
    return "\n".join([type(described).__name__, *(f"  {name} = {described.__dict__[name]}" for name in names)])


def _initial_loss(loss: PreferenceLoss) -> str:
    initial = loss.initial_loss
    return "-" if isinstance(initial, UnknownInitialLoss) else f"{initial:.6f}"
