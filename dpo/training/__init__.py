"""Training: its stages, what they measure, and what must hold before and while they run."""
