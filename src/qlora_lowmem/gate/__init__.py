"""Budgets on GPU memory as tests: cases, their verdicts, and the pytest plugin."""
