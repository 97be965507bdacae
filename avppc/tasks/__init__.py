"""The proxy tasks that pretrain an encoder."""
