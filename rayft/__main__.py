"""`python -m rayft` is the command line. On a cluster rayft comes with its job, to whatever packages are there."""

import sys

from rayft.answer import exit_code, sentence

try:
    from rayft.cli import main
except ModuleNotFoundError as error:
    print(f"error: {sentence(error)}", file=sys.stderr)
    sys.exit(exit_code(error))

main()
