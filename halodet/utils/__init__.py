"""File writing, random number states, drawn scenes and the environment report."""
