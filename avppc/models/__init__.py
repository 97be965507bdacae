"""Encoders of what is seen and heard, and what turns their features into embeddings and words."""
