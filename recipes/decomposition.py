"""What attention heads of CLIP's image encoder say: the tables and pictures of the text-based decomposition.

Head texts of the last layers (TextSpan), how far they hold over other pictures, what the embedding loses without
components, top pictures and nearest neighbours by single heads, neurons through later heads, pictures in texts.

    python recipes/decomposition.py --out runs/decomposition
    python recipes/decomposition.py --model ViT-B-32 --pretrained openai --data coco --limit 5000 --pool imagenet
"""

from mmhooks.studies.decomposition.study import app

if __name__ == "__main__":
    app()
