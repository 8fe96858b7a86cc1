"""What a user brings: images from files, arrays and datasets, prepared as a teacher's weights expect; random views
of them; labels that only measure; and teachers by name, from libraries or the user's own code. Each model library has
one file that imports it; nothing here knows of pruning.
"""
