"""File writing, random number states and the environment report."""
