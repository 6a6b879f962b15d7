"""Inputs checked against each other, memory and time estimated before a run starts."""
