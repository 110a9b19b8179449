"""Reads SAEs of EleutherAI's sparsify (``cfg.json``, ``sae.safetensors``) without it; checked against 1.3."""

from __future__ import annotations

from pathlib import Path

from mmhooks.errors import MMHooksError
from mmhooks.heads.formats import transcoders
from mmhooks.heads.formats.affine import Affine, Options, read_json, read_tensors, take_tensors
from mmhooks.heads.sae.base import SAE
from mmhooks.heads.transcoder import Transcoder

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def read(path: Path, options: Options) -> SAE | Transcoder:
    """A sparse coder of sparsify: TopK over ``ReLU((x - b_dec) W^T + b)``, or a transcoder, also with a skip connection.

    Raises:
        MMHooksError: an autoencoder with a skip connection, or groupmax, which are not supported.
    """
    cfg, where = read_json(path / CONFIG), path / WEIGHTS
    for fault, words in (
        (
            cfg.get("skip_connection") and not cfg.get("transcode"),
            "a skip connection of an autoencoder bypasses the features",
        ),
        (cfg.get("activation", "topk") != "topk", f"activation {cfg.get('activation')!r} is not topk"),
    ):
        if fault:
            raise MMHooksError(
                f"{path / CONFIG}: expected a TopK autoencoder or transcoder of sparsify; {words}"
            )
    if cfg.get("transcode"):
        return transcoders.read_sparsify(cfg, read_tensors(where), options, where)
    names = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_pre": "b_dec"}
    affine = Affine.of(take_tensors(read_tensors(where), names, where), where)
    k = options.k or cfg.get("k", 32)  # sparsify's own default
    return affine.build("topk", where=where, source="sparsify", options=options, about=cfg, k=k)
