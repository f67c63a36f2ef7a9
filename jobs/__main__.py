"""`python -m jobs` is `coatnet`: the entry point, which answers Ctrl-C in one line from its first import on."""

import os


def main() -> None:
    """Run the command that `sys.argv` has."""
    try:
        from jobs.cli import main as run_command

        run_command()
    except KeyboardInterrupt:
        os.write(2, b"error: stopped; nothing was started\n")
        os._exit(130)


if __name__ == "__main__":
    main()
