"""Charts of memory, one small family a module: each function draws plain data in a `Style` and returns a figure."""
