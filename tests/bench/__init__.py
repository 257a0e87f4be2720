"""python -m bench."""
