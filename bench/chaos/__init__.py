"""A training run that is killed again and again, and started again each time."""
