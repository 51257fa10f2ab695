"""`python -m qlora_lowmem.report.page`."""
