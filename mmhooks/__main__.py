"""``python -m mmhooks``: runs the command line when the ``mmhooks`` script is not on the path."""

from mmhooks.cli import app

if __name__ == "__main__":
    app(prog_name="mmhooks")
