"""What all trained methods share: configuration, run folder, and the commands train, test and predict."""
