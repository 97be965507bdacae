"""A look into a run and into a data set: `avppc probe` and `avppc check-sync`."""
