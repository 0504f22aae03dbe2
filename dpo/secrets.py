"""Secrets in addresses, options and the environment, which are never stored, logged or printed.

An address is kept as anybody may see it, with ``***`` for its password, and `reveal_address` gives the password back
where the address is opened. The passwords of a command line are kept in the environment, where the processes that it
starts find them.
"""

import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

MASK = "***"
PASSWORD_VARIABLE = "DPO_PASSWORD"
SECRET_VARIABLE_PATTERN = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
MIN_SECRET_LENGTH = 16  # characters; shorter values of variables may be ordinary words
_PIECES_VARIABLE = "DPO_CONCEALED"  # JSON: pieces of addresses as they may be seen -> as they are
_SECRET_WORD = r"(?:key|token|secret|passw(?:or)?d|credentials?)"
_SECRET_OPTION = re.compile(rf"(?:.*[._-])?(?:api)?{_SECRET_WORD}", re.IGNORECASE)
_INLINE_SECRET = re.compile(rf"{_SECRET_WORD}['\"]?\s*[:=]", re.IGNORECASE)
# user:password@host, a token in place of the user, and parameters of an address that are named like a secret
_ADDRESS_SECRETS = (
    re.compile(r"(?P<before>://[^/?#\s'\":@]*:)(?P<secret>[^/?#\s'\"]+)(?P<after>@[^/?#\s'\"]*)"),
    re.compile(r"(?P<before>://)(?P<secret>[^/?#\s'\":@]{16,})(?P<after>@[^/?#\s'\"]*)"),
    re.compile(
        rf"(?P<before>[?&][^=&#\s]*(?:{_SECRET_WORD}|sig(?:nature)?)=)(?P<secret>[^&#\s'\"]+)(?P<after>)", re.IGNORECASE
    ),
)


def conceal(text: str) -> str:
    """Return a text without the secrets of addresses, and without values of variables that are named like a secret."""
    for pattern in _ADDRESS_SECRETS:
        text = pattern.sub(rf"\g<before>{MASK}\g<after>", text)
    for name, value in os.environ.items():
        if SECRET_VARIABLE_PATTERN.search(name) and len(value) >= MIN_SECRET_LENGTH:
            text = text.replace(value, MASK)
    return text


def hide_address(text: str) -> str:
    """Return a text whose addresses have no secrets; `reveal_address` knows them in this process and its children."""
    pieces = _known_pieces()
    for pattern in _ADDRESS_SECRETS:
        for match in pattern.finditer(text):
            if match["secret"] != MASK:
                pieces[f"{match['before']}{MASK}{match['after']}"] = match[0]
        text = pattern.sub(rf"\g<before>{MASK}\g<after>", text)
    if pieces:
        os.environ[_PIECES_VARIABLE] = json.dumps(pieces)
    return text


def reveal_address(address: str) -> str:
    """Return an address with its secrets, to be opened and not to be kept.

    Raises:
        ValueError: They are not known.
    """
    for seen, piece in _known_pieces().items():
        address = address.replace(seen, piece)
    address = address.replace(MASK, os.environ.get(PASSWORD_VARIABLE, MASK)) if "://" in address else address
    if "://" in address and MASK in address:
        raise ValueError(
            f"{address}: its password is not stored. Set {PASSWORD_VARIABLE} to it, or give the address with its "
            "password again (--data.path)."
        )
    return address


def _known_pieces() -> dict[str, str]:
    pieces: dict[str, str] = json.loads(os.environ.get(_PIECES_VARIABLE, "{}"))
    return pieces


def is_secret_option(name: str) -> bool:
    """Return whether an option is named like a secret: ``api_key``, ``token``, ``aws_secret_access_key``, ..."""
    return _SECRET_OPTION.fullmatch(name) is not None


def names_secret(words: Sequence[str]) -> bool:
    """Return whether a command line gives a secret: in an address, as an option, or as an option within a value."""
    return any(conceal(word) != word or _INLINE_SECRET.search(word) or is_secret_option(word) for word in words)


def secret_options(options: Any, prefix: str = "") -> Iterator[tuple[Any, str, str]]:
    """Yield every text that is the value of an option named like a secret.

    Args:
        options: Options, which may hold others, as dictionaries, lists and jsonargparse's namespaces.
        prefix: Name of the options in the whole.

    Yields:
        The mapping that holds the option, its key there, and its full name.
    """
    if isinstance(options, list):
        for each in options:
            yield from secret_options(each, prefix)
    values = options if isinstance(options, dict) else getattr(options, "__dict__", {})
    for key, value in list(values.items()):
        name = f"{prefix}.{key}".removeprefix(".")
        if isinstance(value, str) and is_secret_option(str(key)):
            yield values, key, name
        elif not isinstance(value, str):
            yield from secret_options(value, name)


def change_texts(options: Any, change: Callable[[str], str]) -> None:
    """Replace every text in options (see `secret_options`) by what a function makes of it."""
    values = options if isinstance(options, dict | list) else getattr(options, "__dict__", {})
    for key, value in list(enumerate(values) if isinstance(values, list) else values.items()):
        if isinstance(value, str):
            values[key] = change(value)
        else:
            change_texts(value, change)


def conceal_outputs() -> None:
    """Let logs, warnings and tracebacks of this process hold no secrets."""
    make_record, format_warning = logging.getLogRecordFactory(), warnings.formatwarning
    if getattr(make_record, "conceals", False):
        return

    def make_concealed(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        text = record.getMessage()
        if conceal(text) != text:
            record.msg, record.args = conceal(text), ()
        return record

    make_concealed.conceals = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_concealed)
    warnings.formatwarning = lambda *args, **kwargs: conceal(format_warning(*args, **kwargs))
    sys.excepthook = lambda *error: print(conceal("".join(traceback.format_exception(*error))), file=sys.stderr, end="")
