"""A look into a run and into a data set: `avppc diagnose` and `avppc check-sync`."""
