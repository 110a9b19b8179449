"""mini-sd: training, evaluation, shipping."""
