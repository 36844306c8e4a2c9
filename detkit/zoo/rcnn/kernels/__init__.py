"""Compiled code of the proposals, apart because Numba is imported with it: what looks for a source does not need it."""
