"""Lets `python benchmarks/serving` measure a server under load."""

from command import main

main()
