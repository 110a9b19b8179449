"""Dual encoders of images and texts: open_clip's CLIP and its relatives."""

from mmhooks.models.clip.model import HookedCLIP

__all__ = ["HookedCLIP"]
