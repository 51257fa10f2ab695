"""One module a kind of file: how to know it, how to read it, and the section that shows it."""
