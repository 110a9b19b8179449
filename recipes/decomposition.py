"""Attention heads of CLIP's image encoder described by texts: tables and images of the text-based decomposition.

Texts of the last layers' heads (TextSpan) and their stability over other images, accuracy without components, top
images and nearest neighbours by single heads, neurons through later heads, images as sparse sums of texts.

    python recipes/decomposition.py --out runs/decomposition
    python recipes/decomposition.py --model ViT-B-32 --pretrained openai --data coco --limit 5000 --pool imagenet
"""

from mmhooks.studies.decomposition.study import app

if __name__ == "__main__":
    app()
