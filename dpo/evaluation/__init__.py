"""Reward benchmarks: a policy's implicit reward as judge of given answers, beside simpler judges."""
