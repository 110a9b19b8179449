"""Which features carry "woman" and "man" in images and texts: case study 1 of the paper, and a bias audit.

Tables 6 and 7 and Figure 5, by prompt, centroid and probe, in both readings of the zero-masked classification, each
group compared with random sets of its size; then the same by skin tone and profession. Labels are binary because the
paper's are; they come from a drawing's name or a classifier and do not say who anybody is.

    python recipes/gender.py --out runs/gender
    python recipes/gender.py --model ViT-B-32 --pretrained openai --data cc3m --labels classifier --out runs/gender-cc3m
    python recipes/gender.py --model ViT-B-32 --pretrained openai --data people/ --labels column --label-column gender
"""

from mmhooks.studies.gender.study import app

if __name__ == "__main__":
    app()
