"""`python -m sfumato.compat train_network ...` runs a script by its name in sd-scripts."""

import sys

from sfumato.compat.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
