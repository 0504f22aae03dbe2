"""What stands beside training in every run, one job a file."""
