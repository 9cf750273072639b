"""`python -m midi_llm`: the same as the command `midi-llm`."""

import sys

from midi_llm.cli import main

if __name__ == "__main__":
    sys.exit(main())
