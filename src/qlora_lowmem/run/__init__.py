"""A recipe made real: refused early, loaded, trained, told."""
