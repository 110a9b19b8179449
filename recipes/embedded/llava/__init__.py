"""mini-llava: training, evaluation, shipping."""
