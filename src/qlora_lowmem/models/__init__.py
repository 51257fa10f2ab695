"""Base models: where a model's name leads, loading it in 4 bits, random weights of an exact architecture, its modules."""
