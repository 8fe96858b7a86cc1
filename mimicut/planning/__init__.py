"""What to keep under a budget: scores, the images' evidence, limits, widths, blocks, and the search for a latency.
Nothing here trains for good: trials are made on copies and thrown away.
"""
