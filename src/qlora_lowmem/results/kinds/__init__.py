"""One kind of result a file."""
