"""A result: its report, its folder, its pages, exported files and pictures; and results that are themselves teachers.
Nothing is pickled, and no code in a folder is run.
"""
