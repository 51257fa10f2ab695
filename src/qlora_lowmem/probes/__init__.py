"""Recipes run on virtual cards to answer one question: does it fit, how far does it reach, what would help."""
