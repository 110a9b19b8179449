"""Where the words of a prompt act in the image: cross-attention heat maps of any Stable Diffusion (DAAM).

    python recipes/attention_maps.py --out runs/attention_maps
    python recipes/attention_maps.py --pipeline stabilityai/stable-diffusion-2-base \
        --prompt "a red panda on a blue house" --word panda --word house --out runs/panda

Without --prompt the pipeline generates the drawings that it knows (mini lists its own). Their objects are on white, so
the pointing game can be played: is the hottest place of the object's words on the object?
"""

from mmhooks.studies.attention_maps.study import app

if __name__ == "__main__":
    app()
