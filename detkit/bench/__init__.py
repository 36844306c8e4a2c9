"""Benchmarks: detkit's functions beside other libraries', results checked first, times taken in turns."""
