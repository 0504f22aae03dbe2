"""Models: reading, scoring, sharing prompts, writing answers, and what a policy is compared with."""
