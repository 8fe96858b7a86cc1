"""Networks on the runtimes that run them: exported files, INT8, measured latency and the widths that are worth it."""
