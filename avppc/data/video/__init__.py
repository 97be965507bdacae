"""One video: what it is, its pictures and sound on one clock, the mouth in it."""
