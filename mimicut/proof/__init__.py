"""What a student is worth and what must hold: the laws, figures on images that influenced nothing, their intervals, and
what the images themselves say. A broken law raises; a poor figure is reported. Nothing here trains.
"""
