"""A run that may be stopped at any moment: the trainer, its checkpoints, its log, what is restored and when."""
