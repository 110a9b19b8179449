"""Where the words of a prompt act in the picture: cross-attention heat maps of any Stable Diffusion (DAAM).

    python recipes/attention_maps.py --out runs/attention_maps
    python recipes/attention_maps.py --pipeline stabilityai/stable-diffusion-2-base \
        --prompt "a red panda on a blue house" --word panda --word house --out runs/panda

Without --prompt the drawings that a pipeline knows are drawn (mini lists its own). Where pictures stand on white, as
mini's do, the pointing game is played: is the hottest place of the object's words on what was drawn?
"""

from mmhooks.studies.attention_maps.study import app

if __name__ == "__main__":
    app()
