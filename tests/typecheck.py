"""The run-time type checker of the tests: beartype, which takes an int where a float is declared, as mypy does."""

from beartype import BeartypeConf, beartype

typechecked = beartype(conf=BeartypeConf(is_pep484_tower=True))
