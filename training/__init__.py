"""Code of all trained methods: configuration, run folder, and the commands train, test and predict."""
