"""Preference losses: log-probabilities of chosen and rejected answers -> one value per pair.

Takes `PairLogps`, gives a loss per pair. Notation of the formulas: lp is an answer's summed log-probability under the
policy, |y| its number of tokens, D = lp - lp of the reference, w chosen, l rejected, h = D_w - D_l, b = beta,
e = label_smoothing, S the logistic sigmoid. Larger beta holds the policy nearer to the reference. A new loss is a new
final class.
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
