"""`python -m rayft` is the command line. On a cluster rayft comes with its job, to whatever packages are there."""

import sys


def main() -> None:
    """Runs the command line; what goes wrong while it is imported, a Ctrl-C too, ends it as it would later."""
    try:
        from rayft.answer import exit_code, sentence

        try:
            from rayft.cli import main as command
        except (ModuleNotFoundError, KeyboardInterrupt) as error:
            print(f"error: {sentence(error)}", file=sys.stderr)
            sys.exit(exit_code(error))
    except KeyboardInterrupt:
        sys.exit(130)
    command()


if __name__ == "__main__":
    main()
