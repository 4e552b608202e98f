"""Residency as pictures: a live heat map in the terminal, and a report in one HTML file."""
