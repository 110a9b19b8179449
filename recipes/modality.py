"""Which features of CLIP belong to images, to texts, or to both: Section 2 of the paper, end to end.

Four models, CLIP, DeCLIP, CLIP+NCL and CLIP+SAE: Tables 1 and 2, the MDS histograms of Figure 1, top images and
texts of features of each group (Figures 2-4, Tables 3-5), and what masking a group does to retrieval.

    python recipes/modality.py --out runs/modality
    python recipes/modality.py --model ViT-B-32 --pretrained openai --declip declip.pth --data coco --limit 5000
"""

from mmhooks.studies.modality.study import app

if __name__ == "__main__":
    app()
