"""``python -m mmhooks.cli``: the command without its script."""

from mmhooks.cli import app

app()
