"""Why something cannot be read from the Hugging Face hub, in one line that says what to do."""

from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

UNREADABLE_FROM_HUB = (OSError, HTTPError)
"""What reading from the hub may raise: errors of a connection are no OSError."""
LOG_IN = "run `hf auth login` or set HF_TOKEN"
NOT_ADMITTED = "the account of the token was not admitted to it: ask for access on its page on the hub."
_EXPLANATIONS: tuple[tuple[type[BaseException], str], ...] = (  # of several that match, the first is meant
    (GatedRepoError, f"it is gated: accept its conditions on its page on the hub, then {LOG_IN}."),
    (RepositoryNotFoundError, f"the hub has nothing of this name, or it is private: check the name, or {LOG_IN}."),
    (RevisionNotFoundError, "the hub does not have this revision of it."),
    (OfflineModeIsEnabled, "it is not in the cache, and HF_HUB_OFFLINE keeps this program off the network."),
)


def explain_hub_error(error: BaseException) -> str:
    """Return why something cannot be read from the hub; empty if the error has other causes.

    Args:
        error: What was raised; the libraries of the hub hide what has happened in its causes.
    """
    errors = [*_causes(error)]
    for kind, explanation in _EXPLANATIONS:
        for each in errors:
            if isinstance(each, kind):
                return NOT_ADMITTED if kind is GatedRepoError and _status(each) == 403 else explanation
    if any(isinstance(each, HTTPError) and not isinstance(each, HfHubHTTPError) for each in errors):
        return f"{constants.ENDPOINT} does not answer, or not to the end: check the network, or try again."
    return ""


def hub_error_line(error: BaseException) -> str:
    """Return why something cannot be read from the hub, or what else an error says, in one line."""
    return explain_hub_error(error) or " ".join(str(error).split())


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
