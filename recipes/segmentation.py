"""Zero-shot segmentation by the tokens' contributions along a class's text, against four attention baselines.

Section 5 of "Interpreting CLIP's Image Representation via Text-Based Decomposition". By default on drawings with exact
masks, on photograph-like and patterned backgrounds; or on ImageNet-Segmentation's own file, or a folder.

    python recipes/segmentation.py --out runs/segmentation
    python recipes/segmentation.py --model ViT-B-16 --pretrained laion2b_s34b_b88k --data gtsegs_ijcv.mat
"""

from mmhooks.studies.segmentation.study import app

if __name__ == "__main__":
    app()
