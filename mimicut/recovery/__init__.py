"""Making good what a cut took: the closed form, norms, and MIMIC, in which the student learns the teacher's features at
the seam. Nothing here reads labels, touches the head, writes files or prints.
"""
