"""Data: from files, wherever they are, to the steps of an optimizer."""
