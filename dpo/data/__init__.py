"""Preference data, from files to the batches of an optimizer step: reading, tokenization, storage and sampling."""
