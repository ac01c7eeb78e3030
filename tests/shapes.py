"""What checks the shapes in signatures while the tests run (conftest.py)."""

from beartype import BeartypeConf, beartype

typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float
