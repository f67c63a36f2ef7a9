"""`python -m jobs` is `coatnet`."""

from jobs.cli import main

main()
