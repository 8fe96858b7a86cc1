"""understudy: a small network learns the role of a big one from a few unlabelled images."""
