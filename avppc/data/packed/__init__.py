"""Packed data sets: shards on disk, and batches out of them."""
