"""The steps in order: what `compress`, `recover`, `verify`, `crossfit`, `inspect` and the demonstration do, in terms of
the packages before this one. No algorithm, and no `if` about an architecture.
"""
