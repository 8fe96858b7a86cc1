"""A result as it is kept and shown: the report, the folder, its pages, exported files, pictures, and teachers that are
results themselves. Nothing is pickled, and no code in a folder is run.
"""
