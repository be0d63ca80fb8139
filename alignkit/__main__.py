"""`alignkit`, and `python -m alignkit`, the form that `accelerate launch -m alignkit` needs; nothing else."""

import sys


def main() -> int:
    """Run the command line and return the exit code; Ctrl-C while it loads ends as it does once a command runs."""
    try:
        from alignkit import cli

        return cli.main()
    except KeyboardInterrupt:
        from alignkit import console

        console.write("interrupted", stderr=True)
        return 130


if __name__ == "__main__":
    sys.exit(main())
