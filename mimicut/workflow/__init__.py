"""The steps in order: what `compress`, `recover`, `verify`, `crossfit`, `inspect` and the demonstration do, built from
the packages below this one. No algorithm, and no `if` about an architecture.
"""
