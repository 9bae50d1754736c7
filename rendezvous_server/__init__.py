"""Brings the ranks of a job together, so that they can punch TCP holes to each other."""
