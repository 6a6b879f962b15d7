"""Janus checkpoint folders in both layouts: open and write."""
