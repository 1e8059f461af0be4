"""`python -m mobiquant`."""

from mobiquant.cli import main

main()
