"""Base models: where a name leads, loading in 4 bits, random weights of an exact architecture, its modules."""
