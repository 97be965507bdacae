"""Lip reading: `avppc evaluate`."""
