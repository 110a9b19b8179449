"""Sparse heads: the SAE family and the non-negative contrastive head, their training and their files."""

from mmhooks.heads.base import Head, load_head_dir
from mmhooks.heads.batchtopk import BatchTopKSAE
from mmhooks.heads.fidelity import Fidelity, fidelity
from mmhooks.heads.jumprelu import JumpReLUSAE
from mmhooks.heads.matryoshka import MatryoshkaSAE
from mmhooks.heads.ncl import NCL
from mmhooks.heads.relu import ReLUSAE
from mmhooks.heads.sae import SAE, TopKSAE
from mmhooks.heads.train import TrainResult, train_head

__all__ = [
    "NCL",
    "SAE",
    "BatchTopKSAE",
    "Fidelity",
    "Head",
    "JumpReLUSAE",
    "MatryoshkaSAE",
    "ReLUSAE",
    "TopKSAE",
    "TrainResult",
    "fidelity",
    "load_head_dir",
    "train_head",
]
