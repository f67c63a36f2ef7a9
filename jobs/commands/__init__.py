"""One file per command, named as the command: arguments, output and exit code. The work is done elsewhere."""
