"""Peaks that others measured on real cards, and the programs that reproduce them."""
