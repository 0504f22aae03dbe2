"""A run and its files: folder, metrics, results, Hugging Face export, and upload to the hub."""
