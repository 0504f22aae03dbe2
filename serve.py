"""`python serve.py`: the server is not built yet."""

import sys

if __name__ == "__main__":
    sys.exit("The server is not built yet. A trained run loads with transformers from runs/<name>/export.")
