"""Checks and measurements of a student: the laws, figures on held-out images with their intervals, and a check of the
images themselves. A broken law raises; a poor figure is reported. Nothing here trains.
"""
