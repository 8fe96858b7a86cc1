"""The pages and pictures of docs/results.md and docs/default.md, made from the lines of the sweeps."""
