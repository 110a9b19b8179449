"""Removing a spurious cue from CLIP: attention heads that carry the background, mean-ablated live.

Section 4 of "Interpreting CLIP's Image Representation via Text-Based Decomposition", on a Waterbirds-like task: land
and water animals on land and water. TextSpan describes each attention head; those whose texts are places are set to
their mean. They are chosen on other images, of other animals, than they are evaluated on.

    python recipes/spurious.py --out runs/spurious
    python recipes/spurious.py --model ViT-L-14 --pretrained laion2b_s32b_b82k --data waterbirds/
"""

from mmhooks.studies.spurious.study import app

if __name__ == "__main__":
    app()
