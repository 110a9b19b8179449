"""Sparse heads: SAEs and the non-negative contrastive head, their training and file formats."""

from mmhooks.heads.base import Head, load_head_dir
from mmhooks.heads.crosscoder import Crosscoder
from mmhooks.heads.ncl import NCL
from mmhooks.heads.reconstruction import Reconstruction, prediction, reconstruction
from mmhooks.heads.sae.archetypal import ArchetypalSAE
from mmhooks.heads.sae.base import SAE
from mmhooks.heads.sae.batchtopk import BatchTopKSAE
from mmhooks.heads.sae.gated import GatedSAE
from mmhooks.heads.sae.jumprelu import JumpReLUSAE
from mmhooks.heads.sae.matching_pursuit import MatchingPursuitSAE
from mmhooks.heads.sae.matryoshka import MatryoshkaSAE
from mmhooks.heads.sae.relu import ReLUSAE
from mmhooks.heads.sae.topk import TopKSAE
from mmhooks.heads.training.train import HeadJob, TrainResult, train_head, train_heads
from mmhooks.heads.transcoder import Transcoder

__all__ = [
    "NCL",
    "SAE",
    "ArchetypalSAE",
    "BatchTopKSAE",
    "Crosscoder",
    "GatedSAE",
    "Head",
    "HeadJob",
    "JumpReLUSAE",
    "MatchingPursuitSAE",
    "MatryoshkaSAE",
    "ReLUSAE",
    "Reconstruction",
    "TopKSAE",
    "TrainResult",
    "Transcoder",
    "load_head_dir",
    "prediction",
    "reconstruction",
    "train_head",
    "train_heads",
]
