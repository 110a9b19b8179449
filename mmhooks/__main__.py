"""``python -m mmhooks``: the command where its script is not on the path."""

from mmhooks.cli import app

if __name__ == "__main__":
    app(prog_name="mmhooks")
