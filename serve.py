"""`python serve.py`: a page and an API where a trained policy and its reference answer; see `--help`."""

import sys
from argparse import ArgumentParser

EPILOG = "A key in the environment variable DPO_API_KEY is asked of every client; hosts beyond this machine need one."


def parser() -> ArgumentParser:
    """The options; their defaults are in `dpo.serving.server.Options`."""
    made = ArgumentParser("serve.py", description="Serve a trained policy beside its reference.", epilog=EPILOG)
    made.add_argument("--model", help="folder or hub id of the policy (runs/latest/export)")
    made.add_argument("--reference", help="folder or hub id of the reference (what the run was trained against)")
    made.add_argument("--demo", action="store_true", help="serve the shipped run of the built-in example")
    made.add_argument("--host", help="address to listen at (127.0.0.1)")
    made.add_argument("--port", type=int, help="port to listen at (8000)")
    made.add_argument("--device", help="cpu, cuda, cuda:1, mps or auto (auto)")
    made.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of weights and cache (float32)")
    made.add_argument("--max-concurrency", type=int, help="requests answered at a time, others get 429 (64)")
    made.add_argument("--max-context", type=int, help="most tokens of prompt and answer (the model's, at most 4096)")
    return made


def main(words: list[str]) -> int:
    """Serve; 0 stopped, 1 refused with a message, 130 interrupted."""
    given = {name: value for name, value in vars(parser().parse_args(words)).items() if value is not None}
    from dpo.serving.server import Options, serve  # after --help, which must not wait for torch

    try:
        serve(Options(**given))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
