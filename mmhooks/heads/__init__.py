"""Sparse heads: the SAE family and the non-negative contrastive head, their training and their files."""

from mmhooks.heads.base import Head, load_head_dir
from mmhooks.heads.fidelity import Fidelity, fidelity
from mmhooks.heads.ncl import NCL
from mmhooks.heads.sae import TopKSAE
from mmhooks.heads.train import TrainResult, train_head

__all__ = ["NCL", "Fidelity", "Head", "TopKSAE", "TrainResult", "fidelity", "load_head_dir", "train_head"]
