"""Models: loading, adapters, scoring, shared prompts, generation, and the references a policy is compared with."""
