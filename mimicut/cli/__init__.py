"""The command line: options, progress and printing. It decides nothing."""
