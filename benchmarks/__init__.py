"""Benchmarks: what the library costs and what it hides, measured on this machine.

Run with `make bench`.
"""
