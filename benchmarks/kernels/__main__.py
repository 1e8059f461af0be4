"""Lets `python benchmarks/kernels` measure the GPU kernels."""

from command import main

main()
