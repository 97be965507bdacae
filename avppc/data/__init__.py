"""Data: videos in, packed shards, batches of clips out."""
