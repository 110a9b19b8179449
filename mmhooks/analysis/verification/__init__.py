"""Whether a hooked model is what it claims to be: hooks change nothing, sites add up, weights give the published numbers."""
