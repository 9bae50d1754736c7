"""Serverless workers run the same redshift model on their share of one dataset."""
