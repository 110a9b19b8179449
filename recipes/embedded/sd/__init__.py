"""mini-sd: choice of drawings, training, evaluation, shipping."""
