"""Timings, roofline and memory of the library's operations. `pytest benchmarks --benchmark-only`, then
`python -m benchmarks.report`. Not part of the installed package.
"""
