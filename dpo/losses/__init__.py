"""Preference losses: from the log-probabilities of chosen and rejected answers (`PairLogps`) to one value per pair.

Notation in the formulas: lp is an answer's summed log-probability under the policy, |y| its number of tokens, D is lp
minus lp of the reference, w chosen, l rejected, h = D_w - D_l, b = beta, e = label_smoothing, S the logistic sigmoid. A
larger beta keeps the policy closer to the reference. To add a loss, subclass `PreferenceLoss`.
"""

from dpo.losses.base import PairLogps, PreferenceLoss, UnknownInitialLoss
from dpo.losses.divergences import Alpha, Divergence, ForwardKL, JensenShannon, ReverseKL
from dpo.losses.pairwise import DPO, EXO, IPO, ODPO, DiscoPOP, Hinge, LengthNormalizedDPO, RobustDPO
from dpo.losses.pointwise import AOT, BCO, NCA, SPPO, AOTUnpaired, APODown, APOZero
from dpo.losses.reference_free import CPO, NLL, ORPO, SimPO
from dpo.losses.wrappers import LD, WPO, Sum

__all__ = [
    "AOT",
    "BCO",
    "CPO",
    "DPO",
    "EXO",
    "IPO",
    "LD",
    "NCA",
    "NLL",
    "ODPO",
    "ORPO",
    "SPPO",
    "WPO",
    "AOTUnpaired",
    "APODown",
    "APOZero",
    "Alpha",
    "DiscoPOP",
    "Divergence",
    "ForwardKL",
    "Hinge",
    "JensenShannon",
    "LengthNormalizedDPO",
    "PairLogps",
    "PreferenceLoss",
    "ReverseKL",
    "RobustDPO",
    "SimPO",
    "Sum",
    "UnknownInitialLoss",
]
