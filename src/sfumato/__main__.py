"""`python -m sfumato` is the command `sfumato`."""

from sfumato.cli.main import entry

if __name__ == "__main__":
    entry()
