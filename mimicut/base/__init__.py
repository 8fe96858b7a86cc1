"""What every other package may use: errors, guards that put networks back as they were, memory, memory layouts,
progress in words, versions. Nothing here knows a model, an image or a plan.
"""
