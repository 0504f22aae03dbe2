"""The command line: training, and everything that `python -m dpo` does."""
