"""Encoders of images or videos alone: timm's, transformers' and torchvision's."""

from mmhooks.models.vision.model import HookedVision

__all__ = ["HookedVision"]
