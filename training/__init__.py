"""What trained methods share above the trainer: configuration, run folder; commands train, test, predict."""
