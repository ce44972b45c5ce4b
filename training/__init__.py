"""Trained methods, above the trainer: configuration, run folder; commands train, test and predict."""
