"""The statements that guided the set-up, each put to the test: `pytest bench/test_claims.py`."""
