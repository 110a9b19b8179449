"""Text-to-image pipelines with a U-Net."""

from mmhooks.models.diffusion.model import HookedDiffusion, load_diffusion

__all__ = ["HookedDiffusion", "load_diffusion"]
