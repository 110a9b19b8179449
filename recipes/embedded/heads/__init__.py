"""The heads of mini: trained, and what their dictionaries can reach."""
