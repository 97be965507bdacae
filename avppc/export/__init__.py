"""The encoder for other programs: files in three formats with a model card, and embeddings of a data set."""
