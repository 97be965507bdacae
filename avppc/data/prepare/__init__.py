"""The commands that list videos and pack them: `avppc index` and `avppc prepare`."""
