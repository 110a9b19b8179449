"""mini-reader: words, stem, training, evaluation, report."""
