"""Lightning callbacks of every run, one job a file; `defaults` says which verb gets which."""
