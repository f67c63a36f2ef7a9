"""One file per command, named as the command: arguments, output, exit code. It is imported when the command is used."""
