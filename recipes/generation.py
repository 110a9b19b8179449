"""Interpolation by modality in Stable Diffusion (Section 3.3 of the paper, Figures 7 and 8), with numbers.

Features of the conditioner that belong to images (ImgD), texts (TextD) or both (CrossD) are moved toward a
reference image while a prompt is drawn. The paper's claim: TextD moves the concept and keeps the structure; ImgD
and CrossD break it.

    python recipes/generation.py --out runs/generation
    python recipes/generation.py --pipeline stabilityai/stable-diffusion-2-base --model ViT-H-14 \\
        --pretrained laion2b_s32b_b79k --data coco --limit 5000
    python recipes/generation.py --pipeline fusing/stable-unclip-2-1-l --model ViT-L-14 --pretrained openai \\
        --data coco --limit 5000
"""

from mmhooks.studies.generation.study import app

if __name__ == "__main__":
    app()
