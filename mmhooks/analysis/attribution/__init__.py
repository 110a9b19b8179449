"""Where in an image a text is: saliency, attention maps, and their scores on masks."""
