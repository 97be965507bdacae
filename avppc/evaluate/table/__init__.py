"""The proxy tasks compared: `avppc table`."""
