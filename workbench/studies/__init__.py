"""Measurements: each file makes one or a few of the JSON files in assets/results."""
