"""Command-line options of the server: `python serve.py`, or the verb `serve`.

The server itself is imported only once the options are parsed, so that `--help` does not wait for torch.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

DESCRIPTION = "Serve a trained policy beside its reference, as a web page and an API."
EPILOG = (
    "If the environment variable DPO_API_KEY is set, every client must send its value as a key. "
    "A key is required for a --host that other machines can reach."
)


def parse_options(arguments: Sequence[str]) -> Namespace:
    """Parse the options of the server.

    Returns:
        The options by name. `--demo` is already replaced by the `model` that it stands for.
    """
    parser = ArgumentParser("dpo serve", description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    policy = parser.add_mutually_exclusive_group()
    policy.add_argument("--model", help="folder or hub id of the policy (runs/latest/export)")
    policy.add_argument("--demo", action="store_true", help="serve the trained example that is shipped")
    add("--reference", help="folder or hub id of the reference (the one the policy was trained against)")
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", default=8000, type=int, help="port to listen on, 0 for any free one (%(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (%(default)s)")
    dtypes = ["float32", "bfloat16", "float16"]
    add("--dtype", choices=dtypes, help="type of weights and cache (bfloat16 on CUDA, else float32)")
    add("--cache-gib", type=float, metavar="GIB", help="cache of each model (by its size and free memory)")
    add(
        "--max-concurrency",
        metavar="N",
        default=64,
        type=int,
        help="requests at a time, more get status 429 (%(default)s)",
    )
    add(
        "--max-context",
        metavar="N",
        type=int,
        help="most tokens of prompt and answer (what the models allow, at most 4096)",
    )
    options = parser.parse_args(arguments)
    if options.demo:
        from dpo.quickstart import TRAINED_RUN

        options.model = str(TRAINED_RUN / "export")
    return options


def main(arguments: Sequence[str]) -> None:
    """Serve until a signal ends the process.

    Raises:
        ValueError: The server cannot start with these options; the message says what to change.
    """
    options = parse_options(arguments)
    from dpo.serving.server import serve

    serve(options)
