"""mini-llava: examples, tokenizer, training, evaluation, shipping."""
