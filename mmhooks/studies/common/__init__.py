"""What several studies share: encoding, heads, held-out pairs, claims, pages."""
