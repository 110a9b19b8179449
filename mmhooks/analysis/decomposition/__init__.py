"""What parts of CLIP contribute directly to an embedding, and how texts name them (seed 002)."""
