"""What a user brings: images from files, arrays and datasets, prepared as a teacher's weights ask; random views of
them; labels that only measure; and teachers by name, from libraries or the user's own code. Only `builders` imports
model libraries; nothing here knows of pruning.
"""
