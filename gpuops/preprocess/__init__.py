"""What happens to a stored sample before a model sees it: declared once, run in training and in the served graph."""
