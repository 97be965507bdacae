"""Batches decoded from videos when they are asked for, without packed shards."""
