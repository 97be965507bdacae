"""One HTML page about a run: `avppc report`."""
