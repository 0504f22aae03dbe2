"""`python serve.py`: a page and an API where a trained policy and its reference answer; see `--help`."""

import sys
from argparse import ArgumentParser

EPILOG = "A key in the environment variable DPO_API_KEY is asked of every client; hosts beyond this machine need one."


def parser() -> ArgumentParser:
    """The options, their defaults and what they mean."""
    made = ArgumentParser("serve.py", description="Serve a trained policy beside its reference.", epilog=EPILOG)
    add, types = made.add_argument, ["float32", "bfloat16", "float16"]
    policy = made.add_mutually_exclusive_group()
    policy.add_argument("--model", help="folder or hub id of the policy (runs/latest/export)")
    policy.add_argument("--demo", action="store_true", help="serve the shipped run of the built-in example")
    add("--reference", help="folder or hub id of the reference (what the run was trained against)")
    add("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    add("--port", default=8000, type=int, help="port to listen at (%(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (%(default)s)")
    add("--dtype", default="float32", choices=types, help="of weights and cache (%(default)s)")
    add("--max-concurrency", default=64, type=int, help="requests answered at a time, others get 429 (%(default)s)")
    add("--max-context", type=int, help="most tokens of prompt and answer (the model's, at most 4096)")
    return made


def main(words: list[str]) -> int:
    """Serve; 0 stopped, 1 refused with a message, 130 interrupted."""
    options = parser().parse_args(words)
    from dpo.serving.server import serve  # after --help, which must not wait for torch

    try:
        serve(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
