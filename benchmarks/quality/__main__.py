"""Lets `python benchmarks/quality` run the comparison."""

from command import main

main()
