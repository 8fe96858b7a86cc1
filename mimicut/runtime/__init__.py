"""Networks on the runtimes that run them: exported files, INT8, measured latency, and which widths are fast there."""
