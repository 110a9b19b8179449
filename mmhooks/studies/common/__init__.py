"""Code shared by several studies: options, encoding, heads, held-out pairs, claims, results and pages."""
