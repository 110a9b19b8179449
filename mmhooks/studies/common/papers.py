"""Papers whose settings studies take with ``--paper``, and the settings that several studies share."""

from __future__ import annotations

from mmhooks.studies.common.paper_settings import PaperSetting

MULTI_FACETED = "“The Multi-Faceted Monosemanticity in Multimodal Representations” (Yan et al., 2025)"
DECOMPOSITION = (
    "“Interpreting CLIP's Image Representation via Text-Based Decomposition” (Gandelsman et al., 2024)"
)
CC3M_SHARE = (
    "which images is not stated; here the 13,443 of 15,840 validation pairs that can still be fetched"
)


def clip_of_section_2() -> tuple[PaperSetting, ...]:
    """Returns the CLIP that Sections 2, 3.1 and 3.2 of the Multi-Faceted paper study."""
    return (
        PaperSetting("CLIP ViT-B-32", "Section 2", "model", "ViT-B-32"),
        PaperSetting("OpenAI's weights", "Section 2", "pretrained", "openai"),
    )


def heads_of_section_2() -> tuple[PaperSetting, ...]:
    """Returns the SAE that Sections 2 and 3.1 of the Multi-Faceted paper train."""
    return (
        PaperSetting(
            "one top-K SAE for both modalities", "Section 2.1, Equations 1 and 2", "sae", "train",
            "its training is not stated: our optimiser and epochs",
        ),
        PaperSetting("1,024 features", "Section 3.1", "features", 1024),
        PaperSetting("K active features", "Section 2.1, Equation 1", "k", 32, "32 is ours", stated=False),
    )  # fmt: skip


def clip_of_decomposition() -> tuple[PaperSetting, ...]:
    """Returns the largest CLIP that the decomposition paper shows in most of its tables."""
    note = "the paper also shows ViT-B-16 and ViT-H-14: give --model and --pretrained"
    return (
        PaperSetting("OpenCLIP ViT-L-14", "Section 3", "model", "ViT-L-14", note),
        PaperSetting("trained on LAION-2B", "Section 3", "pretrained", "laion2b_s32b_b82k"),
    )
