"""The heads of mini: training, and the FVU that their dictionaries allow."""
