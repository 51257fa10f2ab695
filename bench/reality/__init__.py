"""Fine-tuning peaks that others published, and the plan's figure for the same job: `pytest bench/test_reality.py`."""
