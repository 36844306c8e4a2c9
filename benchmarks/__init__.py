"""Benchmarks of detkit beside other libraries: results are checked first, then times are taken in turns.

They run from a checkout, `python -m benchmarks NAME`, and are not part of the installed package.
"""
