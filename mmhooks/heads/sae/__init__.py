"""Sparse autoencoders: the base class, and one module per activation function."""

from mmhooks.heads.sae.archetypal import ArchetypalSAE
from mmhooks.heads.sae.base import SAE
from mmhooks.heads.sae.batchtopk import BatchTopKSAE
from mmhooks.heads.sae.gated import GatedSAE
from mmhooks.heads.sae.jumprelu import JumpReLUSAE
from mmhooks.heads.sae.matching_pursuit import MatchingPursuitSAE
from mmhooks.heads.sae.matryoshka import MatryoshkaSAE
from mmhooks.heads.sae.relu import ReLUSAE
from mmhooks.heads.sae.topk import TopKSAE

__all__ = [
    "SAE",
    "ArchetypalSAE",
    "BatchTopKSAE",
    "GatedSAE",
    "JumpReLUSAE",
    "MatchingPursuitSAE",
    "MatryoshkaSAE",
    "ReLUSAE",
    "TopKSAE",
]
