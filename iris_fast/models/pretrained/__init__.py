"""Janus model folders in both layouts: open and write."""
