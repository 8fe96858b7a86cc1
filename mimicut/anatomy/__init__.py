"""What a network is made of, read from its operator graph: groups of channels that are kept or cut together, blocks
that can be dropped, costs, memory, and where the seam is. `find_seam.trace` puts it together: `tracing` gives the
graph, `operators` say what each operator does to channels, `reader` forms groups, and `probe` tries them. Nothing here
changes a weight, and nothing is guessed: what cannot be read is pinned, with the operator's name.
"""
