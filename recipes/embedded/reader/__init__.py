"""mini-reader: training, evaluation, report."""
