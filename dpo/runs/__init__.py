"""A run and what it leaves: its folder, checkpoints, metrics, results and the Hugging Face folder."""
