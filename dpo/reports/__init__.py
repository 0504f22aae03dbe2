"""The report of a run: what it learned, in words, numbers and pictures, on one page that needs no network."""
