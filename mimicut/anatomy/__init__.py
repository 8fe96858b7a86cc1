"""What a network is made of, read from its operator graph: groups of channels that must live or die together, blocks
that can be dropped, costs, memory, and where the seam is. Nothing here changes a weight, and nothing is guessed: what
cannot be read is pinned, with the operator's name.
"""
