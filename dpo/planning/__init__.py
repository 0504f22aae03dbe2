"""What a run will need, before anything is downloaded: memory by part, and operations, of one step without data."""
