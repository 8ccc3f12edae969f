"""`python -m fedcli`."""

from fedcli.cli import entry_point

entry_point()
