"""Taking a spurious cue out of CLIP: attention heads that carry the background, ablated live.

Section 4 of "Interpreting CLIP's Image Representation via Text-Based Decomposition", on a Waterbirds-shaped task: land
and water animals before land and water. TextSpan names each attention head; those whose texts are places are set to
their mean. They are chosen on other pictures, of other animals, than they are judged on.

    python recipes/spurious.py --out runs/spurious
    python recipes/spurious.py --model ViT-L-14 --pretrained laion2b_s32b_b82k --data waterbirds/
"""

from mmhooks.studies.spurious.study import app

if __name__ == "__main__":
    app()
